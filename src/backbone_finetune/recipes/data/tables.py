"""Tables of images: each row of a CSV or TSV file has the path of an image and its class, labels or values."""

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..text import join_some, one_line

TABLES = {".csv": ",", ".tsv": "\t"}  # the delimiter of each kind
PATHS = ("path", "file", "filename", "file_name", "image")
LABELS = ("label", "class", "target")
SEVERAL = "labels"  # an image has any number of them
SEPARATORS = "[;|]"  # between the labels of an image
SPLITS = ("split", "subset")

TRAIN, VALIDATION, TEST = "train", "validation", "test"
PARTS = {"train": TRAIN, "training": TRAIN, "val": VALIDATION, "valid": VALIDATION, "validation": VALIDATION}
PARTS |= {"test": TEST, "testing": TEST}


def read_table(table: Path, values: Sequence[str] = ()) -> dict[str, list[tuple[Path, Any]]]:
    """Read the paths and targets of each part of the data from a table in UTF-8 whose first line names the columns.

    A target is the text in the column ``label``, a tuple of the texts in the column ``labels``, e.g. "cat;dog" or
    "cat|dog", which may be empty, or a tuple of the numbers in the columns ``values``. Paths are relative to the
    table's folder, and sorted by label.

    Raises:
        ValueError: a column is missing or duplicated, a row lacks an entry or a number, a split is unknown, none
            of the paths is a file, or no row has the split "train".
    """
    found: dict[str, list[tuple[Path, Any]]] = {TRAIN: [], VALIDATION: [], TEST: []}
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=TABLES[table.suffix.lower()], strict=True)
            names = list(reader.fieldnames or ())
            path, split = (_find_column(table, names, known) for known in (PATHS, SPLITS))
            if missing := [name for name in values if names.count(name) != 1]:
                raise ValueError(f"{table}: no column {missing[0]}, or two; its columns are {_show(names)}")
            columns = values or [str(_find_column(table, names, (*LABELS, SEVERAL)))]
            several = not values and columns[0].strip().lower() == SEVERAL
            for row in reader:
                line = f"{table}, line {reader.line_num}"
                for column in filter(None, (path, split, *(() if several else columns))):
                    if not (row[column] or "").strip():
                        raise ValueError(f"{line}: no {column}; fill it in, or remove the row")
                part = row[split].strip() if split else TRAIN
                if part.lower() not in PARTS:
                    raise ValueError(f"{table}: split {part!r}; expected one of {', '.join(PARTS)}")
                target: Any = (row[columns[0]] or "").strip()
                if several:
                    target = tuple(filter(None, map(str.strip, re.split(SEPARATORS, target))))
                elif values:
                    target = tuple(_read_number(f"{line}: {column}", row[column]) for column in columns)
                found[PARTS[part.lower()]].append((table.parent / row[str(path)].strip(), target))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: not a table in UTF-8 ({error})") from error
    paths = [path for pairs in found.values() for path, _ in pairs]
    if not any(path.is_file() for path in paths):
        first = f"; the first: {paths[0]}" if paths else ""
        raise ValueError(f"{table}: none of its {len(paths)} paths, relative to {table.parent}, is a file{first}")
    if not found[TRAIN]:
        raise ValueError(f"{table}: no row has the split train")
    return {part: sorted(pairs, key=lambda pair: pair[1]) for part, pairs in found.items() if pairs}


def _find_column(table: Path, names: Sequence[str], known: Sequence[str]) -> str | None:
    found = [name for name in names if name.strip().lower() in known]
    if len(found) == 1 or (not found and known is SPLITS):
        return found[0] if found else None
    raise ValueError(
        f"{table}: its columns are {_show(names)}; expected one of {', '.join(known)}; the first line names them: "
        "path, label and, optionally, split"
    )


def _read_number(place: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{place} is {text.strip()!r}; expected a finite number")
    return number


def _show(names: Sequence[str]) -> str:
    return one_line(join_some(names, most=10)) or "none"
