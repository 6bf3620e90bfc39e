"""The environment of a measurement, written into every result file."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from backbone_finetune import __version__
from harness import cuda
from harness.cuda import Fact


def describe_environment(device: torch.device) -> dict[str, Fact]:
    """Return date, machine, device, threads and versions."""
    facts: dict[str, Fact] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "python": platform.python_version(),
    }
    for package in ("torch", "timm"):
        facts[package] = installed_version(package)
    facts["backbone-finetune"] = __version__  # of the running code, which may differ from the installed package
    if device.type == "cuda":
        facts |= cuda.describe_card(device)
    return facts


def note_end(environment: dict[str, Fact], device: torch.device) -> None:
    """Add values at the end of a run to an environment: the temperature or clocks of a GPU may explain a ratio."""
    if device.type == "cuda":
        environment |= cuda.describe_card_at_end(device)


def describe_precision(precision: str, device: torch.device) -> str:
    """Return the precision of a row: `off` is torch's float32, which on a GPU may mean TF32."""
    if precision != "off":
        return f"{precision} autocast"
    if device.type != "cuda":
        return "float32"
    convolutions, products = cuda.float32_precision()
    return f"float32: {convolutions} convolutions, {products} matrix products"


def describe_command(script: str, arguments: list[str]) -> str:
    """Return the command, as it is typed at the top of the repository."""
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *arguments])


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    answer = subprocess.run(
        [git, "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or None


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
