"""A benchmark that trains in several ways on splits of two image sets: its command line, results and resumption."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from harness.cuda import Fact
from harness.environment import describe_command, describe_environment
from harness.options import make_writable, positive
from harness.results import write_text

from .arms import Outcome
from .sets import FASHION, Images, split_clipart, split_fashion

SETS = ["clipart", "Fashion-MNIST"]
RESULTS = Path(__file__).parents[1] / "results"

Done = Container[tuple[str, int, str]]  # set, split and way


@dataclass
class Report:
    """All that one command measured."""

    environment: dict[str, Fact]
    command: str
    settings: dict[str, Fact]
    outcomes: list[Outcome] = field(default_factory=list)

    def by_set(self) -> dict[str, list[Outcome]]:
        """Return the outcomes of each set of images, in the order of their first."""
        sets = dict.fromkeys(outcome.data for outcome in self.outcomes)
        return {data: [outcome for outcome in self.outcomes if outcome.data == data] for data in sets}


def make_parser(description: str | None, ways: Sequence[str], *, stem: str) -> argparse.ArgumentParser:
    """Make a parser with the options of every such benchmark; those of `add_fashion` are to be added."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--sets", nargs="+", choices=SETS, default=SETS)
    add("--arms", nargs="+", choices=ways, default=ways, metavar="NAME", help="ways to train, of those in the page")
    add("--splits", type=positive, default=3, metavar="N")
    add("--image-size", type=positive, default=96, metavar="N")
    add("--output", type=Path, default=RESULTS / stem, metavar="STEM")
    return parser


def add_fashion(parser: argparse.ArgumentParser, *, train: int, test: int) -> None:
    """Add the options for the images of Fashion-MNIST."""
    add = parser.add_argument
    add("--fashion-mnist", type=Path, default=FASHION, metavar="DIR", help="where the Debian package puts its files")
    add("--fashion-train", type=positive, default=train, metavar="N")
    add("--fashion-test", type=positive, default=test, metavar="N")


def parse(parser: argparse.ArgumentParser, given: Sequence[str]) -> argparse.Namespace:
    """Read the command line; ends with an error where files are missing or nothing can be written."""
    options = parser.parse_args(given)
    try:
        make_writable(options.output.parent)
        if "Fashion-MNIST" in options.sets:
            split_fashion(options.fashion_mnist, 10, 10, 0)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    return options


def splits_of(options: argparse.Namespace) -> Iterator[tuple[int, str, Callable[[], tuple[Images, Images]]]]:
    """Yield the number of each split, the set, and a function that draws it: one split of each set after the other."""
    fashion = partial(split_fashion, options.fashion_mnist, options.fashion_train, options.fashion_test)
    draw: dict[str, Callable[[int], tuple[Images, Images]]] = {"clipart": split_clipart, "Fashion-MNIST": fashion}
    for seed in range(options.splits):
        for data in options.sets:
            yield seed, data, partial(draw[data], seed)


def run_all(
    script: str,
    given: Sequence[str],
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Done], Iterator[Outcome]],
    as_markdown: Callable[[Report], str],
    **constants: Fact,
) -> int:
    """Measure what is not done; results are written after each outcome, and a stopped run resumes."""
    torch.set_num_threads(1)
    settings: dict[str, Fact] = {name: value for name, value in vars(options).items() if isinstance(value, int)}
    settings |= constants
    report = Report(describe_environment(torch.device("cpu")), describe_command(script, list(given)), settings)
    try:
        report.outcomes += read_outcomes(options.output.with_suffix(".json"), settings)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for outcome in measure(options, {(outcome.data, outcome.seed, outcome.arm) for outcome in report.outcomes}):
        report.outcomes.append(outcome)
        print(f"{outcome.accuracy['plain']:.3f} {outcome.data} {outcome.seed}: {outcome.arm}", flush=True)
        write_report(report, options.output, as_markdown)
    write_report(report, options.output, as_markdown)
    return 0


def read_outcomes(path: Path, settings: Mapping[str, Fact]) -> list[Outcome]:
    """Read the results of a stopped run; raise ValueError if its settings differ."""
    if not path.is_file():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["settings"] != settings:
        raise ValueError(f"{path} has results of other settings, {content['settings']}: pass another --output.")
    return [Outcome(**outcome) for outcome in content["outcomes"]]


def write_report(report: Report, stem: Path, as_markdown: Callable[[Report], str]) -> None:
    """Write `stem`.json with every outcome, `stem`.md to read."""
    write_text(stem.with_suffix(".json"), json.dumps(asdict(report), indent=1) + "\n")
    write_text(stem.with_suffix(".md"), as_markdown(report))


def gain_line(outcomes: Sequence[Outcome], first: str, second: str) -> list[str] | None:
    """Return what a way gains over another on the same splits, and on how many; None if they have none."""
    ours, theirs = (
        {outcome.seed: outcome.accuracy["plain"] for outcome in outcomes if outcome.arm == arm}
        for arm in (first, second)
    )
    gains = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not gains:
        return None
    return [f"{first} / {second}", spread(gains, "+.3f"), f"{sum(gain > 0 for gain in gains)} of {len(gains)}"]


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation over splits."""
    deviation = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"
