"""Targets: ratios with an upper limit and a verdict."""

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
    """Samples of two pieces of work in milliseconds; samples at the same index come from the same pass."""

    numerator: Sequence[float]
    denominator: Sequence[float]

    @property
    def ratio(self) -> Interval:
        return paired_ratio(self.numerator, self.denominator)


@dataclass(frozen=True)
class Target:
    """One ratio and its upper limit; `noise` is the same ratio of a row measured against itself.

    `samples` and `noise_samples` are the samples of the two.
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
        # A target is missed if the whole interval of the ratio is above the limit.
        return "missed" if self.ratio.low > self.at_most else "within the noise"


def compared(
    model: str, what: str, at_most: float, samples: Paired, noise: Paired | None = None, *, remark: str = ""
) -> Target:
    """Return the target of a ratio of samples, with the samples."""
    return Target(model, what, at_most, samples.ratio, noise.ratio if noise else None, remark, samples, noise)


@dataclass
class TargetReport:
    """All results of a run."""

    environment: dict[str, Fact]
    command: str
    settings: dict[str, Fact]
    targets: list[Target] = field(default_factory=list)
    refused: list[dict[str, Fact]] = field(default_factory=list)

    def refuse(self, model: str, what: str, reason: str) -> None:
        """Record and print what could not be measured."""
        self.refused.append({"model": model, "what": what, "reason": reason})
        print(f"{'refused':>16}  {model}: {what}: {reason}", flush=True)

    def add(self, target: Target) -> None:
        """Add a target, and print its verdict."""
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
    """Return the report as a page to read."""
    refused = [f"Refused: {entry['model']}, {entry['what']}: {entry['reason']}\n" for entry in report.refused]
    return "\n".join(["# Targets\n", describe(report), target_table(report.targets), *refused])


def target_table(targets: Iterable[Target]) -> str:
    """Format targets, and how to read them."""
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
