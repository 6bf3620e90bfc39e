"""What a run measured: rows that keep every raw sample, and the files they are written to and read from."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from harness.cuda import Fact, device_work
from harness.environment import describe_environment
from harness.timing import Interval, StepTimes, TrainingStep, interquartile_range, paired_ratio

CLOCKS = ("forward_ms", "backward_ms", "optimizer_ms", "step_ms", "loop_ms", "backward_host_ms", "step_host_ms")
# Where the host needs this share of the time to queue the work, the device waits for it.
LAUNCH_BOUND_FROM = 0.9


class Sampled:
    """A row that keeps every sample of its clocks; the last three are of a GPU, and empty on a CPU."""

    forward_ms: list[float]
    backward_ms: list[float]
    optimizer_ms: list[float]
    step_ms: list[float]
    loop_ms: list[float]  # a step of several back to back
    backward_host_ms: list[float]  # what the host took to queue a backward, and a step
    step_host_ms: list[float]

    def add(self, times: StepTimes) -> None:
        """Add the samples of one pass."""
        for name, taken in asdict(times).items():
            if taken is not None:
                getattr(self, f"{name}_ms").append(taken)

    def clear(self) -> None:
        """Forget all samples."""
        for clock in CLOCKS:
            getattr(self, clock).clear()

    @property
    def whole_step_ms(self) -> list[float]:
        """Samples of a step as a training loop runs it: back to back on a GPU, one by one on a CPU."""
        return self.loop_ms or self.step_ms

    @property
    def launch_bound(self) -> list[str]:
        """Name what goes at the host's pace: the `backward` alone, the `step` back to back. Nothing on a CPU."""
        parts = {"backward": (self.backward_host_ms, self.backward_ms), "step": (self.step_host_ms, self.loop_ms)}
        return [
            name for name, (host, whole) in parts.items() if host and median(host) >= LAUNCH_BOUND_FROM * median(whole)
        ]


@dataclass
class Row(Sampled):
    """One variant of one model; samples at the same place in two rows of a model come from the same pass."""

    model: str
    variant: str  # unfrozen, partial, frozen or limit
    trainable_groups: int | None
    batch_size: int
    image_size: int
    trainable_parameters: int
    saved_bytes: int
    peak_bytes: int | None
    backward_flops: int | None
    forward_ms: list[float] = field(default_factory=list)
    backward_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    # Of a CUDA device alone; files from before these were counted have none of them.
    loop_ms: list[float] = field(default_factory=list)
    backward_host_ms: list[float] = field(default_factory=list)
    step_host_ms: list[float] = field(default_factory=list)
    peak_before_bytes: int | None = None  # allocated before the step whose peak was taken
    peak_reserved_bytes: int | None = None
    allocation_retries: int | None = None  # while this model was timed
    backward_kernels: int | None = None
    backward_device_ms: float | None = None  # the sum of the kernels, by the profiler
    step_kernels: int | None = None
    step_device_ms: float | None = None

    def count_kernels(self, step: TrainingStep, device: torch.device) -> None:
        """Add what the device computes in a backward and in a step, by the profiler."""

        def fresh_backward() -> Callable[[], object]:
            step.clear_gradients()
            return step.forward().backward

        step.enter()
        backward, whole = device_work(fresh_backward, device), device_work(lambda: step.run, device)
        step.clear_gradients()
        if backward is not None and whole is not None:
            self.backward_kernels, self.backward_device_ms = backward.kernels, backward.milliseconds
            self.step_kernels, self.step_device_ms = whole.kernels, whole.milliseconds


@dataclass
class Report:
    """All that one command measured; `noise` holds a second, identical run of some rows, taken in the same passes."""

    environment: dict[str, Fact]
    command: str
    settings: dict[str, Fact]
    rows: list[Row] = field(default_factory=list)
    noise: list[Row] = field(default_factory=list)
    refused: list[dict[str, Fact]] = field(default_factory=list)
    interrupted: bool = False

    def models(self) -> list[str]:
        """Names of the models with rows, in the order in which they were measured."""
        return list(dict.fromkeys(row.model for row in self.rows))

    def rows_of(self, model: str) -> list[Row]:
        """Rows of one model, in the order in which they were measured."""
        return [row for row in self.rows if row.model == model]

    def row(self, model: str, variant: str) -> Row | None:
        """Return the first row of a model and variant, None where it was refused."""
        return next((row for row in self.rows_of(model) if row.variant == variant), None)

    def noise_of(self, model: str) -> list[tuple[Row, Row]]:
        """Pair each A/A row of a model with the row that it repeats."""
        pairs = [(self.row(model, again.variant), again) for again in self.noise if again.model == model]
        return [(first, again) for first, again in pairs if first is not None]


def start_report(device: torch.device, command: str, settings: dict[str, Fact]) -> Report:
    """Begin an empty report, with the environment as it is now: after threads and cuDNN have been set."""
    return Report(describe_environment(device), command, settings)


def reason_of(error: Exception) -> str:
    """Return an error as one line, for the row of what it kept from being measured."""
    return f"{type(error).__name__}: {error}".splitlines()[0].strip()


def read_report(path: Path) -> Report:
    """Read what `write_report` wrote as JSON."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows, noise = ([Row(**row) for row in content.pop(key)] for key in ("rows", "noise"))
    return Report(rows=rows, noise=noise, **content)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file under a temporary name, then move it into place: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")  # the ending stays: matplotlib chooses the format by it
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, all of it or nothing."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_report(report: Report, stem: Path) -> None:
    """Write `stem`.json with every sample, `stem`.csv with a line per row, `stem`.md to read."""
    write_text(stem.with_suffix(".json"), json.dumps(asdict(report), indent=1) + "\n")
    write_text(stem.with_suffix(".csv"), _as_csv(report))
    write_text(stem.with_suffix(".md"), as_markdown(report))


def _as_csv(report: Report) -> str:
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    facts = [name for name in Row.__dataclass_fields__ if name not in CLOCKS]
    writer.writerow([*facts, *(f"{clock}_{what}" for clock in CLOCKS for what in ("median", "iqr"))])
    for row in report.rows:
        spreads: list[str] = []
        for samples in (getattr(row, clock) for clock in CLOCKS):
            spreads += [f"{median(samples):.6g}", f"{interquartile_range(samples):.6g}"] if samples else ["", ""]
        writer.writerow([getattr(row, fact) for fact in facts] + spreads)
    return lines.getvalue()


def median(samples: Sequence[float]) -> float:
    """Median of samples, the mean of the middle two of an even number."""
    return torch.tensor(samples, dtype=torch.float64).quantile(0.5).item()


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table whose columns also line up on a terminal."""
    cells = [list(header), *([*line] for line in lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    # Names to the left, numbers to the right.
    laid_out = [
        f"| {line[0]:<{widths[0]}} | "
        + " | ".join(f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        + " |"
        for line in cells
    ]
    rule = f"| {'-' * widths[0]} | " + " | ".join("-" * (width - 1) + ":" for width in widths[1:]) + " |"
    return "\n".join([laid_out[0], rule, *laid_out[1:]])


class Described(Protocol):
    """What any report says of its own origin."""

    environment: dict[str, Fact]
    command: str
    settings: dict[str, Fact]


def describe(report: Described) -> str:
    """Name where and how a report was measured, as a Markdown list."""
    facts = {**report.environment, **report.settings}
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items() if value is not None)
    return f"`{report.command}`\n\n{listed}\n"


_HOW_TO_READ = """\
Milliseconds are median ± interquartile range. A speed-up is unfrozen / this row: the median of the ratios within a
pass, with its 95 % bootstrap interval; `of the limit` is this row / limit. An A/A row is a row measured against itself:
a difference that lies within its interval says nothing. Saved MiB is what the graph keeps for backward, parameters
left out.
"""

_HOW_TO_READ_CUDA = """\
`back to back` is a step's share of several without a wait between them, as a training loop runs them. A part is
launch-bound where the host needs nine tenths of its time or more to queue it: its milliseconds are then the host's, and
`device ms` is what to compare: the sum of the kernels by the profiler, with no launch in it. `before MiB` was allocated
before the step, `peak MiB` is the most allocated in it, `reserved MiB` what was taken from the card.
"""


def as_markdown(report: Report) -> str:
    """Return the report as a page to read."""
    parts = ["# Backward time, frozen against unfrozen\n", describe(report)]
    if report.interrupted:
        parts.append("**Interrupted: these are the samples taken until then.**\n")
    for model in report.models():
        parts.append(f"## {_title(report, model)}\n\n{model_table(report, model)}\n")
        parts += [f"{device_table(report, model)}\n"] if _on_a_gpu(report, model) else []
        retries = report.rows_of(model)[0].allocation_retries
        if retries:
            parts.append(f"The allocator freed its cache {retries} times while this was timed: take a smaller batch.\n")
    parts += [f"Refused: {entry['model']}, {entry['variant']}: {entry['reason']}\n" for entry in report.refused]
    parts.append(_HOW_TO_READ)
    if any(_on_a_gpu(report, model) for model in report.models()):
        parts.append(_HOW_TO_READ_CUDA)
    return "\n".join(parts)


def _title(report: Report, model: str) -> str:
    row = report.rows_of(model)[0]
    precision = report.settings.get("precision", "")  # files from before it was named have none
    layout = "channels last" if report.settings.get("channels_last") else ""
    facts = [f"batch {row.batch_size} of {row.image_size} pixels", str(precision), layout]
    return ", ".join([model, *(fact for fact in facts if fact)])


def _on_a_gpu(report: Report, model: str) -> bool:
    return any(row.loop_ms for row in report.rows_of(model))


def model_table(report: Report, model: str) -> str:
    """Format one model's rows beside the limit and the noise."""
    unfrozen, limit = report.row(model, "unfrozen"), report.row(model, "limit")
    header = ["", "forward ms", "backward ms", "step ms", "backward speed-up", "step speed-up"]
    header += ["backward, of the limit", "step, of the limit", "saved MiB"]
    lines = []
    for row in report.rows_of(model):
        lines.append([_name(row), *_times(row)])
        lines[-1] += [_ratio(unfrozen, row, "backward_ms"), _ratio(unfrozen, row, "step_ms")]
        lines[-1] += [_ratio(row, limit, "backward_ms"), _ratio(row, limit, "step_ms"), mebibytes(row.saved_bytes)]
    for first, again in report.noise_of(model):
        name = f"A/A {again.variant}"
        lines.append([name, *_times(again), _ratio(first, again, "backward_ms"), _ratio(first, again, "step_ms")])
        lines[-1] += ["", "", ""]
    return table(header, lines)


def device_table(report: Report, model: str) -> str:
    """Format what only a GPU has: steps back to back, kernels, memory, and what is bound by launches."""
    unfrozen = report.row(model, "unfrozen")
    header = ["", "step ms, back to back", "speed-up", "backward kernels", "backward device ms"]
    header += ["step device ms", "launch-bound", "before MiB", "peak MiB", "reserved MiB"]
    lines = []
    for row in report.rows_of(model):
        lines.append([_name(row), spread(row.loop_ms) if row.loop_ms else "", _ratio(unfrozen, row, "loop_ms")])
        lines[-1] += ["" if row.backward_kernels is None else str(row.backward_kernels)]
        lines[-1] += ["" if ms is None else f"{ms:.4g}" for ms in (row.backward_device_ms, row.step_device_ms)]
        lines[-1].append(" and ".join(row.launch_bound))
        lines[-1] += [mebibytes(count) for count in (row.peak_before_bytes, row.peak_bytes, row.peak_reserved_bytes)]
    return table(header, lines)


def _name(row: Row) -> str:
    return row.variant if row.variant != "partial" else f"top {row.trainable_groups} groups train"


def _times(row: Row) -> list[str]:
    return [spread(row.forward_ms), spread(row.backward_ms), spread(row.step_ms)]


def _ratio(numerator: Row | None, denominator: Row | None, clock: str) -> str:
    if numerator is None or denominator is None or numerator is denominator:
        return ""
    return str(ratio_of(numerator, denominator, clock))


def ratio_of(numerator: Row, denominator: Row, clock: str) -> Interval:
    """Paired ratio of two rows of one model by the name of a clock, such as `backward_ms`."""
    return paired_ratio(getattr(numerator, clock), getattr(denominator, clock))


def spread(samples: Sequence[float]) -> str:
    """Median ± interquartile range, in four figures."""
    return f"{median(samples):.4g} ± {interquartile_range(samples):.2g}"


def mebibytes(count: int | None) -> str:
    """Bytes as MiB to read; empty where they are not known."""
    return "" if count is None else f"{count / 2**20:.4g}"
