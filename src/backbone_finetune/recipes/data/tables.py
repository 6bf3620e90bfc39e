"""Tables of images: a CSV or TSV file with the path and the class of an image in each row."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..text import join_some, one_line

TABLES = {".csv": ",", ".tsv": "\t"}  # the delimiter of each kind
PATHS = ("path", "file", "filename", "file_name", "image")
LABELS = ("label", "class", "target")
SPLITS = ("split", "subset")


class Row(NamedTuple):
    """An image, its class, and the part of the data that it belongs to, if the table says so."""

    path: Path
    label: str
    split: str | None


def read_table(table: Path) -> list[Row]:
    """Read the rows of a table in UTF-8, whose first line names its columns; paths are relative to its folder.

    Raises:
        ValueError: a column is missing or there twice, a row lacks an entry, or none of the paths is a file.
    """
    rows = []
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=TABLES[table.suffix.lower()], strict=True)
            names = list(reader.fieldnames or ())
            path, label, split = (_find_column(table, names, known) for known in (PATHS, LABELS, SPLITS))
            for row in reader:
                for column in filter(None, (path, label, split)):
                    if not (row[column] or "").strip():
                        raise ValueError(f"{table}, line {reader.line_num}: no {column}; fill it in, or remove the row")
                part = row[split].strip() if split else None
                rows.append(Row(table.parent / row[str(path)].strip(), row[str(label)].strip(), part))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: not a table in UTF-8 ({error})") from error
    if not any(row.path.is_file() for row in rows):
        first = f"; the first: {rows[0].path}" if rows else ""
        raise ValueError(f"{table}: none of its {len(rows)} paths, relative to {table.parent}, is a file{first}")
    return rows


def _find_column(table: Path, names: Sequence[str], known: Sequence[str]) -> str | None:
    found = [name for name in names if name.strip().lower() in known]
    if len(found) == 1 or (not found and known is SPLITS):
        return found[0] if found else None
    shown = one_line(join_some(names, most=10)) or "none"
    raise ValueError(
        f"{table}: its columns are {shown}; expected one of {', '.join(known)}; the first line names them: path, "
        "label and, optionally, split"
    )
