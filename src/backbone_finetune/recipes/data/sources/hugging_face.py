"""Datasets of Hugging Face on disk: a column of images, one of classes, labels or values, and perhaps of groups."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...extras import import_extra
from ...text import printable
from .names import warn_of_others
from .packed import PackedPath
from .rows import (
    LABELS,
    PARTS,
    SEVERAL,
    SPLITS,
    TEST,
    TRAIN,
    VALIDATION,
    Labelled,
    Row,
    choose_columns,
    show_names,
    sort_rows,
)
from .tables import PATHS

logger = logging.getLogger(__name__)


def is_dataset(path: Path) -> bool:
    """Return whether a folder is what ``save_to_disk`` of a Dataset or a DatasetDict writes."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read_dataset(root: Path, values: Sequence[str] = (), group: str | None = None) -> dict[str, list[Labelled]]:
    """Read the names of images and their targets, for each part of the data, from a dataset on disk.

    The images are in the column of type ``Image``; of several, in ``image``. The column of classes is ``label``, or the
    one of type ``ClassLabel``. Splits of a ``DatasetDict`` are parts; one without labels is left out.

    Raises:
        ModuleNotFoundError: ``datasets`` is not installed.
        ValueError: there is no column of images, two splits have targets of different kinds, or as for `sort_rows`.
    """
    splits, kinds = _load(root), dict[bool, str]()
    found: dict[str, list[Labelled]] = {TRAIN: [], VALIDATION: [], TEST: []}
    if others := [name for name in splits if name and name.lower() not in PARTS]:
        warn_of_others(root, show_names(others))
    for name in (name for name in splits if name not in others):
        split, source, part = _name_classes(splits[name]), root / name, PARTS.get(name.lower(), TRAIN)
        names = [title for title in split.features if not name or title.strip().lower() not in SPLITS]
        columns = choose_columns(source, names, values, group)
        rows = _read_rows(source, split, columns.names)
        if part != TRAIN and all(row.cells[columns.targets[0]] is None for row in rows):
            logger.warning("%s: left out: no row of it has a label", printable(source))
            continue
        kinds.setdefault(columns.several, f"{columns.targets[0]} of {name}")
        if len(kinds) > 1:
            raise ValueError(f"{source}: {' and '.join(kinds.values())} are targets of two kinds; rename one column")
        for own, images in sort_rows(source, columns, rows).items():
            found[part if name else own] += images
    if not any(found.values()):
        raise ValueError(
            f"{root}: its splits are {show_names([*splits])}; expected train and, optionally, val and test"
        )
    return {part: images for part, images in found.items() if images}


def list_rows(root: Path) -> list[Path]:
    """List the images of all splits, with or without labels, in order."""
    return [row.path for name, split in _load(root).items() for row in _read_rows(root / name, split, ())]


def _load(root: Path) -> dict[str, Any]:
    """Load the splits of a dataset by name, without decoding; one that is not split has the name ""."""
    try:
        loaded = import_extra("datasets", "datasets").load_from_disk(str(root))
    except IndexError as error:  # datasets cannot load what it has saved without rows
        raise ValueError(
            f"{root}: it, or a split of it, has no row; save it with rows, or without that split"
        ) from error
    splits = loaded if isinstance(loaded, dict) else {"": loaded}
    return {name: split.with_format(None) for name, split in splits.items()}


def _name_classes(split: Any) -> Any:
    """Return a split whose only column of classes has the name ``label``."""
    class_label = import_extra("datasets", "datasets").ClassLabel
    classes = [name for name, feature in split.features.items() if isinstance(feature, class_label)]
    named = [name for name in split.features if name.strip().lower() in (*LABELS, SEVERAL)]
    if len(classes) == 1 and named in ([], classes) and classes[0].strip().lower() not in LABELS:
        return split.rename_column(classes[0], LABELS[0])
    return split


def _read_rows(root: Path, split: Any, columns: Sequence[str]) -> list[Row]:
    """Read the columns of a split; an image is read when it is opened."""
    datasets, compute = import_extra("datasets", "datasets"), import_extra("pyarrow.compute", "datasets")
    images = [name for name, feature in split.features.items() if isinstance(feature, datasets.Image)]
    if len(images) > 1:
        images = [name for name in images if name.lower() in PATHS]
    if len(images) != 1:
        raise ValueError(
            f"{root}: its columns are {show_names([*split.features])}; expected one of type Image, or named image"
        )
    (image,) = images
    packed = split.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    sources = compute.struct_field(packed.data.column(image), "path").to_pylist()
    cells = {name: _decode(split.features[name], split[name][:]) for name in columns}
    rows = []
    for index, source in enumerate(sources):
        name = f"{index}-{Path(source).name}" if source else str(index)
        path = PackedPath(root / name).holding(partial(_read_image, packed, image, index))
        rows.append(Row(f"{root}, row {index}", path, {name: column[index] for name, column in cells.items()}))
    return rows


def _read_image(packed: Any, column: str, index: int) -> bytes:
    """Return the bytes of an image, which ``save_to_disk`` stores also where it was a file; b"" if it is missing."""
    content: bytes | None = (packed[index][column] or {}).get("bytes")
    return content or b""


def _decode(feature: Any, cells: Sequence[Any]) -> list[Any]:
    """Replace the numbers of classes by their names; -1 is of an unknown class."""
    of_each = getattr(feature, "feature", feature)  # that of the elements of lists
    if (names := getattr(of_each, "names", None)) is None:
        return list(cells)

    def name(cell: Any) -> Any:
        if isinstance(cell, list):
            return [name(each) for each in cell]
        return None if cell is None or cell < 0 else names[cell]

    return [name(cell) for cell in cells]
