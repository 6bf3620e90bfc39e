"""Folders of classes, perhaps in folders train, val and test; the same on disk and in tar files."""

import logging
import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import NamedTuple

from backbone_finetune.names import shortened

from ...text import printable
from .names import EXAMPLES, is_hidden, is_image, kind_of, show_kinds, warn_of_left_out, warn_of_others
from .rows import PARTS, TEST, TRAIN, VALIDATION, Labelled
from .tables import TABLES

logger = logging.getLogger(__name__)

EXPECTED = "expected a folder with a sub-folder of images per class"


class File(NamedTuple):
    """A file in folders below a root, perhaps in a tar file; or a folder, which has no ``path``."""

    folders: tuple[str, ...]
    path: Path | None = None
    tar: Path | None = None


def walk(root: Path) -> Iterator[File]:
    """Yield the files and folders below a folder that are not hidden.

    Links to folders are followed, except to one that contains the link, so loops end. A broken link is yielded as a
    file, so that reading it reports it.

    Raises:
        FileNotFoundError: the folder does not exist.
        NotADirectoryError: it is a file.
        OSError: a folder cannot be read.
    """
    if not root.exists():
        raise FileNotFoundError(f"{root}: there is no such file or folder; {EXPECTED}")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; {EXPECTED}, a table ({', '.join(TABLES)}) or a .tar")
    return _walk(root, (), frozenset())


def _walk(folder: Path, folders: tuple[str, ...], above: AbstractSet[Path]) -> Iterator[File]:
    real = folder.resolve()
    above = {*above, real, *real.parents}
    _, inside, names = next(os.walk(folder, onerror=_raise, followlinks=True))
    yield from (File(folders, folder / name) for name in names if not is_hidden(name))
    for name in inside:
        if not is_hidden(name) and (folder / name).resolve() not in above:
            yield File((*folders, name))
            yield from _walk(folder / name, (*folders, name), above)


def _raise(error: OSError) -> None:
    raise error


def read_folders(
    root: Path, files: Iterable[File], class_names: Container[str] | None
) -> dict[str, tuple[Path, list[Labelled]]]:
    """Return the images of each part of the data with their classes, and the folder that these are in.

    A class is a folder, including the images in deeper folders. One folder around those of all classes, which archives
    often have, is none, unless it is one of ``class_names``.

    Raises:
        ValueError: there are no folders, or one has no image.
    """
    files = sorted(files, key=lambda file: (*file.folders, "" if file.path is None else file.path.name))
    outer, *more = _folders_in(files) or [""]
    depth = min((len(file.folders) for file in files if is_image(file.path)), default=0)
    if depth > 1 and not more and outer not in (class_names or ()):
        warn_of_left_out(root, _count_beside(files))
        root, files = _enter(root, outer, files)
    if chosen := choose_parts(root, _folders_in(files)):
        warn_of_left_out(root, _count_beside(files))
        parts = {part: _enter(root, name, files) for part, name in chosen.items()}
    else:
        parts = {TRAIN: (root, files)}
    return {part: (each, _list_classes(each, own)) for part, (each, own) in parts.items()}


def _enter(root: Path, name: str, files: Iterable[File]) -> tuple[Path, list[File]]:
    """Return a folder in the root, and the files in it."""
    return root / name, [file._replace(folders=file.folders[1:]) for file in files if file.folders[:1] == (name,)]


def _folders_in(files: Iterable[File]) -> dict[str, set[str]]:
    """Return the names of the folders, and of those in each of them."""
    inside: dict[str, set[str]] = {}
    for name, *deeper in (file.folders for file in files if file.folders):
        inside.setdefault(name, set()).update(deeper[:1])
    return inside


def _count_beside(files: Iterable[File]) -> Counter[str]:
    """Count the files that are in no folder, by kind."""
    return Counter(f"{kind_of(file.path)} beside the folders" for file in files if file.path and not file.folders)


def _list_classes(root: Path, files: Sequence[File]) -> list[Labelled]:
    """Return the images in the folders of classes, with the class of each; log the other files."""
    others = {name: Counter[str]() for name in _folders_in(files)}
    if not others:
        kinds = Counter(kind_of(file.path) for file in files if file.path)
        held = f", but {show_kinds(kinds)}" if kinds else ""
        raise ValueError(f"{root} has no sub-folders{held}; {EXPECTED}")
    images = list[Labelled]()
    for name, path in ((file.folders[0], file.path) for file in files if file.folders):
        if path is not None and is_image(path):
            images.append(Labelled(path, name))
        elif path is not None:
            others[name][kind_of(path)] += 1
    if empty := others.keys() - {image.target for image in images}:
        name = min(empty)
        held = f"but {show_kinds(others[name])}" if others[name] else "and nothing else"
        raise ValueError(
            f"class folder {root / name} holds no image ({EXAMPLES}), {held}; add images to it, or remove it"
        )
    warn_of_left_out(root, sum(others.values(), _count_beside(files)))
    return images


def choose_parts(root: Path, inside: Mapping[str, set[str]]) -> dict[str, str]:
    """Return the folders that are parts of the data, by part; none if the folders are classes.

    The folders ``train``, ``val`` (``valid``, ``validation``) and ``test`` are parts if they have the same sub-folders,
    or if there are no others.

    >>> choose_parts(Path("animals"), {"train": {"cat", "dog"}, "val": {"dog"}})
    {'train': 'train', 'validation': 'val'}

    Args:
        root: The folder, for messages.
        inside: The names of the sub-folders of each folder in it.

    Raises:
        ValueError: folders have the same sub-folders, and only some of them, or not train, have such a name; or two
            are of the same part.
    """
    named = {PARTS[name.lower()]: name for name in inside if name.lower() in PARTS}
    if TRAIN not in named and len(named) == len(inside) > 1 and set.intersection(*inside.values()):
        return {part: named[part] for part in (VALIDATION, TEST)}
    if TRAIN not in named or len(named) == 1:
        alike = list(named.values() if len(named) > 1 else inside)
        if named and len(alike) > 1 and set.intersection(*(inside[name] for name in alike)):
            raise ValueError(
                f"{root}: {shortened(alike)} have the same sub-folders; name them train, val and test, or pass one of "
                "them; if they are classes, rename the one that is named as a part"
            )
        return {}
    others = [name for name in inside if name not in named.values()]
    if others and not any(inside[name] & inside[named[TRAIN]] for part, name in named.items() if part != TRAIN):
        return {}
    for name in others:
        if (part := PARTS.get(name.lower())) is not None:
            raise ValueError(f"{root}: {name} and {named[part]} are both of {part} images; join them, or remove one")
    if others:
        warn_of_others(root, shortened(others))
    for name in (name for part, name in named.items() if part != TRAIN and not inside[name]):
        logger.warning("%s: left out: no sub-folders, so its images are of no known class", printable(root / name))
    return {
        part: named[part]
        for part in (TRAIN, VALIDATION, TEST)
        if part in named and (part == TRAIN or inside[named[part]])
    }
