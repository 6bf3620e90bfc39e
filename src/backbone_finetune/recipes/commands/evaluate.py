"""``backbone-finetune evaluate``: evaluate a trained model on a folder of images with known classes."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from ..data.finding import choose_test, find_splits
from ..files import replacing
from ..models.file import TrainedModel
from ..models.named import NamedModel
from ..training.objectives import SingleLabel, SoftLabels
from .predict import predict

__all__ = ["ClassScore", "Evaluation", "describe_evaluation", "evaluate_folder", "write_evaluation"]


@dataclass(frozen=True)
class ClassScore:
    """Counts for one class: images of it (``support``), images predicted as it, and those of both (``correct``)."""

    name: str
    support: int
    predicted: int
    correct: int
    precision: float | None  # correct / predicted, None for 0 / 0
    recall: float | None  # correct / support


@dataclass(frozen=True)
class Evaluation:
    """The results of a model: ``confusion[i][j]`` images of class ``i`` were predicted as class ``j``."""

    accuracy: float
    balanced_accuracy: float  # the mean recall of the classes that have images
    images: int
    classes: tuple[ClassScore, ...]
    missing_classes: tuple[str, ...]
    skipped_images: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]


def evaluate_folder(
    trained: TrainedModel | NamedModel,
    folder: Path,
    *,
    batch_size: int = 32,
    workers: int | None = None,
    tta: bool = False,
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
        show_progress: Whether to show a progress bar on stderr.

    Raises:
        FileNotFoundError: there is no such folder.
        NotADirectoryError: it is a file.
        ValueError: a class folder is not one of the model's classes, or is empty, or no image can be read.
    """
    if not isinstance(trained.objective, SingleLabel | SoftLabels):
        raise ValueError("the model has labels or values; call evaluate_table with a table")
    found = choose_test(find_splits(folder, trained.class_names))
    names = trained.class_names
    confusion = [[0] * len(names) for _ in names]
    skipped: list[str] = []
    answers = predict(trained, found.paths, top_k=1, batch_size=batch_size, workers=workers, tta=tta)
    bar = tqdm(answers, total=len(found.paths), desc="evaluating", unit="image", leave=False, disable=not show_progress)
    for prediction, target in zip(bar, found.targets, strict=True):
        if prediction.error is None:
            confusion[target][names.index(prediction.classes[0][0])] += 1
        else:
            skipped.append(prediction.error)
    images = len(found.paths) - len(skipped)
    if images == 0:
        raise ValueError(f"{folder}: none of its {len(found.paths)} images can be read; the first: {skipped[0]}")
    scores = []
    for position, (name, row) in enumerate(zip(names, confusion, strict=True)):
        support, predicted, correct = sum(row), sum(other[position] for other in confusion), row[position]
        precision, recall = correct / predicted if predicted else None, correct / support if support else None
        scores.append(ClassScore(name, support, predicted, correct, precision, recall))
    recalls = [score.recall for score in scores if score.recall is not None]
    return Evaluation(
        accuracy=sum(score.correct for score in scores) / images,
        balanced_accuracy=sum(recalls) / len(recalls),
        images=images,
        classes=tuple(scores),
        missing_classes=tuple(name for target, name in enumerate(names) if target not in found.targets),
        skipped_images=tuple(skipped),
        confusion=tuple(map(tuple, confusion)),
    )


def describe_evaluation(evaluation: Evaluation) -> str:
    """Format an evaluation as a table by class and a summary."""
    width = max(len("class"), *(len(score.name) for score in evaluation.classes))
    lines = [f"{'class':{width}}  images  precision  recall"]
    for score in evaluation.classes:
        precision, recall = ("-" if share is None else f"{share:.3f}" for share in (score.precision, score.recall))
        lines.append(f"{score.name:{width}}  {score.support:>6,}  {precision:>9}  {recall:>6}")
    lines.append(f"accuracy {evaluation.accuracy:.3f} of {evaluation.images:,} images")
    if len({score.support for score in evaluation.classes if score.support}) > 1:
        lines.append(f"balanced accuracy {evaluation.balanced_accuracy:.3f}, the mean recall of the classes")
    if evaluation.skipped_images:
        lines.append(f"skipped: {len(evaluation.skipped_images):,} images that cannot be read")
    if evaluation.missing_classes:
        lines.append(f"without a folder: {', '.join(evaluation.missing_classes)}")
    return "\n".join(lines)


def write_evaluation(evaluation: Evaluation, folder: Path) -> tuple[Path, Path]:
    """Write ``evaluation.json`` and ``confusion.png`` into a folder, which is created if necessary."""
    from .plots import draw_confusion  # noqa: PLC0415 (matplotlib, only where it is needed)

    folder.mkdir(parents=True, exist_ok=True)
    numbers, image = folder / "evaluation.json", folder / "confusion.png"
    with replacing(numbers) as temporary:
        temporary.write_text(json.dumps(asdict(evaluation), indent=2) + "\n")
    # Bytes of a name that are not valid text cannot be drawn.
    names = [score.name.encode(errors="backslashreplace").decode() for score in evaluation.classes]
    with replacing(image) as temporary:
        draw_confusion(evaluation.confusion, names, temporary)
    return numbers, image
