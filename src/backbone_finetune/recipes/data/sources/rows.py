"""Rows: each has an image and, in columns, its class, labels or values, and perhaps a split and a group."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backbone_finetune.names import shortened

from ...text import one_line

LABELS = ("label", "class", "target")
SEVERAL = "labels"  # an image has any number of them
SEPARATORS = "[;|]"  # between the labels of an image
SPLITS = ("split", "subset")
GROUPS = ("group",)

TRAIN, VALIDATION, TEST = "train", "validation", "test"
ALL = "all"  # of data that is not split, where it is evaluated
PARTS = {"train": TRAIN, "training": TRAIN, "val": VALIDATION, "valid": VALIDATION, "validation": VALIDATION}
PARTS |= {"test": TEST, "testing": TEST}


class Row(NamedTuple):
    """A row: where it is, for messages, its image, and its other cells by column."""

    place: str
    path: Path
    cells: Mapping[Any, Any]


class Labelled(NamedTuple):
    """An image with its target: the name of a class, names of labels, or numbers."""

    path: Path
    target: Any
    group: str | None = None


class Columns(NamedTuple):
    """The columns that are read: of targets of a kind, and of the split and the group, where there are such."""

    targets: tuple[str, ...]
    several: bool
    values: bool
    split: str | None
    group: str | None

    @property
    def names(self) -> list[str]:
        """Return the names of all columns."""
        return [*self.targets, *filter(None, (self.split, self.group))]


def choose_columns(source: Path, names: Sequence[str], values: Sequence[str], group: str | None) -> Columns:
    """Choose columns by their names; raise ValueError if one is missing or duplicated."""
    split = find_column(source, names, SPLITS, needed=False)
    for given in (*values, *([] if group is None else [group])):
        if (count := names.count(given)) != 1:
            found = f"{count} columns {given}" if count else f"no column {given}"
            raise ValueError(f"{source}: {found}; its columns are {show_names(names)}")
    if group is None:
        group = find_column(source, names, GROUPS, needed=False)
    if values:
        return Columns(tuple(values), False, True, split, group)
    target = str(find_column(source, names, (*LABELS, SEVERAL)))
    return Columns((target,), target.strip().lower() == SEVERAL, False, split, group)


def find_column(
    source: Path, names: Sequence[str], known: Sequence[str], *, hint: str = "", needed: bool = True
) -> str | None:
    """Return the one column that has a known name; None if there is none and none is needed."""
    found = [name for name in names if name.strip().lower() in known]
    if len(found) == 1 or not (found or needed):
        return found[0] if found else None
    several = f"; it has {len(found)} of these: rename or remove all but one" if found else ""
    expected = f"expected one of {', '.join(known)}{several}{hint}"
    raise ValueError(f"{source}: its columns are {show_names(names)}; {expected}")


def sort_rows(source: Path, columns: Columns, rows: Iterable[Row]) -> dict[str, list[Labelled]]:
    """Read the targets of each part of the data that has rows, sorted by target.

    A target is a text, a tuple of texts, e.g. of "cat;dog", "cat|dog" or a list, or a tuple of numbers.

    Raises:
        ValueError: a row lacks an entry or a number, a split is unknown, or there is no row.
    """
    found: dict[str, list[Labelled]] = {TRAIN: [], VALIDATION: [], TEST: []}
    for row in rows:
        split = TRAIN if columns.split is None else require(row, columns.split).lower()
        if split not in PARTS:
            raise ValueError(f"{row.place}: split {split!r}; expected one of {', '.join(PARTS)}")
        group = None if columns.group is None else require(row, columns.group)
        found[PARTS[split]].append(Labelled(row.path, _read_target(row, columns), group))
    if not any(found.values()):
        raise ValueError(f"{source}: it has no row")
    return {part: sorted(images, key=lambda image: image.target) for part, images in found.items() if images}


def _read_target(row: Row, columns: Columns) -> str | tuple[str, ...] | tuple[float, ...]:
    if columns.values:
        return tuple(_read_number(f"{row.place}: {name}", require(row, name)) for name in columns.targets)
    (name,) = columns.targets
    cell = row.cells.get(name)
    if columns.several:
        labels = cell if isinstance(cell, list) else re.split(SEPARATORS, as_text(cell))
        return tuple(filter(None, map(as_text, labels)))
    if isinstance(cell, list | dict):
        raise ValueError(f"{row.place}: {name} is a {type(cell).__name__}; name the column {SEVERAL} to train labels")
    return require(row, name)


def require(row: Row, column: str) -> str:
    """Return the text of a cell; raise ValueError if it is empty."""
    if text := as_text(row.cells.get(column)):
        return text
    raise ValueError(f"{row.place}: no {column}; fill it in, or remove the row")


def as_text(cell: Any) -> str:
    """Return a cell as text: "" where it is missing, and "3" for 3.0, as pandas stores whole numbers beside gaps."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return str(int(cell) if isinstance(cell, float) and cell.is_integer() else cell).strip()


def _read_number(place: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{place} is {text!r}; expected a finite number, such as 0.5")
    return number


def show_names(names: Sequence[str]) -> str:
    """Return the names of columns on one line."""
    return one_line(shortened(names, most=10)) or "none"
