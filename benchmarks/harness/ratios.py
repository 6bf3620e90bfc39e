"""Targets: ratios, each beside what it may be at most, with a verdict that says what the ratio says."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from harness.cuda import Fact
from harness.results import describe, table, write_text
from harness.timing import Interval, paired_ratio


@dataclass(frozen=True)
class Paired:
    """Samples of two pieces of work in milliseconds: those at the same place come from the same pass."""

    numerator: Sequence[float]
    denominator: Sequence[float]

    @property
    def ratio(self) -> Interval:
        return paired_ratio(self.numerator, self.denominator)


@dataclass(frozen=True)
class Target:
    """One ratio and what it may be at most; `noise` is the same ratio of a row measured against itself.

    `samples` and `noise_samples` are what the two were taken from, so that they can be checked again.
    """

    model: str
    what: str
    at_most: float
    ratio: Interval | None = None
    noise: Interval | None = None
    remark: str = ""
    samples: Paired | None = None
    noise_samples: Paired | None = None

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return "not measured"
        if self.ratio.median <= self.at_most:
            return "met"
        # A target is missed when the ratio is above it by more than chance: when its whole interval is.
        return "missed" if self.ratio.low > self.at_most else "within the noise"


def compared(
    model: str, what: str, at_most: float, samples: Paired, noise: Paired | None = None, *, remark: str = ""
) -> Target:
    """Make the target of a ratio of samples, which it keeps."""
    return Target(model, what, at_most, samples.ratio, noise.ratio if noise else None, remark, samples, noise)


@dataclass
class TargetReport:
    """All that one command measured."""

    environment: dict[str, Fact]
    command: str
    settings: dict[str, Fact]
    targets: list[Target] = field(default_factory=list)
    refused: list[dict[str, Fact]] = field(default_factory=list)

    def refuse(self, model: str, what: str, reason: str) -> None:
        """Record what could not be measured, and say so."""
        self.refused.append({"model": model, "what": what, "reason": reason})
        print(f"{'refused':>16}  {model}: {what}: {reason}", flush=True)

    def add(self, target: Target) -> None:
        """Add a target, and say what became of it."""
        self.targets.append(target)
        print(f"{target.verdict:>16}  {target.model}: {target.what}: {target.ratio or target.remark}", flush=True)

    @property
    def missed(self) -> bool:
        """Whether any target was missed."""
        return any(target.verdict == "missed" for target in self.targets)


def write_targets(report: TargetReport, stem: Path) -> None:
    """Write `stem`.json with every ratio, and `stem`.md to read."""
    write_text(stem.with_suffix(".json"), json.dumps(asdict(report), indent=1) + "\n")
    write_text(stem.with_suffix(".md"), as_markdown(report))


def as_markdown(report: TargetReport) -> str:
    """Give the report as a page to read."""
    refused = [f"Refused: {entry['model']}, {entry['what']}: {entry['reason']}\n" for entry in report.refused]
    return "\n".join(["# Targets\n", describe(report), target_table(report.targets), *refused])


def target_table(targets: Iterable[Target]) -> str:
    """Lay out targets, and how to read them."""
    lines = []
    for target in targets:
        name = f"{target.model}: {target.what}"
        measured = [str(target.ratio or ""), str(target.noise or "")]
        lines.append([name, f"{target.at_most:.3g}", *measured, target.verdict, target.remark])
    header = ["", "at most", "measured", "A/A", "verdict", ""]
    return "\n".join([table(header, lines), "", _HOW_TO_READ])


_HOW_TO_READ = """\
Each ratio is the median of the ratios within a pass, with its 95 % bootstrap interval. `missed`: the whole interval is
above the limit; `within the noise`: the median is above it, the interval is not.
"""
