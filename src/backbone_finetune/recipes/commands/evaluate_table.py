"""``backbone-finetune evaluate`` for a model of labels or values, on a table of images with known labels or values."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..data.sources.finding import choose_test, find_splits, has_columns
from ..data.sources.tables import TABLES
from ..files import replacing
from ..models.file import TrainedModel
from ..models.named import NamedModel
from ..objectives import metrics
from ..objectives.kinds import MultiLabel, Regression
from .predict import predict_labelled


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


@dataclass(frozen=True)
class ValueScore:
    """The mean absolute error of one output, in its own units, and R squared."""

    name: str
    mean_absolute_error: float
    r2: float


@dataclass(frozen=True)
class TableEvaluation:
    """The metrics of a model on images with labels or values, in total and for each label or output."""

    metrics: dict[str, float]
    images: int
    outputs: tuple[LabelScore, ...] | tuple[ValueScore, ...]
    skipped_images: tuple[str, ...]

    def describe(self) -> str:
        """Format the evaluation as a table by label or output and a summary."""
        width = max(len("output"), *(len(score.name) for score in self.outputs))
        lines = []
        for score in self.outputs:
            if isinstance(score, ValueScore):
                line = f"mean absolute error {score.mean_absolute_error:.4g}, R squared {score.r2:.3f}"
            else:
                f1, precision = ("-" if each is None else f"{each:.3f}" for each in (score.f1, score.average_precision))
                line = f"{score.support:,} images, F1 {f1} above {score.threshold:.2f}, average precision {precision}"
            lines.append(f"{score.name:{width}}  {line}")
        lines += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in self.metrics.items()]
        lines[-1] += f" of {self.images:,} images"
        if self.skipped_images:
            lines.append(f"skipped: {len(self.skipped_images):,} images that cannot be read")
        return "\n".join(lines)

    def write(self, folder: Path) -> Path:
        """Write ``evaluation.json`` into a folder, which is created if it does not exist."""
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "evaluation.json") as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")
        return folder / "evaluation.json"


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
    found = choose_test(find_splits(table, names, values))
    if isinstance(found.targets[0], int):
        raise ValueError(f"{table}: one class per image, and the model has labels; pass a table with a column labels")
    answers, read, skipped = predict_labelled(
        trained, found, table, batch_size=batch_size, workers=workers, tta=tta, show_progress=show_progress
    )
    targets = torch.tensor([found.targets[index] for index in read])
    measured = objective.measure(answers, targets)
    if not isinstance(objective, MultiLabel):
        errors = zip(names, *(each.tolist() for each in metrics.regression_errors(answers, targets)), strict=True)
        return TableEvaluation(measured, len(read), tuple(ValueScore(*each) for each in errors), skipped)
    chosen, scores = objective.choose(answers.double()), []
    for label, (name, threshold) in enumerate(zip(names, objective.thresholds or [0.5] * len(names), strict=True)):
        column, truth = chosen[:, [label]], targets[:, [label]]
        counts = (int(each.sum()) for each in (truth, column, column * truth))
        figures = (metrics.macro_f1(column, truth), metrics.mean_average_precision(answers[:, [label]], truth))
        known = figures if truth.any() else (None, None)
        scores.append(LabelScore(name, threshold, *counts, *known))
    return TableEvaluation(measured, len(read), tuple(scores), skipped)
