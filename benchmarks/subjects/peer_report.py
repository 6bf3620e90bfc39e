"""What was measured of each way to freeze: a row for each, with numbers or with the reason why there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from harness.cuda import Fact
from harness.results import Sampled, describe, mebibytes, spread, table
from harness.timing import paired_ratio

LIMIT = "limit: no_grad backbone, bare head"
OURS = "ours"
EVERY_METHOD = "every method"  # the one row of a network that cannot be measured at all


@dataclass
class PeerRow(Sampled):
    """One method on one network; an `error` in place of numbers where it cannot do the case."""

    model: str
    method: str
    version: str | None
    note: str = ""
    error: str | None = None
    batch_size: int | None = None
    trainable_parameters: int | None = None
    saved_bytes: int | None = None
    moved: dict[str, list[str]] = field(default_factory=dict)  # "parameters", "buffers", "gone": names in the backbone
    forward_ms: list[float] = field(default_factory=list)
    backward_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    loop_ms: list[float] = field(default_factory=list)
    backward_host_ms: list[float] = field(default_factory=list)
    step_host_ms: list[float] = field(default_factory=list)


@dataclass
class PeerReport:
    """All that one command measured."""

    environment: dict[str, Fact]
    command: str
    settings: dict[str, Fact]
    rows: list[PeerRow] = field(default_factory=list)


def as_markdown(report: PeerReport) -> str:
    """Return the report as a page to read."""
    by_model: dict[str, list[PeerRow]] = {}
    for row in report.rows:
        by_model.setdefault(row.model, []).append(row)
    tables = [f"## {model}{_batch(rows)}\n\n{model_table(rows)}\n" for model, rows in by_model.items()]
    return "\n".join(["# The same network, frozen by each library\n", describe(report), *tables, _HOW_TO_READ])


_HOW_TO_READ = """\
Milliseconds are median ± interquartile range, taken in turns on the same images. `step / ours` is the median of the
ratios within a pass, with its 95 % bootstrap interval. The last column compares all of the backbone with what it was,
bit for bit, after three steps of AdamW in train mode: a library that leaves normalisation layers trainable by default
moves them because it means to. On a GPU the ratio is that of steps back to back, as a training loop runs them. A
part is launch-bound where the host needs nine tenths of its time or more to queue it: its milliseconds are the host's.
"""


def _batch(rows: Sequence[PeerRow]) -> str:
    size = rows[0].batch_size
    return "" if size is None else f", batch of {size}"


def model_table(rows: Sequence[PeerRow]) -> str:
    """Format the rows of one model."""
    own = next((row for row in rows if row.method == OURS and row.step_ms), None)
    on_a_gpu = any(row.loop_ms for row in rows)
    header = ["", "version", "forward ms", "backward ms", "step ms", "step / ours", "saved MiB", "trainable"]
    header += ["step ms, back to back", "launch-bound"] if on_a_gpu else []
    header.append("backbone after 3 steps")
    return table(header, [_line(row, own, on_a_gpu=on_a_gpu) for row in rows])


def _line(row: PeerRow, own: PeerRow | None, *, on_a_gpu: bool) -> list[str]:
    line = [row.method, row.version or ("this checkout" if row.method == OURS else "not installed")]
    if not row.step_ms:
        return [*line, *[""] * (8 if on_a_gpu else 6), row.error or "not timed"]
    line += [spread(row.forward_ms), spread(row.backward_ms), spread(row.step_ms)]
    line.append(str(paired_ratio(row.whole_step_ms, own.whole_step_ms)) if own is not None and own is not row else "")
    line += [mebibytes(row.saved_bytes), f"{row.trainable_parameters:,}"]
    if on_a_gpu:
        line += [spread(row.loop_ms), " and ".join(row.launch_bound)]
    return [*line, _verdict(row)]


def _verdict(row: PeerRow) -> str:
    if row.method == LIMIT:
        return ""  # not a way to freeze, and not tried for three steps
    moved = [f"{len(names)} {what} moved" for what, names in row.moved.items() if names and what != "gone"]
    moved += [f"{len(row.moved['gone'])} buffers gone"] if row.moved.get("gone") else []
    verdict = ", ".join(moved) or "the same, bit for bit"
    return f"{verdict} ({row.note})" if row.note else verdict
