"""Identical images: in two parts of the data, which makes an accuracy too high, or with two targets."""

import logging
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

from ..files import digest_file
from ..text import join_some, printable
from .images import LabelledFolder
from .tables import TRAIN

logger = logging.getLogger(__name__)


def warn_of_identical(parts: Mapping[str, LabelledFolder]) -> None:
    """Log the images of each part that are copies of images of an earlier part, or of one with another target."""
    digests = _digest_same_sizes(parts)
    first = {name: _index_first(images, digests) for name, images in parts.items()}

    def describe(name: str, earlier: str, index: int) -> str:
        pair = ((parts[name], index), (parts[earlier], first[earlier][digests[parts[name].paths[index]]]))
        differ = len({images.targets[place] for images, place in pair}) == 2
        return " is ".join(_describe(images, place, named=differ) for images, place in pair)

    def shown(name: str, earlier: str, indices: list[int]) -> tuple[str, str]:
        lines = [describe(name, earlier, index) for index in indices]
        return {TRAIN: "training"}.get(earlier, earlier), printable(join_some(lines, separator="; "))

    for name, images in parts.items():
        known = [(index, first[name][digests[path]]) for index, path in enumerate(images.paths) if path in digests]
        if doubtful := [index for index, other in known if images.targets[index] != images.targets[other]]:
            what, lines = shown(name, name, doubtful)
            logger.warning(
                "%d of %d %s images are the same as one with another target, byte for byte: %s",
                *(len(doubtful), len(images.paths), what, lines),
            )
    for earlier, name in combinations(parts, 2):
        images = parts[name]
        if copies := [index for index, path in enumerate(images.paths) if digests.get(path) in first[earlier]]:
            what, lines = shown(name, earlier, copies)
            logger.warning(
                "%d of %d %s images are %s images, byte for byte, which makes the %s accuracy too high: %s",
                *(len(copies), len(images.paths), name, what, name, lines),
            )


def _digest_same_sizes(parts: Mapping[str, LabelledFolder]) -> dict[Path, str]:
    """Digest the files that have the size of another one, or are listed twice; each is read once."""
    entries = [path for images in parts.values() for path in images.paths]
    sizes = {path: path.stat().st_size for path in dict.fromkeys(entries) if path.is_file()}
    counts = Counter(sizes[path] for path in entries if path in sizes)
    chosen = [path for path, size in sizes.items() if counts[size] > 1]
    with ThreadPoolExecutor() as threads:
        return dict(zip(chosen, threads.map(digest_file, chosen), strict=True))


def _index_first(images: LabelledFolder, digests: Mapping[Path, str]) -> dict[str, int]:
    """Return the first image with each digest."""
    first: dict[str, int] = {}
    for index, path in enumerate(images.paths):
        if path in digests:
            first.setdefault(digests[path], index)
    return first


def _describe(images: LabelledFolder, index: int, *, named: bool) -> str:
    """Return the path of an image, and its class if that is asked for and it has one."""
    target = images.targets[index]
    return f"{images.paths[index]}{f' ({images.class_names[target]})' if named and isinstance(target, int) else ''}"
