"""Summarize the torture test on one page, every timm family under every condition, from pytest's report.

pytest -m slow tests/zoo/test_torture.py --junitxml=torture.xml
python benchmarks/torture_summary.py torture.xml
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch
from harness.environment import describe_command, describe_environment
from harness.results import write_text

TEST = "test_every_family_under_every_condition"
PYTEST = "pytest -m slow tests/zoo/test_torture.py --junitxml=torture.xml"


class Case(NamedTuple):
    """The outcome of one family under one condition; `reason` if it did not pass."""

    family: str
    optimizer: str
    zero_grad: str
    circumstance: str
    outcome: str
    reason: str


def main() -> int:
    """Write the page; return 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, metavar="XML", help="what pytest's --junitxml wrote")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "torture.md")
    options = parser.parse_args()
    try:
        suite, cases = read_report(options.report)
    except (OSError, ElementTree.ParseError, ValueError) as error:
        parser.error(f"{options.report}: {error}; pass what `{PYTEST}` wrote")
    facts = describe_environment(torch.device("cpu"))
    header = (
        f"`{PYTEST}`, ended {suite['ended']}, {suite['minutes']} minutes; timm {facts['timm']}, "
        f"torch {facts['torch']}, Python {facts['python']}, {facts['cpu']}; "
        f"this page: `{describe_command(__file__, sys.argv[1:])}`."
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.output, as_markdown(cases, header))
    outcomes = Counter(case.outcome for case in cases)
    print(f"wrote {options.output}: {', '.join(f'{count} {outcome}' for outcome, count in outcomes.items())}")
    return int(outcomes["failed"] > 0)


def read_report(path: Path) -> tuple[dict[str, str], list[Case]]:
    """Read the time and duration of the tests, and every case of the torture test."""
    root = ElementTree.parse(path).getroot()
    suite = root if root.tag == "testsuite" else root.find("testsuite")
    cases = [_read_case(element) for element in root.iter("testcase") if element.get("name", "").startswith(f"{TEST}[")]
    if suite is None or not cases:
        raise ValueError(f"holds no case of {TEST}")
    seconds = float(suite.get("time", "nan"))
    ended = datetime.datetime.fromisoformat(suite.get("timestamp", "")) + datetime.timedelta(seconds=seconds)
    return {"ended": ended.isoformat(timespec="seconds"), "minutes": f"{seconds / 60:.0f}"}, cases


def _read_case(element: ElementTree.Element) -> Case:
    family, optimizer, zero_grad, circumstance = element.get("name", "")[len(TEST) + 1 : -1].rsplit("-", 3)
    for tag, outcome in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
        if (found := element.find(tag)) is not None:
            return Case(family, optimizer, zero_grad, circumstance, outcome, found.get("message", "").splitlines()[0])
    return Case(family, optimizer, zero_grad, circumstance, "passed", "")


def as_markdown(cases: list[Case], header: str) -> str:
    """Return totals, cases that did not pass with their reasons, and a line for each family."""
    cells: dict[str, dict[str, list[Case]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        cells[case.family][case.circumstance].append(case)
    circumstances = list(dict.fromkeys(case.circumstance for case in cases))
    outcomes = Counter(case.outcome for case in cases)
    optimizers = ", ".join(dict.fromkeys(case.optimizer for case in cases))
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for case in cases:
        if case.outcome != "passed":
            reasons[f"{case.outcome}: {case.reason}"][f"{case.family} ({case.circumstance})"] += 1
    lines = [
        "# Frozen stands still, whatever the loop does",
        "",
        header,
        "",
        f"**{outcomes['passed']}** of {len(cases)} cases passed, {outcomes['failed']} failed, {outcomes['skipped']} "
        f"skipped: {len(cells)} families (the smallest architecture of each below 50 million parameters), each with "
        f"{optimizers}, each of these with `zero_grad` to None and to zeros, under each circumstance "
        "of `tests/helpers/torture.py`. A case passes when after three steps all that is frozen is bit for bit what it "
        "was, and all that should train has moved and has a finite gradient.",
        "",
        *(f"- {reason}: {_count(who)}: {', '.join(sorted(who))}" for reason, who in sorted(reasons.items())),
        "",
        f"| family | {' | '.join(circumstances)} |",
        f"|---|{'--:|' * len(circumstances)}",
        *(
            f"| {family} | {' | '.join(_cell(of_family[circumstance]) for circumstance in circumstances)} |"
            for family, of_family in sorted(cells.items())
        ),
    ]
    return "\n".join(lines) + "\n"


def _count(who: Counter[str]) -> str:
    return f"{who.total()} case{'s' * (who.total() > 1)}"


def _cell(cases: list[Case]) -> str:
    outcomes = Counter(case.outcome for case in cases)
    if outcomes["skipped"] == len(cases):
        return "skipped" if cases else ""
    return f"{outcomes['passed']} of {len(cases)}"


if __name__ == "__main__":
    sys.exit(main())
