"""Compare `train --tune` with plain fine-tuning and with a frozen backbone, on two sets of few real images.

OMP_NUM_THREADS=1 python benchmarks/tuning.py
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from harness.results import describe, table
from learning_runs.arms import Outcome
from learning_runs.runs import Done, Report, add_fashion, gain_line, make_parser, parse, run_all, splits_of, spread
from learning_runs.sets import Images
from timm.data.config import resolve_model_data_config

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import (
    Augmentation,
    ImageDataset,
    LabelledFolder,
    Phase,
    TrainerConfig,
    evaluate,
    fine_tune,
    make_accelerator,
)
from backbone_finetune.recipes.models.file import build_transform
from backbone_finetune.recipes.models.weights import load_packaged_network
from backbone_finetune.recipes.training.phases import tuning_phases

PLAIN_RATES = (3e-4, 1e-3, 1e-4)
PLAIN = [f"plain, {rate:g}" for rate in PLAIN_RATES]
LIGHT = "plain, 0.0003, light"
ARMS = ["frozen head", "tune", *PLAIN, LIGHT, "tune, same images", "two phases", "two phases, same images"]


def ways(num_images: int, model: FineTuneModel) -> dict[str, tuple[Phase, ...]]:
    """Return the phases of each way to train, by name."""
    tuned = tuning_phases(num_images, model)
    # One and a half times as long as each phase of the tuning, which takes as much time as both.
    epochs = round(1.5 * tuned[-1].epochs)
    everything = Phase(epochs, len(model.layer_groups), lr=1e-3, warmup_epochs=1, cosine=True)
    drawn = replace(everything, augment=Augmentation.LIGHT, backbone_lr=3e-4)
    return {
        "frozen head": tuned[:1],
        "tune": tuned,
        **{name: (replace(everything, backbone_lr=rate),) for name, rate in zip(PLAIN, PLAIN_RATES, strict=True)},
        LIGHT: (drawn,),
        "tune, same images": tuple(replace(phase, augment=None) for phase in tuned),
        "two phases": (tuned[0], drawn),
        "two phases, same images": (tuned[0], replace(drawn, augment=None)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Train in all ways on all splits; results are written after each, and a stopped run resumes."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return run_all(__file__, given, parse_arguments(given), measure, as_markdown)


def measure(options: argparse.Namespace, done: Done) -> Iterator[Outcome]:
    """Yield the outcome of each way that is not done."""
    size = (3, options.image_size, options.image_size)
    config = resolve_model_data_config(load_packaged_network(), args={"input_size": size})  # type: ignore[no-untyped-call]
    for seed, data, draw in splits_of(options):
        torch.manual_seed(seed)
        network = FineTuneModel.from_timm(load_packaged_network(), num_classes=10)
        network.to(memory_format=torch.channels_last)  # a step then takes two thirds of the time
        with TemporaryDirectory() as folder:
            train, test = (
                write_images(Path(folder, name), images, build_transform=partial(build_transform, config))
                for name, images in zip(("train", "test"), draw(), strict=True)
            )
            for name, phases in ways(len(train), network).items():
                if name in options.arms and (data, seed, name) not in done:
                    accuracy, seconds = run(network, train, test, phases, seed)
                    yield Outcome(name, data, seed, {"plain": accuracy}, seconds)


def write_images(
    folder: Path, images: Images, *, build_transform: Callable[..., Callable[..., torch.Tensor]]
) -> ImageDataset:
    """Write images to files, which `ImageDataset` reads."""
    folder.mkdir()
    paths = tuple(folder / f"{index}.png" for index in range(len(images.images)))
    for path, image in zip(paths, images.images, strict=True):
        image.save(path)
    names = tuple(str(target) for target in range(10))
    found = LabelledFolder(folder, names, paths, tuple(images.targets.tolist()))
    return ImageDataset(found, build_transform(), augment=build_transform)


def run(
    network: FineTuneModel, train: ImageDataset, test: ImageDataset, phases: Sequence[Phase], seed: int
) -> tuple[float, float]:
    """Train a copy of a network; return its test accuracy after the last epoch, and the CPU seconds of training."""
    model, started = copy.deepcopy(network), time.process_time()
    config = TrainerConfig(make_accelerator(torch.device("cpu")), seed=seed, workers=0, show_progress=False)
    fine_tune(model, train, None, phases, config)
    seconds = time.process_time() - started
    accuracy = evaluate(model, test, config).accuracy
    assert accuracy is not None
    return accuracy, seconds


def as_markdown(report: Report) -> str:
    """Return the report as a page to read."""
    parts = ["# Head, last groups, everything: `train --tune`\n", describe(report)]
    for data, outcomes in report.by_set().items():
        parts += [f"## {data}\n", accuracy_table(outcomes), "", gain_table(outcomes), ""]
    return "\n".join([*parts, _HOW_TO_READ])


def accuracy_table(outcomes: Sequence[Outcome]) -> str:
    """Format a line for each way to train."""
    lines = []
    for arm in ARMS:
        own = sorted((outcome for outcome in outcomes if outcome.arm == arm), key=lambda outcome: outcome.seed)
        if own:
            accuracies = [outcome.accuracy["plain"] for outcome in own]
            by_split = ", ".join(f"{accuracy:.3f}" for accuracy in accuracies)
            seconds = [outcome.cpu_seconds for outcome in own]
            lines.append([arm, spread(accuracies, ".3f"), by_split, spread(seconds, ".0f")])
    return table(["", "test accuracy", "by split", "CPU seconds"], lines)


def gain_table(outcomes: Sequence[Outcome]) -> str:
    """Format what `tune` gains over each other way on the same splits."""
    others = (arm for arm in ARMS if arm != "tune")
    lines = [line for arm in others if (line := gain_line(outcomes, "tune", arm)) is not None]
    return table(["the first / the second", "gain in accuracy", "splits won"], lines)


_HOW_TO_READ = """\
EfficientNet-Lite0 with its ImageNet weights, float32. Mean ± standard deviation over splits; all ways have the same
splits, first classifier, order of images and test images, and keep the last epoch.

- `frozen head`: a head on features, from weights of 0 at the default rate.
- `tune`: that head, then `tuning_phases`: the last third of the layer groups, then everything, on new crops and mirror
  images in each epoch (`Augmentation.LIGHT`).
- `plain, R`: everything from the start, at rate R for the backbone and 1e-3 for the classifier, one epoch of warm-up,
  cosine, in one and a half times the epochs of each phase of `tune`, on the images themselves; with `light`, on crops
  and mirror images.
- `tune, same images`: `tune` on the images themselves.
- `two phases`: the head, then everything as in `plain, 0.0003, light`; with `same images`, as in `plain, 0.0003`.
- CPU seconds are of one thread, for all of the training, reading images included. Other work on the machine makes
  them longer.
"""


def parse_arguments(given: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__, ARMS, stem="tuning")
    add_fashion(parser, train=500, test=500)
    return parse(parser, given)


if __name__ == "__main__":
    sys.exit(main())
