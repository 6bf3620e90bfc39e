"""Samples of webdataset in tar files: an image, and beside it files with its class or columns.

timm's reader of them is not used: it is a stream, which has no items by index.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from backbone_finetune.names import shortened

from .folders import File
from .names import is_image, kind_of, warn_of_left_out
from .rows import LABELS, PARTS, SEVERAL, SPLITS, TRAIN, Labelled, Row, choose_columns, sort_rows

SIDECARS = ("cls", "json", "txt")  # beside an image, with the same name up to the first dot


def are_samples(files: Iterable[File]) -> bool:
    """Return whether an image has a ``.cls`` beside it; or a ``.json`` or ``.txt``, and images are in one folder."""
    samples = [sample for sample in _group(files) if _choose_images(sample)]
    beside = {_extension(path) for sample in samples for path in sample}
    folders = {path.relative_to(file.tar or "").parent for sample in samples for path, file in sample.items()}
    return "cls" in beside or (len(folders) == 1 and not beside.isdisjoint(SIDECARS))


def list_packed(files: Iterable[File]) -> list[Path]:
    """Return the images in tar files, sorted."""
    return sorted(path for sample in _group(files) for path in _choose_images(sample))


def read_samples(
    root: Path, files: Iterable[File], values: Sequence[str] = (), group: str | None = None
) -> dict[str, list[Labelled]]:
    """Read the images of each part of the data, with their targets, from the files beside them.

    Raises:
        ValueError: a sample has several images or no label, or as for `sort_rows`.
    """
    rows, left_out = [], Counter[str]()
    samples = _group(files)
    outer = {file.folders[:1] for sample in samples for file in sample.values()}
    parts = {folders: PARTS.get("".join(folders).lower()) for folders in outer}
    if None in parts.values() or TRAIN not in parts.values():
        parts = {}
    for sample in samples:
        images = _choose_images(sample)
        if len(images) > 1:
            names = shortened([image.name for image in images])
            key = images[0].name.partition(".")[0]
            raise ValueError(f"{images[0].parent}: the sample {key} has {len(images)} images ({names}); leave one")
        sidecars = {_extension(path): path for path in sample if images and _extension(path) in SIDECARS}
        left_out.update(kind_of(path) for path in sample if path not in (*images, *sidecars.values()))
        rows += [
            Row(str(image), image, _read_cells(sidecars, parts.get(sample[image].folders[:1]))) for image in images
        ]
    warn_of_left_out(root, left_out)
    columns = choose_columns(root, list(dict.fromkeys(name for row in rows for name in row.cells)), values, group)
    return sort_rows(root, columns, rows)


def _group(files: Iterable[File]) -> list[dict[Path, File]]:
    """Group files that have the same name up to the first dot, each by its path."""
    samples: dict[Path, dict[Path, File]] = {}
    for file in files:
        if file.path is not None:
            samples.setdefault(file.path.with_name(file.path.name.partition(".")[0]), {})[file.path] = file
    return list(samples.values())


def _choose_images(sample: Iterable[Path]) -> list[Path]:
    """Return the images of a sample; an array beside an image is rather an embedding of it."""
    images = [path for path in sample if is_image(path)]
    return [path for path in images if path.suffix.lower() != ".npy"] or images


def _extension(path: Path) -> str:
    return path.name.partition(".")[2].lower()


def _read_cells(sidecars: Mapping[str, Path], part: str | None) -> dict[str, Any]:
    """Return the columns of a sample: those in its ``.json``, and the class in ``.cls``, or else in ``.txt``."""
    texts = {extension: _read_text(path) for extension, path in sidecars.items()}
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


def _read_text(path: Path) -> Any:
    """Read a text, or the value in a ``.json`` file."""
    is_json = _extension(path) == "json"
    try:
        text = path.open("rb").read().decode()
        return json.loads(text) if is_json else text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not {'JSON' if is_json else 'a text'} in UTF-8 ({error})") from error
