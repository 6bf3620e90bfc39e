"""All that the benchmarks ask of CUDA, in one place: events, memory, kernels, and what the driver says of the card."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

Fact = str | int | float | bool | None

# What stays the same while a benchmark runs, and what may drift; by nvidia-smi's own names.
_FIXED = (
    "name",
    "driver_version",
    "persistence_mode",
    "mig.mode.current",
    "ecc.mode.current",
    "power.limit",
    "clocks.max.sm",
    "clocks.max.mem",
)
_DRIFTING = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "memory.used")
# Variables that change what torch does on a GPU, recorded where they are set.
_VARIABLES = (
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)
# The field for what holds the clocks down: its name until driver 530 is the second.
_THROTTLE = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")


def new_event() -> torch.cuda.Event:
    """Make an event that keeps its time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def is_available() -> bool:
    """Return whether torch sees a CUDA device."""
    return torch.cuda.is_available()


def has_bf16() -> bool:
    """Return whether the card has bf16 instructions of its own."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was queued."""
    torch.cuda.synchronize(device)


def random_state(device: torch.device) -> torch.Tensor:
    """Return the state of the device's random numbers."""
    return torch.cuda.get_rng_state(device)


def second_level_cache_bytes(device: torch.device) -> int:
    """Return the size of the card's second-level cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


@dataclass(frozen=True)
class PeakMemory:
    """Bytes on the device: allocated before a call, and the most allocated and the most reserved during it."""

    before: int
    allocated: int
    reserved: int


def peak_memory(call: Callable[[], object], device: torch.device) -> PeakMemory:
    """Measure a call's peak, with nothing in it that is only left over from earlier work."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # what the allocator still holds from earlier work would count as reserved
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return PeakMemory(before, torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))


def allocation_retries(device: torch.device) -> int:
    """Return how often the allocator freed its cache to find memory: a clock in which that happens is wrong."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))


@dataclass(frozen=True)
class DeviceWork:
    """What the device did in a call: kernels, copies and fills by number, and the sum of their milliseconds."""

    kernels: int
    milliseconds: float


def device_work(
    make_call: Callable[[], Callable[[], object]], device: torch.device, *, repeats: int = 3
) -> DeviceWork | None:
    """Sum the kernels of a call by the profiler, the median of some calls; None on a CPU or where it sees no kernel.

    The sum has no launch in it and no waiting between kernels: a CUDA graph of the call would take at least as long.
    `make_call` does what comes before the call and is not counted. Count after the last clock of a process has run:
    what the profiler leaves behind makes launches slower.
    """
    if device.type != "cuda":
        return None
    os.environ.setdefault("TEARDOWN_CUPTI", "0")  # so many short sessions would meet a teardown that is under way
    seen = []
    for _ in range(repeats):
        call = make_call()
        torch.cuda.synchronize(device)
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            call()
            torch.cuda.synchronize(device)
        # Annotations such as Optimizer.step's span the kernels below them, which would be counted twice.
        events = [
            event
            for event in profiler.key_averages()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        microseconds = sum(event.self_device_time_total for event in events)
        seen.append(DeviceWork(sum(event.count for event in events), microseconds / 1e3))
    middle = sorted(seen, key=lambda work: work.milliseconds)[len(seen) // 2]
    return middle if middle.kernels else None


def describe_card(device: torch.device) -> dict[str, Fact]:
    """Name the card, the libraries and the precision of float32 work, and what the driver says before a run."""
    properties = torch.cuda.get_device_properties(device)
    convolutions, products = float32_precision()
    return {
        "device_name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "device_memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "float32_convolutions": convolutions,
        "float32_matrix_products": products,
        **{name: os.environ[name] for name in _VARIABLES if name in os.environ},
        **_query(device, (*_FIXED, *_DRIFTING)),
    }


def describe_card_at_end(device: torch.device) -> dict[str, Fact]:
    """Describe what has drifted by the end of a run."""
    facts = {**_query(device, _DRIFTING), "allocation_retries": allocation_retries(device)}
    return {f"{name}_at_end": value for name, value in facts.items()}


def float32_precision() -> tuple[str, str]:
    """Name what float32 means in convolutions and in matrix products: IEEE or TF32.

    Read by torch's new names: the old ones raise once a user has set the new ones.
    """
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        return "IEEE", "IEEE"
    settings = (
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision,
    )
    convolutions, products = ("TF32" if setting == "tf32" else "IEEE" for setting in settings)
    return convolutions, products


def _query(device: torch.device, fields: tuple[str, ...]) -> dict[str, Fact]:
    """Ask nvidia-smi about our card alone; where it cannot say, its reason is the answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"nvidia-smi": "not found"}
    card = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    for throttle in _THROTTLE:
        asked = (*fields, throttle)
        answer = _run(program, card, f"--query-gpu={','.join(asked)}", "--format=csv,noheader")
        if answer.returncode == 0:
            facts: dict[str, Fact] = dict(zip(asked, answer.stdout.strip().split(", "), strict=True))
            facts["throttle_reasons"] = facts.pop(throttle)
            others = _run(program, card, "--query-compute-apps=pid", "--format=csv,noheader")
            facts["processes_on_card"] = len(others.stdout.split())  # ours is one of them
            return facts
    return {"nvidia-smi": f"failed: {(answer.stdout + answer.stderr).strip()}"}


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
