"""Which files are images, by their names; and messages about others."""

import logging
from collections import Counter
from pathlib import Path

from PIL import Image

from backbone_finetune.names import shortened

from ...text import printable

logger = logging.getLogger(__name__)

# All suffixes that Pillow can read without EPS, which runs Ghostscript, and without formats that have no decoder.
NO_DECODER = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
IMAGE_EXTENSIONS = frozenset(
    extension
    for extension, name in Image.registered_extensions().items()
    if name in Image.OPEN and name not in NO_DECODER
) | {".npy"}
EXAMPLES = ".jpg, .png, .webp, all that Pillow reads, and .npy"


def is_image(path: Path | None) -> bool:
    """Return whether a path is of a file that has the suffix of an image."""
    return path is not None and path.suffix.lower() in IMAGE_EXTENSIONS


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is left out without a message; macOS adds ``__MACOSX`` to archives."""
    return name.startswith(".") or name == "__MACOSX"


def kind_of(path: Path) -> str:
    """Return the kind of a file, for messages."""
    return path.suffix.lower() or "without a suffix"


def show_kinds(kinds: Counter[str]) -> str:
    """Return the numbers of files by kind, for messages."""
    return printable(shortened([f"{count} {kind}" for kind, count in kinds.most_common()], most=10))


def warn_of_left_out(root: Path, kinds: Counter[str]) -> None:
    """Log the files that are not used, by kind."""
    if kinds:
        count = f"{kinds.total()} file{'s' * (kinds.total() != 1)}"
        logger.warning("%s: %s left out: %s", printable(root), count, show_kinds(kinds))


def warn_of_others(root: Path, names: str) -> None:
    """Log the names of what is beside the parts of the data, and is not used."""
    logger.warning("%s: left out: %s; only train, val and test are used", printable(root), printable(names))
