"""Find images and their classes: in a folder of classes, in train/, val/ and test/, a table, tar files or a dataset."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ...text import has_control_characters, join_some
from ..images import LabelledFolder
from .hugging_face import is_dataset, read_dataset
from .names import EXAMPLES, choose_parts, is_image, kind_of, show_kinds, warn_of_left_out
from .rows import PARTS, TEST, TRAIN, VALIDATION, Labelled
from .tables import TABLES, read_table
from .tar_layouts import read_tars
from .tars import list_shards

logger = logging.getLogger(__name__)

EXPECTED = "expected a folder with a sub-folder of images per class"


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
    for part, (root, images) in _find_parts(path, values, group).items():
        parts[part] = _label(root, images, known)
        known = known or parts[TRAIN].class_names
    return parts


def has_columns(path: Path) -> bool:
    """Return whether a path is a table, a dataset of Hugging Face, or of tar files."""
    return path.suffix.lower() in TABLES or bool(list_shards(path)) or is_dataset(path)


def _find_parts(path: Path, values: Sequence[str], group: str | None) -> dict[str, tuple[Path, list[Labelled]]]:
    """Find the images of each part, and the folder or file that they are in; train comes first."""
    if path.suffix.lower() in TABLES and path.is_file():
        found = read_table(path, values, group)
    elif is_dataset(path):
        found = read_dataset(path, values, group)
    elif shards := list_shards(path):
        found = read_tars(path, shards, values, group)
    elif values or group is not None:
        what = "values" if values else "groups"
        raise ValueError(f"{path}: no table; {what} are read from columns of a table ({', '.join(TABLES)}) or dataset")
    else:
        return {part: (folder, _list_classes(folder)) for part, folder in _find_part_folders(path).items()}
    return {part: (path, images) for part, images in found.items()}


def _find_part_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each part; the folder itself is train if those in it are classes."""
    folders = {folder.name: folder for folder in _folders_in(root)}
    inside = {
        name: {each.name for each in _folders_in(folder)} if name.lower() in PARTS else set[str]()
        for name, folder in folders.items()
    }
    chosen = choose_parts(root, inside)
    return {part: folders[chosen[part]] for part in (TRAIN, VALIDATION, TEST) if part in chosen} or {TRAIN: root}


def _list_classes(root: Path) -> list[Labelled]:
    """List the images of a folder of classes, with the class of each."""
    folders = _folders_in(root)
    if not folders:
        raise ValueError(f"{root} has no sub-folders; {EXPECTED}")
    beside = [path for path in root.iterdir() if not path.is_dir() and not path.name.startswith(".")]
    left_out = Counter(f"{kind_of(path)} beside the folders" for path in beside)
    images: list[Labelled] = []
    for folder in folders:
        files = sorted(_files_below(folder))
        others = Counter(kind_of(path) for path in files if not is_image(path))
        if others.total() == len(files):
            held = f"but {show_kinds(others)}" if files else "and nothing else"
            raise ValueError(
                f"class folder {folder} holds no image ({EXAMPLES}), {held}; add images to it, or remove it"
            )
        left_out += others
        images += [Labelled(path, folder.name) for path in files if is_image(path)]
    warn_of_left_out(root, left_out)
    return images


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
            message = f"{root} has one class only ({found[0]}); {EXPECTED}, two classes or more"
            if (inside := root / found[0]).is_dir() and _folders_in(inside):
                message += f"; if the classes are the folders in it, pass {inside}"
            raise ValueError(message)
        return found
    if unknown := [name for name in found if name not in allowed]:
        raise ValueError(
            f"{root}: {join_some(unknown, most=5)}: not a class of this model, whose classes are "
            f"{join_some(allowed, most=20)}; rename the class, or remove it"
        )
    return allowed


def _folders_in(root: Path) -> list[Path]:
    """List the folders in a folder, without hidden ones and links to a folder that contains it."""
    if not root.exists():
        raise FileNotFoundError(f"{root}: there is no such file or folder; {EXPECTED}")
    if not root.is_dir():
        raise NotADirectoryError(
            f"{root} is a file; {EXPECTED}, a table ({', '.join(TABLES)}) or a .tar; unpack other archives"
        )
    inside = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [path for path in inside if not root.resolve().is_relative_to(path.resolve())]


def _files_below(root: Path) -> Iterator[Path]:
    """Yield the files of a folder and of its sub-folders that are not hidden.

    Links to folders are followed, and each folder is entered once and none above, so loops end. A broken link is
    yielded, so that reading it reports it.
    """
    entered = {os.path.realpath(folder) for folder in (root, *root.absolute().parents)}
    for folder, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        seen = sorted((name for name in folders if not name.startswith(".")), reverse=True)
        real = {os.path.realpath(os.path.join(folder, name)): name for name in seen}  # the first of two links
        folders[:] = sorted(name for path, name in real.items() if path not in entered)
        entered.update(real)
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def list_images(given: Sequence[Path]) -> list[Path]:
    """Replace each folder among paths by the images below it, at least one; other paths are not changed."""
    paths: list[Path] = []
    for path in given:
        found = sorted(filter(is_image, _files_below(path))) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path}: a folder without images ({EXAMPLES})")
        paths += found
    return paths


def choose_test(parts: Mapping[str, LabelledFolder]) -> LabelledFolder:
    """Return the images to test a model on: "test" if it exists, else "validation", else all images."""
    return next(parts[part] for part in (TEST, VALIDATION, TRAIN) if part in parts)
