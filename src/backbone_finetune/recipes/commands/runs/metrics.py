"""The record of a training run: the contents of ``metrics.json``, and its text."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...data.sources.identical import Copy
from ...training.phases import Phase
from ...training.progress import EpochResult
from .baselines import BackwardTimes


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The record of a run, the contents of ``metrics.json``. Accuracies are shares of images, 0 to 1.

    Values that were not measured are None. The test images are evaluated once, at the end; ``history`` has those of the
    validation images in each epoch, and ``best_epoch`` is the one whose weights were kept, with a monitor.
    ``fold_accuracies`` are those of a cross-validation on the training images, and ``label_issues`` the number of those
    images whose label looks wrong. ``copies`` are images that equal one of another part or target.
    ``test_balanced_accuracy`` is the mean recall of the classes that have test images. If images have labels or values,
    ``objective`` has the thresholds or the scale; accuracies are the share of images whose labels are all correct, or
    None, and metrics are those of the objective. ``feature_precision`` is the precision of the features behind the
    accuracies, if it is not that in which `predict` computes.
    """

    test_accuracy: float | None
    test_metrics: Mapping[str, float] = field(default_factory=dict)
    validation_accuracy: float | None = None
    validation_metrics: Mapping[str, float] = field(default_factory=dict)
    objective: Mapping[str, Any] | None = None
    best_epoch: int | None = None
    fold_accuracies: tuple[float, ...] | None = None
    chance: float | None
    label_issues: int | None = None
    copies: tuple[Copy, ...] = ()
    random_backbone: float | None = None
    nearest_neighbors: float | None = None
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
    validation_images: int
    test_images: int
    skipped_images: tuple[str, ...]
    history: tuple[EpochResult, ...]
    backward_milliseconds: BackwardTimes | None = None
    device: str
    feature_precision: str | None = None
    seconds: float | None = None
    versions: dict[str, str]

    def references(self) -> dict[str, float]:
        """Return the measured baseline accuracies by name."""
        measured = {
            "chance": self.chance,
            "random backbone": self.random_backbone,
            "raw pixels": self.raw_pixels,
            "neighbours": self.nearest_neighbors,
        }
        return {name: accuracy for name, accuracy in measured.items() if accuracy is not None}


def describe(metrics: Metrics) -> str:
    """Format the accuracies and the backward times as text."""
    times, mean = metrics.backward_milliseconds, metrics.test_balanced_accuracy
    explanations = {
        "chance": "always the commonest class",
        "random backbone": "the same classifier on the same network, untrained and frozen",
        "raw pixels": "the same classifier on 32 x 32 pixels",
        "neighbours": "no classifier: a vote of the 20 nearest training images, by their features",
    }
    lines = []
    are_classes = metrics.objective is None
    if are_classes and metrics.validation_accuracy is not None:
        chosen = "" if metrics.best_epoch is None else f", after epoch {metrics.best_epoch}, which they chose"
        line = f"validation       {_decimals(metrics.validation_accuracy)}"
        lines.append(f"{line}  of {metrics.validation_images} images{chosen}")
    if are_classes and metrics.test_accuracy is not None:
        error = math.sqrt(metrics.test_accuracy * (1 - metrics.test_accuracy) / metrics.test_images)
        line = f"test accuracy    {_decimals(metrics.test_accuracy)}"
        precision = f"; features in {metrics.feature_precision}, predict: float32" if metrics.feature_precision else ""
        lines.append(f"{line}  of {metrics.test_images} images, standard error {_decimals(error)}{precision}")
        # With classes of equal size it is the accuracy.
        if mean is not None and not math.isclose(mean, metrics.test_accuracy):
            lines.append(f"balanced         {_decimals(mean)}  mean recall of the classes")
    # The F1 of the epochs is that of thresholds of 0.5, which are not those of the model.
    validation = {name: value for name, value in metrics.validation_metrics.items() if name != "macro_f1"}
    for part, others, count in (
        ("validation", validation, metrics.validation_images),
        ("test", metrics.test_metrics, metrics.test_images),
    ):
        if others:
            shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in others.items())
            lines.append(f"{part:15}  {shown}  of {count} images")
    if metrics.fold_accuracies is not None:
        mean, spread = statistics.mean(metrics.fold_accuracies), statistics.stdev(metrics.fold_accuracies)
        folds = len(metrics.fold_accuracies)
        line = f"{f'{folds} folds':15}  {_decimals(mean)}"
        lines.append(f"{line}  of the training images, standard deviation {_decimals(spread)}")
    if metrics.label_issues is not None:
        line = f"label issues     {metrics.label_issues}"
        lines.append(
            f"{line} of {metrics.train_images} training images have a label that may be wrong; many are only hard"
        )
    references = metrics.references().items()
    lines += [f"{name:15}  {_decimals(value)}  {explanations[name]}" for name, value in references]
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
