"""List which networks have a frontier or why not, what is kept, and compare training on it with the whole network.

    OMP_NUM_THREADS=1 python benchmarks/frontier_zoo.py

Each family of timm below 50 M parameters, and networks of torchvision, transformers and open_clip where these are
installed; with the last two layer groups trainable, and with half of them. An interrupted run resumes:
results are in a `.jsonl` next to the output, which is deleted when the page is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from harness.environment import describe_command, describe_environment, installed_version
from harness.results import table, write_text
from tqdm import tqdm
from zoo.frontier_cases import IMAGES, STEPS, Case, examine
from zoo.frontier_networks import Subject, subjects

BESIDE_TIMM = frozenset({"torchvision", "transformers", "open_clip"})


def main() -> None:
    """Examine the remaining networks, then write the page."""
    options = parse_arguments()
    torch.set_num_threads(1)
    log = options.output.with_suffix(".jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    chosen = [subject for subject in subjects() if not options.names or subject.name in options.names]
    cases = read_cases(log)
    left = [subject.name for subject in chosen]
    try:
        for subject in tqdm(chosen):
            for case in examine_both(subject, cases):
                cases[case.family, case.network, case.trainable] = case
                with log.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(vars(case)) + "\n")
            left.remove(subject.name)
    except KeyboardInterrupt:
        print(f"interrupted; the next run goes on from {log}")
    facts = {"command": describe_command(__file__, sys.argv[1:]), **describe_environment(torch.device("cpu"))}
    for package in ("torchvision", "transformers", "open_clip_torch"):
        facts[package] = installed_version(package)
    write_text(options.output.with_suffix(".md"), as_markdown(list(cases.values()), facts, left))
    if not left:
        log.unlink(missing_ok=True)


def examine_both(subject: Subject, done: dict[tuple[str, str, int], Case]) -> list[Case]:
    """Examine one network with two groups trainable and with half of them, unless that is done."""
    torch.manual_seed(0)
    model = subject.build()
    splits = sorted({min(2, len(model.layer_groups)), len(model.layer_groups) // 2})
    key = (subject.family, subject.name)
    return [examine(*key, subject.side, model, split) for split in splits if (*key, split) not in done]


def read_cases(log: Path) -> dict[tuple[str, str, int], Case]:
    """Read the results of earlier runs; a truncated last line is dropped."""
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        log.write_text(whole, encoding="utf-8")
    cases = [Case(**{**fields, "kept": tuple(fields["kept"])}) for fields in map(json.loads, whole.splitlines())]
    return {(case.family, case.network, case.trainable): case for case in cases}


def as_markdown(cases: Sequence[Case], facts: Mapping[str, object], left: Sequence[str]) -> str:
    """Return totals, refusals, and a line for each case; `left` was not examined."""
    timm = [case for case in cases if case.family not in BESIDE_TIMM]
    refused = [f"- {case.network}, {case.trainable} of {case.groups}: {case.refused}" for case in cases if case.refused]
    sections = [
        "# The frontier over networks",
        "\n".join(f"- {name}: {value}" for name, value in facts.items() if value is not None),
        f"Each network trains {STEPS} steps of {IMAGES} images on its frontier, recorded before the first step, and "
        "whole, from the same start. *Logits* and *gradients* are the largest difference in all steps, relative to the "
        "largest value of their tensor; *equal* means that all bits are, and *state* that all parameters and "
        "buffers are after the steps. *Step* is CPU time of forward and backward on the frontier, of that of the whole "
        "network, at this image size, where what each call costs in Python weighs more than at 224. *Native* is "
        "what is kept for an image at the network's own size.",
        f"timm: {_count(timm)}\n\nother libraries: {_count([case for case in cases if case.family in BESIDE_TIMM])}",
        *([f"**Interrupted.** Not examined yet: {', '.join(left)}."] if left else []),
        "## Refused",
        "\n".join(refused) or "None.",
        "## All",
        table(HEADER, [_line(case) for case in cases]),
    ]
    return "\n\n".join(sections) + "\n"


HEADER = ("family", "network", "side", "trainable", "kept", "kB", "native kB", "logits", "gradients", "state", "step")


def _count(cases: Sequence[Case]) -> str:
    families = {case.family if case.family not in BESIDE_TIMM else case.network for case in cases}
    unsound = {case.family if case.family not in BESIDE_TIMM else case.network for case in cases if case.refused}
    sound = [case for case in cases if not case.refused]
    equal = [case for case in sound if case.logits_difference == case.gradients_difference == 0 and case.state_is_equal]
    return (
        f"{len(families) - len(unsound)} of {len(families)} networks have a frontier at both depths; "
        f"{len(sound)} of {len(cases)} cases are sound, and {len(equal)} of those equal the whole network bit for bit."
    )


def _line(case: Case) -> list[str]:
    start = [case.family, case.network, str(case.side), f"{case.trainable} of {case.groups}"]
    if case.refused:
        return [*start, "none", *["-"] * 6]
    kept = "; ".join(line.rpartition(",")[0] for line in case.kept)
    return [
        *start,
        kept,
        f"{case.bytes_per_image / 1000:.1f}",
        case.native or "-",
        _as_difference(case.logits_difference),
        _as_difference(case.gradients_difference),
        "equal" if case.state_is_equal else "differs",
        f"{case.share_of_step:.2f}",
    ]


def _as_difference(value: float | None) -> str:
    return "equal" if value == 0 else f"{value:.1e}"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks (default: all)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "frontier_zoo")
    return parser.parse_args()


if __name__ == "__main__":
    main()
