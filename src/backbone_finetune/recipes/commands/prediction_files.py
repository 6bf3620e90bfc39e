"""Files of predictions: CSV, JSON lines or Parquet, written while the images are predicted."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from backbone_finetune.files import replacing

from ..extras import import_extra
from ..files import check_output, csv_writer
from ..models.file import TrainedModel
from ..models.named import NamedModel
from ..objectives.kinds import MultiLabel, Regression
from .predict import Prediction

GROUP = 1000  # predictions that are written to a Parquet file at once


def write_csv(
    predictions: Iterable[Prediction], path: Path, top_k: int, trained: TrainedModel | NamedModel
) -> Iterator[Prediction]:
    r"""Write predictions to a CSV file and yield each one; the file is complete after the last one.

    The columns are the ``top_k`` classes. For a model of labels, one column has all labels of an image, as
    "cat;dog"; for a model of values, each value has a column. Undecodable bytes of a name
    are escaped, ``\udcff`` for 255.
    """
    columns = _columns(trained, top_k)
    with replacing(path) as temporary, csv_writer(temporary) as rows:
        rows.writerow(["image", *columns, "error"])
        for prediction in predictions:
            cells = _cells(prediction, trained, len(columns))
            texts = (";".join(map(str, cell)) if isinstance(cell, list) else cell for cell in cells)
            rows.writerow([prediction.path, *texts, prediction.error])
            yield prediction


def write_jsonl(predictions: Iterable[Prediction], path: Path) -> Iterator[Prediction]:
    r"""Write predictions to a file of JSON lines and yield each one; the file is complete after the last one.

    Undecodable bytes of a name are escaped as Python does, ``\udcff`` for 255; ``os.fsencode`` restores them.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for prediction in predictions:
            classes = [{"name": name, "probability": probability} for name, probability in prediction.classes]
            entry: dict[str, object] = {"image": str(prediction.path), "classes": classes, "error": prediction.error}
            if prediction.values:
                entry["values"] = dict(prediction.values)
            file.write(json.dumps(entry) + "\n")
            yield prediction


def write_parquet(
    predictions: Iterable[Prediction], path: Path, top_k: int, trained: TrainedModel | NamedModel
) -> Iterator[Prediction]:
    r"""Write predictions to a Parquet file and yield each one; the file is complete after the last one.

    The columns are those of `write_csv`; cells that are missing are null, and labels and their probabilities are lists.
    Undecodable bytes of a name are escaped, ``\udcff`` for 255. A thousand predictions are in memory.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
    """
    arrow, parquet = import_extra("pyarrow", "parquet"), import_extra("pyarrow.parquet", "parquet")
    columns, objective = _columns(trained, top_k), trained.objective
    kinds = [arrow.string(), arrow.float64()] * top_k
    if isinstance(objective, MultiLabel):
        kinds = [arrow.list_(arrow.string()), arrow.list_(arrow.float64())]
    elif isinstance(objective, Regression):
        kinds = [arrow.float64()] * len(columns)
    fields = zip(columns, kinds, strict=True)
    schema = arrow.schema([("image", arrow.string()), *fields, ("error", arrow.string())])
    with replacing(path) as temporary, parquet.ParquetWriter(temporary, schema) as file:

        def write(group: Sequence[Prediction]) -> None:
            rows = [
                [_escaped(str(each.path)), *_cells(each, trained, len(columns)), each.error and _escaped(each.error)]
                for each in group
            ]
            file.write_batch(arrow.record_batch(list(zip(*rows, strict=True)), schema=schema))

        group: list[Prediction] = []
        for prediction in predictions:
            group.append(prediction)
            if len(group) == GROUP:
                write(group)
                group.clear()
            yield prediction
        if group:
            write(group)


def _columns(trained: TrainedModel | NamedModel, top_k: int) -> list[str]:
    """Return the columns of a table between the image and the error."""
    if isinstance(trained.objective, MultiLabel):
        return ["labels", "probabilities"]
    if isinstance(trained.objective, Regression):
        return list(trained.class_names)
    return [f"{column}_{rank}" for rank in range(1, top_k + 1) for column in ("class", "probability")]


def _cells(prediction: Prediction, trained: TrainedModel | NamedModel, count: int) -> list[Any]:
    """Return the cells of these columns; None where an image has none."""
    cells: list[Any] = [cell for pair in prediction.classes for cell in pair]
    if isinstance(trained.objective, Regression):
        cells = [value for _, value in prediction.values]
    elif isinstance(trained.objective, MultiLabel) and prediction.error is None:
        cells = [[pair[part] for pair in prediction.classes] for part in (0, 1)]
    return cells + [None] * (count - len(cells))


def _escaped(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def choose_writer(
    path: Path, top_k: int, trained: TrainedModel | NamedModel
) -> Callable[[Iterable[Prediction]], Iterator[Prediction]]:
    """Return the writer for a file of predictions: ``.csv`` or ``.parquet`` for a table, ``.jsonl`` for JSON lines.

    Raises:
        ModuleNotFoundError: the package of the format is not installed.
        OSError: the path is a folder, or its folder does not exist or is not writable.
        ValueError: the path has another suffix.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; pass the path of a file with --output")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; create it, or choose another with --output")
    check_output(path.parent)
    if path.suffix == ".csv":
        return partial(write_csv, path=path, top_k=top_k, trained=trained)
    if path.suffix == ".parquet":
        import_extra("pyarrow", "parquet")  # before the first image
        return partial(write_parquet, path=path, top_k=top_k, trained=trained)
    if path.suffix == ".jsonl":
        return partial(write_jsonl, path=path)
    raise ValueError(f"{path}: predictions are written to a file that ends in .csv, .jsonl or .parquet")
