"""The record of a training run: what ``metrics.json`` holds, and what is printed of it."""

import math
from dataclasses import dataclass
from typing import Any

from ..training.checkpoints import EpochResult
from ..training.phases import Phase
from .timing import BackwardTimes

__all__ = ["Metrics", "describe"]


@dataclass(frozen=True)
class Metrics:
    """The record of a run, as ``metrics.json`` holds it. Accuracies are shares of the test images, 0 to 1.

    ``random_backbone``, ``raw_pixels`` and ``backward_milliseconds`` are None where no baselines were wanted.

    >>> next(iter(Metrics.__dataclass_fields__))
    'test_accuracy'
    """

    test_accuracy: float
    chance: float
    random_backbone: float | None
    raw_pixels: float | None
    architecture: str
    weights: str
    phases: tuple[Phase, ...]
    batch_size: int
    seed: int
    processes: int
    data_config: dict[str, Any]
    class_names: tuple[str, ...]
    train_images: int
    test_images: int
    skipped_images: tuple[str, ...]
    history: tuple[EpochResult, ...]
    backward_milliseconds: BackwardTimes | None
    device: str
    seconds: float
    versions: dict[str, str]

    def references(self) -> dict[str, float]:
        """Name the accuracies that this run's is held against."""
        named = {"chance": self.chance, "random backbone": self.random_backbone, "raw pixels": self.raw_pixels}
        return {name: accuracy for name, accuracy in named.items() if accuracy is not None}


def describe(metrics: Metrics) -> str:
    """Write the accuracies and the backward times as lines to read.

    >>> describe(
    ...     Metrics(0.7, 0.17, 0.3, 0.4, "resnet18", "", (Phase(),), 32, 0, 1, {}, (), 0, 200, (), (),
    ...     BackwardTimes(120.0, 0.5, 0.4, 16), "cpu", 9.0, {})
    ... ).splitlines()[0]
    'test accuracy    .700  of 200 images, standard error .032'
    """
    share = metrics.test_accuracy
    standard_error = math.sqrt(share * (1 - share) / metrics.test_images)

    def decimals(value: float) -> str:
        return f"{value:.3f}".removeprefix("0")

    lines = [
        f"test accuracy    {decimals(share)}  of {metrics.test_images} images, "
        f"standard error {decimals(standard_error)}",
        f"chance           {decimals(metrics.chance)}  always the commonest class",
    ]
    if metrics.random_backbone is not None:
        lines.append(
            f"random backbone  {decimals(metrics.random_backbone)}  the same classifier on the same network, "
            "untrained and frozen"
        )
    if metrics.raw_pixels is not None:
        lines.append(f"raw pixels       {decimals(metrics.raw_pixels)}  the same classifier on 32 x 32 pixels")
    if (times := metrics.backward_milliseconds) is not None:
        groups = metrics.phases[-1].trainable_groups
        frozen = "frozen" if groups == 0 else f"frozen but for {groups} layer groups"
        lines.append(
            f"backward         {times.frozen:.2f} ms {frozen}, {times.unfrozen:.1f} ms unfrozen, "
            f"{times.classifier_alone:.2f} ms the classifier alone ({times.batch_size} images, {metrics.device})"
        )
    if skipped := len(metrics.skipped_images):
        lines.append(f"skipped          {skipped} broken image{'s' * (skipped > 1)}, named above")
    return "\n".join(lines)
