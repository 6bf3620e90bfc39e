"""Identical images: in two parts of the data, which makes an accuracy too high, or with two targets."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from backbone_finetune.names import shortened

from ...files import NO_FILE
from ...text import printable
from ..images import LabelledFolder
from .rows import TRAIN

logger = logging.getLogger(__name__)

NO_IMAGE = {NO_FILE, hashlib.sha256().hexdigest()}


@dataclass(frozen=True)
class Copy:
    """An image that equals another one, byte for byte; ``part`` and ``of_part`` are "train", "validation" or "test".

    Args:
        path: The image.
        part: Its part of the data.
        label: Its class; "" where targets are labels or values.
        of_path: The image that it equals, the first one of its part.
        of_part: The part of that: an earlier one, or the same if the targets differ.
        of_label: The class of that.
    """

    path: Path
    part: str
    label: str
    of_path: Path
    of_part: str
    of_label: str


def find_copies(parts: Mapping[str, LabelledFolder], digests: Mapping[Path, str]) -> tuple[Copy, ...]:
    """Find and log the images of each part that equal one with another target, or one in an earlier part.

    ``digests`` are those of their files. Empty and missing files are no images.
    """
    copies, first = list[Copy](), dict[tuple[str, str], int]()  # the first image of a part with a digest
    for name, images in parts.items():
        for index, path in enumerate(images.paths):
            first.setdefault((name, digests[path]), index)
            for earlier, others in parts.items() if digests[path] not in NO_IMAGE else ():
                other = first.get((earlier, digests[path]))
                if other is not None and (name != earlier or images.targets[index] != images.targets[other]):
                    labels = (_label(images, index), _label(others, other))
                    copies.append(Copy(path, name, labels[0], others.paths[other], earlier, labels[1]))
    copies.sort(key=lambda copy: (copy.part != copy.of_part, [*parts].index(copy.of_part), [*parts].index(copy.part)))
    _log(copies, parts)
    return tuple(copies)


def _log(copies: Sequence[Copy], parts: Mapping[str, LabelledFolder]) -> None:
    for (earlier, name), group in groupby(copies, key=lambda copy: (copy.of_part, copy.part)):
        found = list(group)
        shown, of_shown = ({TRAIN: "training"}.get(part, part) for part in (name, earlier))
        same, effect = f"also among the {of_shown} images", f", which makes the {name} accuracy too high"
        if name == earlier:
            same, effect = "the same as one with another target", ""
        logger.warning(
            "%d of %d %s images %s, byte for byte%s: %s",
            *(len(found), len(parts[name].paths), shown, f"{'is' if len(found) == 1 else 'are'} {same}", effect),
            printable(shortened([_describe(copy) for copy in found], separator="; ")),
        )


def _label(images: LabelledFolder, index: int) -> str:
    """Return the class of an image, if it has one."""
    target = images.targets[index]
    return images.class_names[target] if isinstance(target, int) else ""


def _describe(copy: Copy) -> str:
    """Return the paths of a pair, with their classes if these differ."""
    one, other = (f" ({label})" if copy.label != copy.of_label else "" for label in (copy.label, copy.of_label))
    return f"{copy.path}{one} is {'listed again' if copy.path == copy.of_path else copy.of_path}{other}"
