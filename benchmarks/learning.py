"""Measure accuracy on few images: fixed or trainable running statistics, cached views, and test-time views.

OMP_NUM_THREADS=1 python benchmarks/learning.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from harness.cuda import Fact
from harness.environment import describe_command, describe_environment
from harness.options import make_writable, positive
from harness.results import describe, table, write_text
from learning_runs.arms import ARMS, BACKBONE_LR, BATCH, HEAD_LR, WEIGHT_DECAY, Outcome, Plan, run_split
from learning_runs.sets import FASHION, Images, make_views, split_clipart, split_fashion
from timm.data.config import resolve_model_data_config

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes.models.weights import load_packaged_network

PAIRS = (  # what is compared on the same splits: the first against the second
    ("three groups, 1 view", "three groups, 1 view, BatchNorm trains"),
    ("three groups, 8 views", "three groups, 8 views, BatchNorm trains"),
    ("everything at once, fresh views", "everything at once, fresh views, BatchNorm trains"),
    ("frozen head", "the article's recipe"),
    ("three groups, 1 view", "frozen head"),
    ("frozen head, 8 views", "frozen head"),
    ("three groups, 4 views", "three groups, 1 view"),
    ("three groups, 8 views", "three groups, 1 view"),
    ("three groups, fresh views", "three groups, 8 views"),
    ("three groups, 8 views", "everything at once, fresh views"),
)


@dataclass
class LearningReport:
    """All that one command measured."""

    environment: dict[str, Fact]
    command: str
    settings: dict[str, Fact]
    outcomes: list[Outcome] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train all arms on all splits; results are written after each, and a stopped run resumes."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_arguments(given)
    torch.set_num_threads(1)
    settings: dict[str, Fact] = {name: value for name, value in vars(options).items() if isinstance(value, int)}
    settings |= {"batch_size": BATCH, "head_lr": HEAD_LR, "backbone_lr": BACKBONE_LR, "weight_decay": WEIGHT_DECAY}
    environment = describe_environment(torch.device("cpu"))
    report = LearningReport(environment, describe_command(__file__, given), settings)
    try:
        report.outcomes += read_outcomes(options.output.with_suffix(".json"), settings)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for outcome in measure(options, {(outcome.data, outcome.seed, outcome.arm) for outcome in report.outcomes}):
        report.outcomes.append(outcome)
        print(f"{outcome.accuracy['plain']:.3f} {outcome.data} {outcome.seed}: {outcome.arm}", flush=True)
        write_report(report, options.output)
    write_report(report, options.output)
    return 0


def read_outcomes(path: Path, settings: dict[str, Fact]) -> list[Outcome]:
    """Read the results of a stopped run; raise ValueError if its settings differ."""
    if not path.is_file():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["settings"] != settings:
        raise ValueError(f"{path} has results of other settings, {content['settings']}: pass another --output.")
    return [Outcome(**outcome) for outcome in content["outcomes"]]


def write_report(report: LearningReport, stem: Path) -> None:
    """Write `stem`.json with every outcome, `stem`.md to read."""
    write_text(stem.with_suffix(".json"), json.dumps(asdict(report), indent=1) + "\n")
    write_text(stem.with_suffix(".md"), as_markdown(report))


def measure(options: argparse.Namespace, done: Container[tuple[str, int, str]]) -> Iterator[Outcome]:
    """Return the outcome of each arm that is not done, one split of each set after the other."""
    size = (3, options.image_size, options.image_size)
    views = make_views(resolve_model_data_config(load_packaged_network(), args={"input_size": size}))  # type: ignore[no-untyped-call]
    plan = Plan(options.head_epochs, options.backbone_epochs)
    draw: dict[str, Callable[[int], tuple[Images, Images]]] = {
        "clipart": split_clipart,
        "Fashion-MNIST": partial(split_fashion, options.fashion_mnist, options.fashion_train, options.fashion_test),
    }
    for seed in range(options.splits):
        for data in options.sets:
            arms = [arm for arm in ARMS if arm.name in options.arms and (data, seed, arm.name) not in done]
            torch.manual_seed(seed)
            model = FineTuneModel.from_timm(load_packaged_network(), num_classes=10).freeze_backbone()
            yield from run_split(data, seed, draw[data](seed), arms, network=model, views=views, plan=plan)


def as_markdown(report: LearningReport) -> str:
    """Return the report as a page to read."""
    parts = ["# What is learnt on few images\n", describe(report)]
    for data in dict.fromkeys(outcome.data for outcome in report.outcomes):
        outcomes = [outcome for outcome in report.outcomes if outcome.data == data]
        parts += [f"## {data}\n", accuracy_table(outcomes), "", pair_table(outcomes), ""]
    return "\n".join([*parts, _HOW_TO_READ])


def accuracy_table(outcomes: Sequence[Outcome]) -> str:
    """Format a line for each arm."""
    lines = []
    for arm in dict.fromkeys(outcome.arm for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.arm == arm]
        plain = [outcome.accuracy["plain"] for outcome in own]
        gains = [
            [outcome.accuracy[name] - outcome.accuracy["plain"] for outcome in own] for name in ("mirror", "views")
        ]
        by_split = ", ".join(f"{accuracy:.3f}" for accuracy in plain)
        seconds = spread([outcome.cpu_seconds for outcome in own], ".1f")
        lines.append([arm, spread(plain, ".3f"), by_split, *(spread(gain, "+.3f") for gain in gains), seconds])
    return table(["", "test accuracy", "by split", "mirror", "mirror and views", "CPU seconds"], lines)


def pair_table(outcomes: Sequence[Outcome]) -> str:
    """Format what arms gain over others on the same splits."""
    lines = []
    for challenger, champion in PAIRS:
        ours, theirs = (
            {outcome.seed: outcome.accuracy["plain"] for outcome in outcomes if outcome.arm == arm}
            for arm in (challenger, champion)
        )
        gains = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
        if gains:
            won = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
            lines.append([f"{challenger} / {champion}", spread(gains, "+.3f"), won])
    return table(["the first / the second", "gain in accuracy", "splits won"], lines)


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation over splits."""
    deviation = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


_HOW_TO_READ = """\
EfficientNet-Lite0 with its ImageNet weights, float32. Mean ± standard deviation over splits; all arms have the same
splits, first classifier, order of images and test images. AdamW at constant rates; Adam for the article's recipe.

- `three groups`: a head on plain images first, then the last three layer groups with it.
- `1 view`: each image as it is. `4 views`, `8 views`: so many seeded augmentations (crop, mirror, colour), of which the
  frontier is cached; epoch e shows view (e + index) mod K. `fresh views`: new ones in each epoch, nothing is cached.
- Running statistics stand still, unless a row says `BatchNorm trains`. The article's recipe trains a head with all
  modules in train mode.
- `mirror`, `mirror and views`: what the accuracy gains when the test averages the probabilities of the image and its
  mirror image, and of two augmentations besides.
- CPU seconds are of one thread, for all of the training of an arm, reading files left out. Other work on the machine
  makes them longer.
"""


def parse_arguments(given: Sequence[str]) -> argparse.Namespace:
    """Read the command line; ends with an error where files are missing or nothing can be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    names = [arm.name for arm in ARMS]
    add("--sets", nargs="+", choices=["clipart", "Fashion-MNIST"], default=["clipart", "Fashion-MNIST"])
    add("--arms", nargs="+", choices=names, default=names, metavar="NAME", help="ways to train, of those in the page")
    add("--fashion-mnist", type=Path, default=FASHION, metavar="DIR", help="where the Debian package puts its files")
    add("--fashion-train", type=positive, default=200, metavar="N")
    add("--fashion-test", type=positive, default=400, metavar="N")
    add("--splits", type=positive, default=3, metavar="N")
    add("--head-epochs", type=positive, default=20, metavar="N")
    add("--backbone-epochs", type=positive, default=10, metavar="N")
    add("--image-size", type=positive, default=96, metavar="N")
    add("--output", type=Path, default=Path(__file__).parent / "results" / "learning", metavar="STEM")
    options = parser.parse_args(given)
    try:
        make_writable(options.output.parent)
        if "Fashion-MNIST" in options.sets:
            split_fashion(options.fashion_mnist, 10, 10, 0)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    return options


if __name__ == "__main__":
    sys.exit(main())
