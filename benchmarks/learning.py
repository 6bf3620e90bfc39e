"""Measure accuracy on few images: fixed or trainable running statistics, cached views, and test-time views.

OMP_NUM_THREADS=1 python benchmarks/learning.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch
from harness.options import positive
from harness.results import describe, table
from learning_runs.arms import ARMS, BACKBONE_LR, BATCH, HEAD_LR, WEIGHT_DECAY, Outcome, Plan, run_split
from learning_runs.runs import Done, Report, add_fashion, gain_line, make_parser, parse, run_all, splits_of, spread
from learning_runs.sets import make_views
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Train all arms on all splits; results are written after each, and a stopped run resumes."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    rates = {"batch_size": BATCH, "head_lr": HEAD_LR, "backbone_lr": BACKBONE_LR, "weight_decay": WEIGHT_DECAY}
    return run_all(__file__, given, parse_arguments(given), measure, as_markdown, **rates)


def measure(options: argparse.Namespace, done: Done) -> Iterator[Outcome]:
    """Return the outcome of each arm that is not done."""
    size = (3, options.image_size, options.image_size)
    views = make_views(resolve_model_data_config(load_packaged_network(), args={"input_size": size}))  # type: ignore[no-untyped-call]
    plan = Plan(options.head_epochs, options.backbone_epochs)
    for seed, data, draw in splits_of(options):
        arms = [arm for arm in ARMS if arm.name in options.arms and (data, seed, arm.name) not in done]
        torch.manual_seed(seed)
        model = FineTuneModel.from_timm(load_packaged_network(), num_classes=10).freeze_backbone()
        yield from run_split(data, seed, draw(), arms, network=model, views=views, plan=plan)


def as_markdown(report: Report) -> str:
    """Return the report as a page to read."""
    parts = ["# What is learnt on few images\n", describe(report)]
    for data, outcomes in report.by_set().items():
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
    lines = [line for first, second in PAIRS if (line := gain_line(outcomes, first, second)) is not None]
    return table(["the first / the second", "gain in accuracy", "splits won"], lines)


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
    """Read the command line."""
    parser = make_parser(__doc__, [arm.name for arm in ARMS], stem="learning")
    add_fashion(parser, train=200, test=400)
    parser.add_argument("--head-epochs", type=positive, default=20, metavar="N")
    parser.add_argument("--backbone-epochs", type=positive, default=10, metavar="N")
    return parse(parser, given)


if __name__ == "__main__":
    sys.exit(main())
