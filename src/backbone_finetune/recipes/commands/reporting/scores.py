"""How a model does on labelled images: the figures of all of them, and of each class, label or value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy
import torch

from ...data.sources.rows import ALL
from ...objectives import metrics
from ...objectives.kinds import MultiLabel, SingleLabel
from .figures import Answers, Interval, bootstrap, calibration_interval, chance_calibration_error, count_images


@dataclass(frozen=True)
class ClassScore:
    """Counts for one class: images of it (``support``), images predicted as it, and those of both (``correct``)."""

    name: str
    support: int
    predicted: int
    correct: int
    precision: float | None  # correct / predicted, None for 0 / 0
    recall: float | None  # correct / support
    f1: float | None
    auroc: float | None  # of this class against all others; None without images of both

    def words(self) -> dict[str, str]:
        """Return the figures in words, by name."""
        shares = {"precision": self.precision, "recall": self.recall, "F1": self.f1, "AUROC": self.auroc}
        return {"images": f"{self.support:,}", **{name: _decimals(share) for name, share in shares.items()}}


@dataclass(frozen=True)
class Evaluation:
    """How a model does on images: ``confusion[i][j]`` images of class ``i`` were predicted as class ``j``.

    ``calibration_error`` is the expected one (Guo et al. 2017): the mean distance of confidence and accuracy. A
    perfectly calibrated model stays below ``calibration_error_by_chance`` in 95 of 100 cases.
    """

    accuracy: float
    accuracy_interval: Interval
    balanced_accuracy: float  # the mean recall of the classes that have images
    calibration_error: float
    calibration_error_interval: Interval
    calibration_error_by_chance: float
    images: int
    classes: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]
    answers: Answers = field(repr=False, compare=False)
    missing_classes: tuple[str, ...] = ()
    skipped_images: tuple[str, ...] = ()
    neighbor_accuracy: Interval | None = None  # of a vote of the 20 nearest training images
    split: str = ALL  # which images of the data these are

    def figures(self) -> dict[str, str]:
        """Return the figures of all images in words, by name."""
        by_chance = f"{self.calibration_error_by_chance:.3f}"
        figures = {
            "accuracy": f"{self.accuracy_interval} of {count_images(self.images, self.split)}",
            "calibration error": f"{self.calibration_error_interval}, the mean distance of confidence and accuracy; "
            f"on {self.images:,} images, up to {by_chance} can be chance",
        }
        if len({score.support for score in self.classes if score.support}) > 1:
            figures["balanced accuracy"] = f"{self.balanced_accuracy:.3f}, the mean recall of the classes"
        if self.neighbor_accuracy is not None:
            figures["neighbours"] = f"{self.neighbor_accuracy}, by a vote of the 20 nearest training images"
        if self.skipped_images:
            figures["skipped"] = f"{len(self.skipped_images):,} images that cannot be read"
        if self.missing_classes:
            figures["without images"] = ", ".join(self.missing_classes)
        return figures

    def describe(self) -> str:
        """Format the evaluation as a table by class and a summary."""
        return _tabulate("class", self.classes, self.figures())


@dataclass(frozen=True)
class LabelScore:
    """Counts and metrics of one label: ``support`` images have it, ``predicted`` are given it, ``correct`` are both."""

    name: str
    threshold: float
    support: int
    predicted: int
    correct: int
    f1: float | None  # None if no image has the label
    average_precision: float | None
    auroc: float | None  # None unless some images have the label and others have not

    def words(self) -> dict[str, str]:
        """Return the figures in words, by name."""
        return {
            "images": f"{self.support:,}",
            "F1": _decimals(self.f1),
            "threshold": f"{self.threshold:.2f}",
            "average precision": _decimals(self.average_precision),
            "AUROC": _decimals(self.auroc),
        }


@dataclass(frozen=True)
class ValueScore:
    """The mean absolute error of one output, in its own units, and R squared."""

    name: str
    mean_absolute_error: float
    r2: float

    def words(self) -> dict[str, str]:
        """Return the figures in words, by name."""
        return {"mean absolute error": f"{self.mean_absolute_error:.4g}", "R squared": f"{self.r2:.3f}"}


@dataclass(frozen=True)
class TableEvaluation:
    """The metrics of a model on images with labels or values, in total and for each label or output."""

    metrics: dict[str, float]
    images: int
    outputs: tuple[LabelScore | ValueScore, ...]
    answers: Answers = field(repr=False, compare=False)
    skipped_images: tuple[str, ...] = ()
    split: str = ALL  # which images of the data these are

    def figures(self) -> dict[str, str]:
        """Return the figures of all images in words, by name."""
        figures = {name.replace("_", " "): f"{value:.4g}" for name, value in self.metrics.items()}
        figures["measured on"] = count_images(self.images, self.split)
        if self.skipped_images:
            figures["skipped"] = f"{len(self.skipped_images):,} images that cannot be read"
        return figures

    def describe(self) -> str:
        """Format the evaluation as a table by label or output and a summary."""
        return _tabulate("", self.outputs, self.figures())


def _tabulate(first: str, scores: Sequence[ClassScore | LabelScore | ValueScore], figures: Mapping[str, str]) -> str:
    """Format the figures of each class, label or value as a table, and those of all images below it."""
    rows = [(first, *scores[0].words()), *((score.name, *score.words().values()) for score in scores)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        columns = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([f"{name:{widths[0]}}", *columns]))
    return "\n".join([*lines, *(f"{name} {text}" for name, text in figures.items())])


def _decimals(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"


def score_answers(answers: Answers) -> Evaluation | TableEvaluation:
    """Score what a model answered on labelled images."""
    return score_classes(answers) if isinstance(answers.objective, SingleLabel) else score_rows(answers)


def score_classes(answers: Answers) -> Evaluation:
    """Score what a classifier answered on labelled images."""
    names, targets = answers.class_names, numpy.asarray(answers.targets)
    confusion = numpy.zeros((len(names), len(names)), dtype=int)
    numpy.add.at(confusion, (targets, answers.predicted), 1)
    scores = []
    for index, name in enumerate(names):
        counts = (confusion[index].sum(), confusion[:, index].sum(), confusion[index, index])
        support, predicted, correct = map(int, counts)
        precision, recall = correct / predicted if predicted else None, correct / support if support else None
        f1 = 2 * correct / (support + predicted) if support + predicted else None
        area = metrics.auroc(torch.from_numpy(answers.probabilities[:, index]), torch.from_numpy(targets == index))
        scores.append(ClassScore(name, support, predicted, correct, precision, recall, f1, area))
    confidence = answers.probabilities.max(1)
    by_chance = chance_calibration_error(confidence)
    calibration = calibration_interval(confidence, answers.is_right, by_chance)
    recalls = [score.recall for score in scores if score.recall is not None]
    accuracy = bootstrap(lambda right: float(right.mean()), answers.is_right)
    return Evaluation(
        accuracy=accuracy.value,
        accuracy_interval=accuracy,
        balanced_accuracy=sum(recalls) / len(recalls),
        calibration_error=calibration.value,
        calibration_error_interval=calibration,
        calibration_error_by_chance=by_chance,
        images=len(targets),
        classes=tuple(scores),
        confusion=tuple(tuple(map(int, row)) for row in confusion),
        answers=answers,
    )


def score_rows(answers: Answers) -> TableEvaluation:
    """Score what a model answered on images with labels or values."""
    objective, names = answers.objective, answers.class_names
    rows, targets = torch.from_numpy(answers.probabilities), torch.tensor(answers.targets)
    scores: list[LabelScore | ValueScore] = []
    if isinstance(objective, MultiLabel):
        chosen = objective.choose(rows)
        for label, (name, threshold) in enumerate(zip(names, objective.thresholds or [0.5] * len(names), strict=True)):
            column, truth = chosen[:, [label]], targets[:, [label]]
            support, predicted, correct = (int(each.sum()) for each in (truth, column, column * truth))
            figures = (metrics.macro_f1(column, truth), metrics.mean_average_precision(rows[:, [label]], truth))
            f1, precision = figures if truth.any() else (None, None)
            area = metrics.auroc(rows[:, label], targets[:, label])
            scores.append(LabelScore(name, threshold, support, predicted, correct, f1, precision, area))
    else:
        errors = zip(names, *(each.tolist() for each in metrics.regression_errors(rows, targets)), strict=True)
        scores += (ValueScore(*each) for each in errors)
    return TableEvaluation(answers.measure(), len(answers.paths), tuple(scores), answers)
