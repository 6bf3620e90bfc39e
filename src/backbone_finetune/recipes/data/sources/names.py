"""What the names of files and folders say: which files are images, and which folders are parts of the data."""

import logging
from collections import Counter
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

from PIL import Image

from ...text import join_some, printable
from .rows import PARTS, TRAIN

logger = logging.getLogger(__name__)

# All suffixes that Pillow can read without EPS, which runs Ghostscript, and without formats that have no decoder.
NO_DECODER = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
IMAGE_EXTENSIONS = frozenset(
    extension
    for extension, name in Image.registered_extensions().items()
    if name in Image.OPEN and name not in NO_DECODER
) | {".npy"}
EXAMPLES = ".jpg, .png, .webp, all that Pillow reads, and .npy"


def is_image(path: Path) -> bool:
    """Return whether a file has the suffix of an image."""
    return path.suffix.lower() in IMAGE_EXTENSIONS


def kind_of(path: Path) -> str:
    """Return the kind of a file, for messages."""
    return path.suffix.lower() or "without a suffix"


def show_kinds(kinds: Counter[str]) -> str:
    """Return the numbers of files by kind, for messages."""
    return printable(join_some([f"{count} {kind}" for kind, count in kinds.most_common()], most=10))


def warn_of_left_out(root: Path, kinds: Counter[str]) -> None:
    """Log the files that are not used, by kind."""
    if kinds:
        logger.warning("%s: %d files left out: %s", *(printable(root), kinds.total(), show_kinds(kinds)))


def warn_of_others(root: Path, names: str) -> None:
    """Log the names of what is beside the parts of the data, and is not used."""
    logger.warning("%s: left out: %s; only train, val and test are used", printable(root), printable(names))


def choose_parts(root: Path, inside: Mapping[str, AbstractSet[str]]) -> dict[str, str]:
    """Return the folders that are parts of the data, by part; none if the folders are classes.

    The folders ``train``, ``val`` (``valid``, ``validation``) and ``test`` are parts if they have the same sub-folders,
    or if there are no others.

    >>> choose_parts(Path("animals"), {"train": {"cat", "dog"}, "val": {"dog"}})
    {'train': 'train', 'validation': 'val'}

    Args:
        root: The folder, for messages.
        inside: The names of the sub-folders of each folder in it.

    Raises:
        ValueError: there are such folders, and no train.
    """
    named = {PARTS[name.lower()]: name for name in inside if name.lower() in PARTS}
    if TRAIN not in named and len(named) > 1 and set.intersection(*(set(inside[name]) for name in named.values())):
        raise ValueError(
            f"{root}: {join_some(list(named.values()))} have the same sub-folders, and there is no train; add a folder "
            "train, or pass one of them"
        )
    are_same = TRAIN in named and any(
        inside[name] & inside[named[TRAIN]] for part, name in named.items() if part != TRAIN
    )
    if TRAIN not in named or not (are_same or len(named) == len(inside)):
        return {}
    if others := [name for name in inside if name not in named.values()]:
        warn_of_others(root, join_some(others))
    for name in (name for part, name in named.items() if part != TRAIN and not inside[name]):
        logger.warning("%s: left out: no sub-folders, so its images are of no known class", printable(root / name))
    return {part: name for part, name in named.items() if part == TRAIN or inside[name]}
