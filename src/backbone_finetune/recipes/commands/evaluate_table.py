"""``backbone-finetune evaluate`` for a model of labels or values, on a table of images with known labels or values."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..data.sources.finding import choose_test, find_splits, has_columns
from ..data.sources.rows import ALL
from ..data.sources.tables import TABLES
from ..models.file import TrainedModel
from ..models.named import NamedModel
from ..objectives import metrics
from ..objectives.kinds import MultiLabel, Regression
from .predict import predict_labelled
from .reporting.figures import Answers, count_images


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
        figures = (self.f1, self.average_precision, self.auroc)
        f1, precision, area = ("-" if each is None else f"{each:.3f}" for each in figures)
        chosen = {"F1": f1, "threshold": f"{self.threshold:.2f}"}
        return {"images": f"{self.support:,}", **chosen, "average precision": precision, "AUROC": area}


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
    skipped_images: tuple[str, ...]
    answers: Answers = field(repr=False, compare=False)
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
        width = max(len(score.name) for score in self.outputs)
        lines = [
            f"{score.name:{width}}  {', '.join(f'{name} {text}' for name, text in score.words().items())}"
            for score in self.outputs
        ]
        return "\n".join([*lines, *(f"{name} {text}" for name, text in self.figures().items())])


def evaluate_table(
    trained: TrainedModel | NamedModel,
    table: Path,
    *,
    batch_size: int = 32,
    workers: int | None = None,
    tta: bool = False,
    show_progress: bool = True,
) -> TableEvaluation:
    """Evaluate a model of labels or values on a table with a column ``labels``, or with a column for each value.

    If the table has several splits, the last of train, validation and test is used. Images that cannot be read are
    skipped, each with a message.

    Args:
        trained: The model, on any device; its objective is `MultiLabel` or `Regression`.
        table: A ``.csv``, ``.tsv`` or ``.parquet`` file, samples of webdataset, or a dataset of Hugging Face on disk.
        batch_size: The number of images per batch.
        workers: The number of processes that read images; None chooses by cores and images.
        tta: Whether to average over the image and its mirror image (test-time augmentation).
        show_progress: Whether to show a progress bar on stderr.

    Raises:
        FileNotFoundError: the table does not exist.
        ValueError: the table has other columns or labels than the model, or no image can be read.
    """
    objective, names = trained.objective, trained.class_names
    if not has_columns(table):
        raise ValueError(f"{table}: the model has labels or values, and takes a table ({', '.join(TABLES)})")
    values = names if isinstance(objective, Regression) else ()
    split, found = choose_test(find_splits(table, names, values))
    if isinstance(found.targets[0], int):
        raise ValueError(f"{table}: one class per image, and the model has labels; pass a table with a column labels")
    answers, skipped = predict_labelled(
        trained, found, table, batch_size=batch_size, workers=workers, tta=tta, show_progress=show_progress
    )
    return replace(score_rows(answers, skipped=skipped), split=split)


def score_rows(answers: Answers, *, skipped: tuple[str, ...] = ()) -> TableEvaluation:
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
    return TableEvaluation(answers.measure(), len(answers.paths), tuple(scores), skipped, answers)
