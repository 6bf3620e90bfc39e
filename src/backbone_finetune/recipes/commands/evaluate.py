"""``backbone-finetune evaluate``: evaluate a trained model on images of known classes, labels or values."""

from __future__ import annotations  # help() shows the names of types, not what pydantic checks

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..checking import Positive, Whole, validated
from ..data.sources.finding import choose_test, find_splits, has_columns
from ..data.sources.tables import TABLES
from ..models.file import TrainedModel
from ..models.named import NamedModel
from ..objectives.kinds import MultiLabel, Regression
from .nearest import measure_neighbors
from .predict import predict_rows
from .reporting.figures import make_answers
from .reporting.scores import Evaluation, TableEvaluation, score_answers


@validated
def evaluate_images(
    trained: TrainedModel | NamedModel,
    source: Path,
    *,
    batch_size: Positive = 32,
    workers: Whole | None = None,
    tta: bool = False,
    neighbors: Path | None = None,
    show_progress: bool = True,
) -> Evaluation | TableEvaluation:
    """Evaluate a model on a folder with a sub-folder of images for each of its classes, or on a table.

    If the images are split in train, validation and test (`find_splits`), the last part is used.
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
    ...     evaluation = evaluate_images(trained, Path(folder), show_progress=False)
    >>> evaluation.images, evaluation.missing_classes
    (2, ('ant',))

    Args:
        trained: The model, on any device.
        source: The folder of the sub-folders, or what else `find_images` takes. For a model of labels or values it is a
            table, samples of webdataset, or a dataset of Hugging Face on disk, with a column ``labels``, or with one
            for each value.
        batch_size: The number of images per batch.
        workers: The number of processes that read images; None chooses by cores and images.
        tta: Whether to average over an image and its mirror image, as in ``predict``.
        neighbors: The images that the model was trained on, of which the training part is used. The nearest of them
            then vote on each image by its features (`predict_neighbors`), in a pass over both. It is for models of one
            class per image.
        show_progress: Whether to show a progress bar on stderr.

    Returns:
        An `Evaluation` of classes, or a `TableEvaluation` of labels or values.

    Raises:
        FileNotFoundError: there is no such folder or table.
        NotADirectoryError: the folder is a file.
        ValueError: a class folder is not one of the model's classes, or is empty; the table has other columns or labels
            than the model; no image can be read; or a number is out of range (pydantic's ``ValidationError``).
    """
    objective, names = trained.objective, trained.class_names
    has_rows = isinstance(objective, MultiLabel | Regression)
    if has_rows and neighbors is not None:
        raise ValueError("the model has labels or values; --neighbors is for models of one class per image")
    if has_rows and source.exists() and not has_columns(source):
        raise ValueError(f"{source}: the model has labels or values, and takes a table ({', '.join(TABLES)})")
    split, found = choose_test(find_splits(source, names, names if isinstance(objective, Regression) else ()))
    if has_rows and isinstance(found.targets[0], int):
        raise ValueError(f"{source}: one class per image, and the model has labels; pass a table with a column labels")
    accuracy = None
    if neighbors is not None:  # first: it checks before it reads images
        title = "features" if show_progress else None
        accuracy = measure_neighbors(trained, neighbors, found, batch_size=batch_size, workers=workers, title=title)
    predicted = predict_rows(trained, found.paths, batch_size=batch_size, workers=workers, tta=tta)
    count = len(found.paths)
    bar = tqdm(predicted, total=count, desc="evaluating", unit="image", leave=False, disable=not show_progress)
    outcomes = [outcome for _, outcome in bar]
    skipped = tuple(outcome for outcome in outcomes if isinstance(outcome, str))
    rows = {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, Tensor)}
    if not rows:
        raise ValueError(f"{source}: none of its {count} images can be read; the first: {skipped[0]}")
    answers = make_answers(found.select(list(rows)), torch.stack(list(rows.values())), objective)
    evaluation = replace(score_answers(answers), split=split, skipped_images=skipped)
    if isinstance(evaluation, TableEvaluation):
        return evaluation
    missing = tuple(name for target, name in enumerate(names) if target not in found.targets)
    return replace(evaluation, missing_classes=missing, neighbor_accuracy=accuracy)
