"""Measure the cost of `train` on a folder of images, compared with reading, transforming and running each image once.

python benchmarks/pictures_per_second.py --threads 1
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from harness.environment import describe_command, describe_environment, note_end
from harness.options import add_shared_options, positive, settle_device
from harness.ratios import Paired, TargetReport, compared, target_table
from harness.results import describe, median, table, write_text
from reading.folder import make_folder
from reading.stages import time_openvino, time_stages

from backbone_finetune.recipes import keep_freed_memory

HERE = Path(__file__).parent
LIMIT, AGAIN, TRAIN, WORKERS = "one pass by hand", "the same again", "train, no workers", "train, workers"
COMPILED, NOT_COMPILED = "pass, compiled by OpenVINO", "pass, not compiled, freed memory returned"
TO_COMPILE = "to compile, seconds"

Runner = Callable[..., tuple[float, float]]
TimeOpenVINO = Callable[[str], tuple[float, float, float] | None]


@dataclass
class ReadingReport(TargetReport):
    """All results of a run: CPU and wall seconds of each command, and the stages of a pass."""

    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)
    wall_seconds: dict[str, list[float]] = field(default_factory=dict)
    stages_ms: dict[str, list[float]] = field(default_factory=dict)


def main(
    arguments: Sequence[str] | None = None, *, runner: Runner | None = None, openvino: TimeOpenVINO = time_openvino
) -> int:
    """Measure and write; return 0, or 1 if a target was missed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_options(parser, output="runs/pictures_per_second")
    parser.add_argument("--model", default="tf_efficientnet_lite0", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--pictures", type=positive, default=2000, metavar="N", help="default: %(default)s")
    parser.add_argument("--epochs", type=positive, default=20, metavar="N", help="of train (default: %(default)s)")
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="default: %(default)s")
    options = parser.parse_args(given)
    try:
        device = settle_device(options)
    except ValueError as error:
        parser.error(str(error))
    settings = {name: getattr(options, name) for name in ("model", "pictures", "epochs", "workers", "repeats")}
    environment, command = describe_environment(device), describe_command("pictures_per_second.py", given)
    report = ReadingReport(environment, command, settings)
    try:
        with TemporaryDirectory() as folder:
            make_folder(Path(folder, "images"), options.pictures)
            measure(report, Path(folder), options, runner or run, openvino)
    finally:  # write earlier measurements in any case
        note_end(report.environment, device)
        stem = options.output / "pictures_per_second"
        write_text(stem.with_suffix(".json"), json.dumps(asdict(report), indent=1) + "\n")
        write_text(stem.with_suffix(".md"), as_markdown(report))
    return 1 if report.missed else 0


def measure(
    report: ReadingReport, folder: Path, options: argparse.Namespace, runner: Runner, openvino: TimeOpenVINO
) -> None:
    """Run all commands in turns, in alternating order, and add the results to the report."""
    images, output = str(folder / "images"), str(folder / "run")
    train = [
        sys.executable,
        "-m",
        "backbone_finetune.cli",
        "train",
        images,
        "--model",
        options.model,
        "--device",
        "cpu",
    ]
    train += ["--epochs", str(options.epochs), "--output", output, "--overwrite", "--workers"]
    once = [sys.executable, str(HERE / "reading" / "one_pass.py"), images, options.model]
    runs = {LIMIT: once, AGAIN: once, TRAIN: [*train, "0"], WORKERS: [*train, str(options.workers)]}
    paths = sorted((folder / "images").rglob("*.jpg"))[:64]
    for turn in range(options.repeats or 3):
        for label in runs if turn % 2 == 0 else reversed(runs):
            cpu, wall = runner(runs[label], threads=None if label == WORKERS else 1)
            report.cpu_seconds.setdefault(label, []).append(cpu)
            report.wall_seconds.setdefault(label, []).append(wall)
            print(f"{label:20} {cpu:7.1f} s of CPU, {wall:7.1f} s", flush=True)
        if (times := openvino(options.model)) is not None:
            names = (COMPILED, NOT_COMPILED, TO_COMPILE)
            for name, value in zip(names, times, strict=True):
                report.stages_ms.setdefault(name, []).append(value)
    keep_freed_memory()  # as the command line does; OpenVINO's target is for the pass before that
    for _ in range(options.repeats or 3):
        for stage, milliseconds in time_stages(paths, options.model).items():
            report.stages_ms.setdefault(stage, []).append(milliseconds)
    limit = report.cpu_seconds[LIMIT]
    noise = Paired(report.cpu_seconds[AGAIN], limit)
    what = f"train / one read, transform and pass, {options.pictures} images, {options.epochs} epochs, CPU seconds"
    report.add(compared(options.model, what, 1.2, Paired(report.cpu_seconds[TRAIN], limit), noise))
    halves = [seconds / 2 for seconds in limit]
    what = f"wall clock with {options.workers} workers / (those CPU seconds / 2)"
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at the end"
    report.add(compared(options.model, what, 1.25, Paired(report.wall_seconds[WORKERS], halves), remark=load))
    if (compiled := report.stages_ms.get(COMPILED)) is not None:
        eager = report.stages_ms[NOT_COMPILED]
        with_compiling = [5000 * ms + 1e3 * s for ms, s in zip(compiled, report.stages_ms[TO_COMPILE], strict=True)]
        what = "pass of 5,000 images by OpenVINO, compiling counted / not compiled, freed memory returned"
        report.add(compared(options.model, what, 0.55, Paired(with_compiling, [5000 * ms for ms in eager])))


def run(command: Sequence[str], *, threads: int | None) -> tuple[float, float]:
    """Run a command; return its CPU seconds, including workers, and its wall seconds."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("OMP_NUM_THREADS", None)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    start = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - start


def as_markdown(report: ReadingReport) -> str:
    """Return the report as a page to read."""
    parts = ["# Images per second, from JPEG files to cached features\n", describe(report)]
    count = int(report.settings["pictures"] or 1)
    lines = [
        [label, f"{median(cpu):.1f}", f"{1e3 * median(cpu) / count:.1f}", f"{median(report.wall_seconds[label]):.1f}"]
        for label, cpu in report.cpu_seconds.items()
    ]
    parts += ["## Whole runs, start-up of the process counted\n"]
    parts += [table(["", "CPU seconds", "CPU ms per image", "seconds"], lines), ""]
    parts += ["## Stages, CPU time per image\n"]
    parts += [table(["", "ms"], [[stage, f"{median(ms):.2f}"] for stage, ms in report.stages_ms.items()]), ""]
    return "\n".join([*parts, "## Ratios\n", target_table(report.targets), HOW_IT_WAS_TIMED])


HOW_IT_WAS_TIMED = """\
The images are JPEGs of 500 x 375 made of noise of all scales, about 30 kB each. The limit is Pillow, timm's transform
and the same network in bf16 and channels last, in a plain loop. Runs take turns, each in a process of its own, on one
thread but for the one with workers; CPU seconds include those of workers. The stages are those of a process that keeps
freed memory, as the command line does; the plain loop returns it to the system, as Python does by default.
"""


if __name__ == "__main__":
    sys.exit(main())
