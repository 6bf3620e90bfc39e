"""Compare where a classifier on features starts, and at which rate it trains: the default of `train` and others.

OMP_NUM_THREADS=1 python benchmarks/head_start.py
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from harness.results import describe, table
from learning_runs.arms import Outcome
from learning_runs.runs import Done, Report, add_fashion, gain_line, make_parser, parse, run_all, splits_of, spread
from learning_runs.sets import Images
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import Phase, TrainerConfig, evaluate, fine_tune, fit_heads, make_accelerator
from backbone_finetune.recipes.models.file import build_transform
from backbone_finetune.recipes.models.weights import load_packaged_network

DEFAULT = "default"
ARMS = [DEFAULT, "0.001", "0.0003 from zero", "32 heads"]
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
WEIGHT_DECAYS = (0.0, 0.01, 0.1, 1.0)
BATCH, EPOCHS = 32, 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Train in all ways on all splits; results are written after each, and a stopped run resumes."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return run_all(__file__, given, parse_arguments(given), measure, as_markdown)


def measure(options: argparse.Namespace, done: Done) -> Iterator[Outcome]:
    """Yield the outcome of each way that is not done."""
    network = FineTuneModel.from_timm(load_packaged_network(), num_classes=10)
    network.to(memory_format=torch.channels_last).freeze_backbone().eval()
    size = (3, options.image_size, options.image_size)
    config = resolve_model_data_config(network, args={"input_size": size})  # type: ignore[no-untyped-call]
    for seed, data, draw in splits_of(options):
        arms = [arm for arm in options.arms if (data, seed, arm) not in done]
        if arms:
            train, test = (extract(network.backbone, images, config) for images in draw())
        for arm in arms:
            torch.manual_seed(seed)
            head = nn.Linear(train.tensors[0].shape[1], 10)
            started = time.process_time()
            trained = train_head(arm, head, train, seed)
            seconds = time.process_time() - started
            accuracy = evaluate(trained, test, settings(seed)).accuracy
            assert accuracy is not None
            yield Outcome(arm, data, seed, {"plain": accuracy}, seconds)


def settings(seed: int) -> TrainerConfig:
    """Return the settings of each training."""
    accelerator = make_accelerator(torch.device("cpu"))
    return TrainerConfig(accelerator, BATCH, seed=seed, autocast_features=False, show_progress=False)


@torch.inference_mode()
def extract(backbone: nn.Module, images: Images, config: dict[str, object]) -> TensorDataset:
    """Compute the features of images, ``(N, D)``."""
    transform = build_transform(config)
    shown = torch.stack([transform(image) for image in images.images]).contiguous(memory_format=torch.channels_last)
    features: list[Tensor] = [backbone(batch).float() for batch in torch.split(shown, BATCH)]
    return TensorDataset(torch.cat(features).clone(), images.targets)


def train_head(arm: str, head: nn.Linear, train: TensorDataset, seed: int) -> FineTuneModel:
    """Train a classifier on features in one way."""
    model, phase = FineTuneModel(nn.Identity(), head), Phase(epochs=EPOCHS, lr=1e-3)
    if arm == DEFAULT:
        phase = Phase(epochs=EPOCHS)
    elif arm == "0.0003 from zero":
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        phase = Phase(epochs=EPOCHS, lr=3e-4)
    elif arm == "32 heads":
        phase = choose_rates(head, train, seed)
    fine_tune(model, train, None, [phase], settings(seed))
    return model


def choose_rates(head: nn.Linear, train: TensorDataset, seed: int) -> Phase:
    """Return the rates with the lowest loss on a fifth of the training images."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    parts = [
        TensorDataset(*(tensor[rows] for tensor in train.tensors)) for rows in order.tensor_split([len(order) // 5])
    ]
    heads = fit_heads(
        copy.deepcopy(head),
        parts[1],
        parts[0],
        learning_rates=LEARNING_RATES,
        weight_decays=WEIGHT_DECAYS,
        epochs=EPOCHS,
        batch_size=BATCH,
        seed=seed,
        show_progress=False,
    )
    best = min(heads, key=lambda result: result.validation_loss)
    return Phase(epochs=EPOCHS, lr=best.lr, weight_decay=best.weight_decay)


def as_markdown(report: Report) -> str:
    """Return the report as a page to read."""
    parts = ["# Where a classifier on features starts\n", describe(report)]
    for data, outcomes in report.by_set().items():
        arms = [[outcome for outcome in outcomes if outcome.arm == arm] for arm in ARMS]
        lines = [
            [
                own[0].arm,
                spread([outcome.accuracy["plain"] for outcome in own], ".3f"),
                spread([outcome.cpu_seconds for outcome in own], ".2f"),
            ]
            for own in arms
            if own
        ]
        gains = [line for arm in ARMS[1:] if (line := gain_line(outcomes, DEFAULT, arm)) is not None]
        parts += [f"## {data}\n", table(["", "test accuracy", "CPU seconds"], lines), ""]
        parts += [table(["the first / the second", "gain in accuracy", "splits won"], gains), ""]
    return "\n".join([*parts, _HOW_TO_READ])


_HOW_TO_READ = """\
EfficientNet-Lite0 with its ImageNet weights, float32. Mean ± standard deviation over splits: divided by the square root
of their number, it is the standard error of the mean. All ways have the same splits, features, order of images, AdamW
with weight decay 0.01, 30 epochs in batches of 32, and keep the last epoch.

- `default`: that of `train`. The classifier starts from weights of 0, and trains at 0.3 / (1 + the mean sum of an
  image's absolute features).
- `0.001`: at that rate from random weights, `train --lr 0.001`.
- `0.0003 from zero`: at that rate from weights of 0, for features of any size.
- `32 heads`: from random weights, at the learning rate and weight decay of 32 pairs that have the lowest loss on a
  fifth of the training images.
- CPU seconds are of one thread, without the pass of the backbone. Other work on the machine makes them longer.
"""


def parse_arguments(given: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__, ARMS, stem="head_start")
    add_fashion(parser, train=200, test=500)
    parser.set_defaults(splits=10)
    return parse(parser, given)


if __name__ == "__main__":
    sys.exit(main())
