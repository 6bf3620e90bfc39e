"""The classes of images in tar files: class folders, or webdataset's samples.

timm's readers are not used: that of webdataset is a stream, which has no items by index, and ``ReaderImageInTar`` knows
neither parts nor columns.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...text import join_some
from .names import choose_parts, is_image, kind_of, warn_of_left_out
from .rows import LABELS, SEVERAL, SPLITS, TRAIN, Labelled, Row, choose_columns, sort_rows
from .tars import Member, Shards, read_shards

SIDECARS = ("cls", "json", "txt")  # beside an image, with the same name up to the first dot


def read_tars(
    root: Path, shards: Sequence[Path], values: Sequence[str] = (), group: str | None = None
) -> dict[str, list[Labelled]]:
    """Read the names of images and their targets, for each part of the data, from tar files.

    They are samples of webdataset, ``key.jpg`` with ``key.cls``, ``key.json`` or ``key.txt``, if there is a ``.cls``,
    or if the images are not in several folders. Otherwise folders are classes, and a tar file is the class of images in
    no folder. Tar files in a folder train, or with this word in their name, are the part train, and so on.

    Raises:
        ValueError: a file is no tar file, a sample has several images or no label, or as for `sort_rows`.
    """
    found = read_shards(root, shards)
    rows = _read_samples(found) if _are_samples(found.members) else _read_folders(found)
    warn_of_left_out(root, found.left_out)
    names = list(dict.fromkeys(name for row in rows for name in row.cells))
    return sort_rows(root, choose_columns(root, names, values, group), rows)


def _split_key(member: Member) -> tuple[tuple[Any, ...], str]:
    """Return the key of a sample, and the rest of the name after the first dot."""
    key, _, extension = member.parts[-1].partition(".")
    return (member.shard, *member.parts[:-1], key), extension.lower()


def _are_samples(members: Iterable[Member]) -> bool:
    images = [member for member in members if is_image(member.path)]
    keys = {_split_key(member)[0] for member in images}
    beside = {extension for key, extension in map(_split_key, members) if key in keys}
    folders = {member.parts[:-1] for member in images}
    return "cls" in beside or (len(folders) < 2 and not beside.isdisjoint(SIDECARS))


def _read_samples(found: Shards) -> list[Row]:
    """Read the columns of each sample from the files beside its image."""
    samples: dict[tuple[Any, ...], dict[str, Member]] = {}
    for member in found.members:
        key, extension = _split_key(member)
        samples.setdefault(key, {})[extension] = member
    rows = []
    for key, sample in samples.items():
        images = [member for member in sample.values() if is_image(member.path)]
        # An array beside an image is rather an embedding of it.
        images = [member for member in images if member.path.suffix.lower() != ".npy"] or images
        if len(images) > 1:
            names = join_some([member.parts[-1] for member in images])
            raise ValueError(f"{key[0]}: the sample {key[-1]} has {len(images)} images ({names}); leave one")
        for extension, member in sample.items():
            if member not in images and (extension not in SIDECARS or not images):
                found.left_out[kind_of(member.path)] += 1
        if images:
            rows.append(Row(str(images[0].path), images[0].path, _read_cells(sample, found.part_of[key[0]])))
    return rows


def _read_cells(sample: Mapping[str, Member], part: str | None) -> dict[str, Any]:
    """Return the columns of a sample: those in its ``.json``, and the class in ``.cls``, or else in ``.txt``."""
    texts: dict[str, Any] = {}
    for extension in (extension for extension in SIDECARS if extension in sample):
        path = sample[extension].path
        try:
            text = path.open().read().decode()
            texts[extension] = json.loads(text) if extension == "json" else text
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not {'JSON' if extension == 'json' else 'a text'} in UTF-8 ({error})") from error
    found = texts.get("json", {})
    cells: dict[str, Any] = (
        found if isinstance(found, dict) else {SEVERAL if isinstance(found, list) else LABELS[0]: found}
    )
    labelled = {name for name in cells if name.strip().lower() in {*LABELS, SEVERAL}}
    if "cls" in texts or ("txt" in texts and not labelled):
        cells = {name: cell for name, cell in cells.items() if name not in labelled}
        cells[LABELS[0]] = texts.get("cls", texts.get("txt"))
    if part is not None:
        cells = {name: cell for name, cell in cells.items() if name.strip().lower() not in SPLITS} | {SPLITS[0]: part}
    return cells


def _read_folders(found: Shards) -> list[Row]:
    """Return the images in folders, with their class and part as in a folder of classes, in order."""
    images = sorted(
        (member for member in found.members if is_image(member.path)),
        key=lambda member: (member.parts, str(member.shard)),
    )
    found.left_out.update(kind_of(member.path) for member in found.members if not is_image(member.path))
    if not images:
        raise ValueError(f"{found.root}: no image in {join_some([shard.name for shard in found.part_of])}")
    # A tar file often has one folder around those of the classes.
    is_wrapped = len({member.parts[0] for member in images}) == 1 and all(len(member.parts) > 2 for member in images)
    part_of_folder: dict[str, str] = {}
    if not any(found.part_of.values()):
        inside: dict[str, set[str]] = {}
        for folder, *deeper in filter(None, (member.parts[is_wrapped:-1] for member in images)):
            inside.setdefault(folder, set()).update(deeper[:1])
        part_of_folder = {folder: part for part, folder in choose_parts(found.root, inside).items()}
    rows = []
    for member in images:
        folders, part = member.parts[is_wrapped:-1], found.part_of[member.shard] or TRAIN
        if part_of_folder and folders:
            if folders[0] not in part_of_folder:
                continue
            part, folders = part_of_folder[folders[0]], folders[1:]
        if folders or (len(found.part_of) > 1 and not part_of_folder):
            cells = {LABELS[0]: folders[0] if folders else member.shard.stem, SPLITS[0]: part}
            rows.append(Row(str(member.path), member.path, cells))
        else:
            found.left_out[f"{kind_of(member.path)} beside the folders"] += 1
    if not rows:
        raise ValueError(f"{found.root}: its images are in no folders of classes")
    return rows
