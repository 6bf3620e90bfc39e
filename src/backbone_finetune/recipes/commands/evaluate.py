"""``backbone-finetune evaluate``: evaluate a trained model on a folder of images with known classes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy
import torch

from ..data.sources.finding import choose_test, find_splits
from ..data.sources.rows import ALL
from ..models.file import TrainedModel
from ..models.named import NamedModel
from ..objectives.kinds import SingleLabel, SoftLabels
from ..objectives.metrics import auroc
from .nearest import measure_neighbors
from .predict import predict_labelled
from .reporting.figures import (
    Answers,
    Interval,
    bootstrap,
    calibration_interval,
    chance_calibration_error,
    count_images,
)


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

    def shares(self) -> list[str]:
        """Return precision, recall, F1 and AUROC in words."""
        shares = (self.precision, self.recall, self.f1, self.auroc)
        return ["-" if share is None else f"{share:.3f}" for share in shares]


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
    missing_classes: tuple[str, ...]
    skipped_images: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    answers: Answers = field(repr=False, compare=False)
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
        width = max(len("class"), *(len(score.name) for score in self.classes))
        lines = [f"{'class':{width}}  images  precision  recall     F1  AUROC"]
        for score in self.classes:
            precision, recall, f1, area = score.shares()
            lines.append(f"{score.name:{width}}  {score.support:>6,}  {precision:>9}  {recall:>6}  {f1:>5}  {area:>5}")
        return "\n".join([*lines, *(f"{name} {text}" for name, text in self.figures().items())])


def evaluate_folder(
    trained: TrainedModel | NamedModel,
    folder: Path,
    *,
    batch_size: int = 32,
    workers: int | None = None,
    tta: bool = False,
    neighbors: Path | None = None,
    show_progress: bool = True,
) -> Evaluation:
    """Evaluate a model on a folder with a sub-folder of images for each of the model's classes.

    If a folder or table is split in train, validation and test (`find_splits`), its last part is used.
    Unreadable images are skipped, each with a message. Classes without a folder are listed as missing.

    >>> import timm
    >>> from tempfile import TemporaryDirectory
    >>> from PIL import Image
    >>> from backbone_finetune import FineTuneModel
    >>> model = FineTuneModel.from_timm("test_resnet", num_classes=3)
    >>> trained = TrainedModel(model, "test_resnet", ("ant", "cat", "dog"), timm.data.resolve_model_data_config(model))
    >>> with TemporaryDirectory() as folder:
    ...     for name in ("cat", "dog"):
    ...         Path(folder, name).mkdir()
    ...         Image.new("RGB", (32, 32)).save(Path(folder, name, "1.png"))
    ...     evaluation = evaluate_folder(trained, Path(folder), show_progress=False)
    >>> evaluation.images, evaluation.missing_classes
    (2, ('ant',))

    Args:
        trained: The model, on any device.
        folder: The folder of the sub-folders.
        batch_size: The number of images per batch.
        workers: The number of processes that read images; None chooses by cores and images.
        tta: Whether to average over an image and its mirror image, as in ``predict``.
        neighbors: The images that the model was trained on, of which the training part is used. The nearest of them
            then vote on each image by its features (`predict_neighbors`), in a pass over both.
        show_progress: Whether to show a progress bar on stderr.

    Raises:
        FileNotFoundError: there is no such folder.
        NotADirectoryError: it is a file.
        ValueError: a class folder is not one of the model's classes, or is empty, or no image can be read.
    """
    if not isinstance(trained.objective, SingleLabel | SoftLabels):
        raise ValueError("the model has labels or values; call evaluate_table with a table")
    split, found = choose_test(find_splits(folder, trained.class_names))
    accuracy = None
    if neighbors is not None:  # first: it checks before it reads images
        title = "features" if show_progress else None
        accuracy = measure_neighbors(trained, neighbors, found, batch_size=batch_size, workers=workers, title=title)
    answers, skipped = predict_labelled(
        trained, found, folder, batch_size=batch_size, workers=workers, tta=tta, show_progress=show_progress
    )
    missing = tuple(name for target, name in enumerate(trained.class_names) if target not in found.targets)
    evaluation = score_answers(answers, skipped=skipped, missing=missing)
    return replace(evaluation, split=split, neighbor_accuracy=accuracy)


def score_answers(answers: Answers, *, skipped: Sequence[str] = (), missing: Sequence[str] = ()) -> Evaluation:
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
        area = auroc(torch.from_numpy(answers.probabilities[:, index]), torch.from_numpy(targets == index))
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
        missing_classes=tuple(missing),
        skipped_images=tuple(skipped),
        confusion=tuple(tuple(map(int, row)) for row in confusion),
        answers=answers,
    )
