"""Tables of images: a CSV or TSV file with the path and the class of an image in each row."""

import csv
from collections.abc import Sequence
from pathlib import Path

from ..text import join_some, one_line

TABLES = {".csv": ",", ".tsv": "\t"}  # the delimiter of each kind
PATHS = ("path", "file", "filename", "file_name", "image")
LABELS = ("label", "class", "target")
SPLITS = ("split", "subset")

TRAIN, VALIDATION, TEST = "train", "validation", "test"
PARTS = {"train": TRAIN, "training": TRAIN, "val": VALIDATION, "valid": VALIDATION, "validation": VALIDATION}
PARTS |= {"test": TEST, "testing": TEST}


def read_table(table: Path) -> dict[str, list[tuple[Path, str]]]:
    """Read paths and labels from a table in UTF-8 whose first line names its columns, by the part of the data.

    Paths are relative to the table's folder; they come in the order of the labels.

    Raises:
        ValueError: a column is missing or there twice, a row lacks an entry or is of an unknown part, none of the paths
            is a file, or none is of "train".
    """
    found: dict[str, list[tuple[Path, str]]] = {TRAIN: [], VALIDATION: [], TEST: []}
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=TABLES[table.suffix.lower()], strict=True)
            names = list(reader.fieldnames or ())
            path, label, split = (_find_column(table, names, known) for known in (PATHS, LABELS, SPLITS))
            for row in reader:
                for column in filter(None, (path, label, split)):
                    if not (row[column] or "").strip():
                        raise ValueError(f"{table}, line {reader.line_num}: no {column}; fill it in, or remove the row")
                part = row[split].strip() if split else TRAIN
                if part.lower() not in PARTS:
                    raise ValueError(f"{table}: split {part!r}; expected one of {', '.join(PARTS)}")
                found[PARTS[part.lower()]].append((table.parent / row[str(path)].strip(), row[str(label)].strip()))
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
    shown = one_line(join_some(names, most=10)) or "none"
    raise ValueError(
        f"{table}: its columns are {shown}; expected one of {', '.join(known)}; the first line names them: path, "
        "label and, optionally, split"
    )
