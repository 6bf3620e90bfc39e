"""Find images and their classes: in a folder of classes, in train/, val/ and test/, a table, tar files or a dataset."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from backbone_finetune.names import shortened

from ...text import has_control_characters, printable
from ..images import LabelledFolder
from .folders import EXPECTED, File, read_folders, walk
from .hugging_face import is_dataset, list_rows, read_dataset
from .names import EXAMPLES, is_image
from .rows import ALL, TEST, TRAIN, VALIDATION, Labelled
from .samples import are_samples, list_packed, read_samples
from .tables import TABLES, read_table
from .tars import list_shards, read_shards

logger = logging.getLogger(__name__)


def find_images(path: Path, class_names: Sequence[str] | None = None) -> LabelledFolder:
    """List the images of a folder with a sub-folder per class, or of a table, in a fixed order.

    Only names are read. A class is a direct sub-folder, including the images in deeper folders. Links to
    folders are followed. Hidden files and folders are skipped; other skipped files are logged by kind.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.png"):
    ...         Path(folder, name).parent.mkdir(exist_ok=True)
    ...         Path(folder, name).touch()
    ...     images = find_images(Path(folder))
    >>> images.class_names, images.targets
    (('cat', 'dog'), (0, 0, 1))

    Args:
        path: The folder; a ``.csv``, ``.tsv`` or ``.parquet`` table with columns ``path`` and ``label``; a ``.tar``
            file, a folder or a pattern (``train-{0000..0003}.tar``) of these, with class folders or samples of
            webdataset; or a dataset of Hugging Face on disk.
        class_names: The allowed classes, in their order. By default those that are found, at least two.

    Raises:
        FileNotFoundError: the folder does not exist.
        NotADirectoryError: the path is a file, but not a table.
        ValueError: it has too few or other classes, or is split in parts (`find_splits` reads these); or a class
            has no image, or has control characters in its name.
    """
    parts = find_splits(path, class_names)
    if len(parts) > 1:
        raise ValueError(f"{path} is split in {', '.join(parts)}; pass one of these, or call find_splits")
    return next(iter(parts.values()))


def find_splits(
    path: Path, class_names: Sequence[str] | None = None, values: Sequence[str] = (), group: str | None = None
) -> dict[str, LabelledFolder]:
    """List the images of each part of the data: "train" and, if present, "validation" and "test".

    The parts are folders ``train``, ``val`` (``valid``, ``validation``) and ``test`` that have the same sub-folders,
    one per class; the splits in a column of a table; or those of a dataset. The classes of all parts are those of
    "train", unless ``class_names`` are given. Data that is not split is "train" as a whole. For a table with a column
    ``labels``, or with ``values``, columns of numbers, targets are rows. Images have the groups in its column
    ``group``, or in the one that is given.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     for name in ("train/cat/1.jpg", "train/dog/1.jpg", "val/dog/2.jpg"):
    ...         Path(folder, name).parent.mkdir(parents=True)
    ...         Path(folder, name).touch()
    ...     {part: found.targets for part, found in find_splits(Path(folder)).items()}
    {'train': (0, 1), 'validation': (1,)}

    Raises:
        FileNotFoundError: the folder does not exist.
        NotADirectoryError: the path is a file, but not a table.
        ValueError: as for `find_images`; or a part has a class that "train" does not have.
    """
    known, parts = values or class_names, dict[str, LabelledFolder]()
    found = _find_parts(path, known, values, group)
    if class_names is None and TRAIN not in found:
        raise ValueError(f"{path}: its splits are {', '.join(found)}; expected train and, optionally, val and test")
    for part, (root, images) in found.items():
        parts[part] = _label(root, images, known)
        known = known or parts[TRAIN].class_names
    return parts


def has_columns(path: Path) -> bool:
    """Return whether a path is a table, a dataset of Hugging Face, or of tar files."""
    return path.suffix.lower() in TABLES or bool(list_shards(path)) or is_dataset(path)


def _find_parts(
    path: Path, class_names: Sequence[str] | None, values: Sequence[str], group: str | None
) -> dict[str, tuple[Path, list[Labelled]]]:
    """Find the images of each part, and the folder or file that they are in; train comes first."""
    files: list[File] = []
    if path.suffix.lower() in TABLES and path.is_file():
        found = read_table(path, values, group)
    elif is_dataset(path):
        found = read_dataset(path, values, group)
    elif (shards := list_shards(path)) and are_samples(files := read_shards(path, shards)):
        found = read_samples(path, files, values, group)
    elif values or group is not None:
        what = "values" if values else "groups"
        raise ValueError(f"{path}: no table; {what} are read from columns of a table ({', '.join(TABLES)}) or dataset")
    else:
        return read_folders(path, files if shards else walk(path), class_names)
    return {part: (path, images) for part, images in found.items()}


def _label(root: Path, images: Iterable[Labelled], class_names: Sequence[str] | None) -> LabelledFolder:
    """Number the classes of images; values stay numbers."""
    paths, labels, of_groups = zip(*images, strict=True)
    groups = None if of_groups[0] is None else of_groups
    are_rows = isinstance(labels[0], tuple)
    if are_rows and any(isinstance(value, float) for row in labels for value in row):
        return LabelledFolder(root, tuple(class_names or ()), paths, labels, groups)
    found = sorted({name for row in labels for name in row}) if are_rows else list(dict.fromkeys(labels))
    numbers = {name: number for number, name in enumerate(_check_names(root, found, class_names, fewest=2 - are_rows))}
    if are_rows:
        labels = tuple(tuple(float(name in row) for name in numbers) for row in labels)
    else:
        labels = tuple(numbers[label] for label in labels)
    return LabelledFolder(root, tuple(numbers), paths, labels, groups)


def _check_names(root: Path, found: Sequence[str], allowed: Sequence[str] | None, *, fewest: int) -> Sequence[str]:
    """Return the names of the classes: those that are allowed, or by default all that were found."""
    if named := [name for name in found if has_control_characters(name)]:
        raise ValueError(f"{root}: class {named[0]!r} has control characters in its name; rename it")
    if allowed is None:
        if not found:
            raise ValueError(f"{root}: no row has labels")
        if len(found) < fewest:
            raise ValueError(f"{root} has one class only ({found[0]}); {EXPECTED}, two classes or more")
        return found
    if unknown := [name for name in found if name not in allowed]:
        raise ValueError(
            f"{root}: {shortened(unknown, most=5)}: not a class of this model, whose classes are "
            f"{shortened(allowed, most=20)}; rename the class, or remove it"
        )
    return allowed


def list_images(path: Path) -> list[Path]:
    """List all images in a folder, in tar files or in a dataset of Hugging Face, with or without classes.

    Any other path is returned as it is. In a folder, tar files that cannot be read are left out and logged.

    Raises:
        ValueError: there is no image.
    """
    found, shards = list[Path](), list[Path]()
    if is_dataset(path):
        found = list_rows(path)
    elif path.is_dir():
        files = sorted(file.path for file in walk(path) if file.path is not None)
        found, shards = list(filter(is_image, files)), [file for file in files if file.suffix.lower() == ".tar"]
    elif not (shards := list_shards(path)):
        return [path]
    for shard in shards:
        try:
            found += list_packed(read_shards(shard, [shard]))
        except ValueError as error:  # noqa: PERF203 (a file of many images)
            if not path.is_dir():
                raise
            logger.warning("left out: %s", printable(str(error)))
    if not found:
        raise ValueError(f"{path}: no image in it ({EXAMPLES})")
    return found


def choose_test(parts: Mapping[str, LabelledFolder]) -> tuple[str, LabelledFolder]:
    """Return the images to test a model on, and their part: "test" if it exists, else "validation", else "all"."""
    part = next(part for part in (TEST, VALIDATION, TRAIN) if part in parts)
    return ALL if part == TRAIN else part, parts[part]
