"""The record of a training run: what ``metrics.json`` holds, and what is printed of it."""

import math
from dataclasses import dataclass
from typing import Any

from ..training.checkpoints import EpochResult
from ..training.phases import Phase
from .baselines import BackwardTimes

__all__ = ["Metrics", "describe"]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The record of a run, as ``metrics.json`` holds it. Accuracies are shares of the test images, 0 to 1.

    Baselines that were not measured are None. ``feature_precision`` is the precision of the features behind
    ``test_accuracy``, where it is not the one that ``predict`` computes in. ``test_balanced_accuracy`` is the mean
    recall of the classes that have test images.
    """

    test_accuracy: float
    chance: float
    random_backbone: float | None = None
    raw_pixels: float | None = None
    test_balanced_accuracy: float | None = None
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
    backward_milliseconds: BackwardTimes | None = None
    device: str
    feature_precision: str | None
    seconds: float | None = None
    versions: dict[str, str]

    def references(self) -> dict[str, float]:
        """Name the accuracies that this run's is compared with, those that were measured."""
        measured = {"chance": self.chance, "random backbone": self.random_backbone, "raw pixels": self.raw_pixels}
        return {name: accuracy for name, accuracy in measured.items() if accuracy is not None}


def describe(metrics: Metrics) -> str:
    """Write the accuracies and the backward times as lines to read."""
    share, times = metrics.test_accuracy, metrics.backward_milliseconds
    standard_error = math.sqrt(share * (1 - share) / metrics.test_images)
    explanations = {
        "chance": "always the commonest class",
        "random backbone": "the same classifier on the same network, untrained and frozen",
        "raw pixels": "the same classifier on 32 x 32 pixels",
    }
    precision = f"; features in {metrics.feature_precision}, predict: float32" if metrics.feature_precision else ""
    mean = metrics.test_balanced_accuracy  # where the classes are of one size it is the accuracy
    line = "balanced         {}  mean recall of the classes"
    balanced = [] if mean is None or math.isclose(mean, share) else [line.format(_decimals(mean))]
    lines = [
        f"test accuracy    {_decimals(share)}  of {metrics.test_images} images, "
        f"standard error {_decimals(standard_error)}{precision}",
        *balanced,
        *(f"{name:15}  {_decimals(value)}  {explanations[name]}" for name, value in metrics.references().items()),
    ]
    if times is not None:
        groups = metrics.phases[-1].trainable_groups
        frozen = "frozen" if groups == 0 else f"frozen but for {groups} layer groups"
        lines.append(
            f"backward         {times.frozen:.2f} ms {frozen}, {times.unfrozen:.1f} ms unfrozen, "
            f"{times.classifier_alone:.2f} ms the classifier alone ({times.batch_size} images, {metrics.device})"
        )
    if skipped := len(metrics.skipped_images):
        lines.append(f"skipped          {skipped} broken image{'s' * (skipped > 1)}, named above")
    return "\n".join(lines)


def _decimals(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")
