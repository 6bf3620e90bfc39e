"""Tables of images: each row of a CSV, TSV or Parquet file has the path of an image and its class, labels or values."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...extras import import_extra
from .rows import Labelled, Row, choose_columns, find_column, require, sort_rows

DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLES = (*DELIMITERS, ".parquet")
PATHS = ("path", "file", "filename", "file_name", "image")
COLUMNS = "path, label and, optionally, split and group"


def read_table(table: Path, values: Sequence[str] = (), group: str | None = None) -> dict[str, list[Labelled]]:
    """Read the paths and targets of each part of the data from a table.

    CSV and TSV are in UTF-8, and their first line names the columns. Paths are relative to the table's folder. For
    targets see `sort_rows`; ``values`` and ``group`` are columns.

    Raises:
        ModuleNotFoundError: it is a Parquet file, and pyarrow is not installed.
        ValueError: a column is missing or duplicated, none of the paths is a file, or as for `sort_rows`.
    """
    has_header = table.suffix.lower() in DELIMITERS
    names, hint = _read_names(table), f"; {'the first line names them' if has_header else 'a table has'}: {COLUMNS}"
    path = str(find_column(table, names, PATHS, hint=hint))
    columns = choose_columns(table, names, values, group, hint)
    rows = (Row(place, table, cells) for place, cells in _read_cells(table, [path, *columns.names]))
    found = sort_rows(table, columns, (row._replace(path=table.parent / _read_path(row, path)) for row in rows))
    paths = [image.path for images in found.values() for image in images]
    if not any(each.is_file() for each in paths):
        raise ValueError(
            f"{table}: none of its {len(paths)} paths, relative to {table.parent}, is a file; the first: {paths[0]}"
        )
    return found


def _read_path(row: Row, column: str) -> str:
    if isinstance(row.cells[column], dict | bytes):
        raise ValueError(
            f"{row.place}: {column} holds an image, not its path; convert the table with the package datasets, "
            "load_dataset('parquet', data_files=TABLE).save_to_disk(FOLDER), and pass the folder"
        )
    return require(row, column)


def _read_names(table: Path) -> list[str]:
    """Return the names of the columns."""
    if table.suffix.lower() not in DELIMITERS:
        with _explained(table):
            return [str(name) for name in import_extra("pyarrow.parquet", "parquet").read_schema(table).names]
    with _opened(table) as reader:
        return list(reader.fieldnames or ())


def _read_cells(table: Path, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the cells of each row, and where they are."""
    if table.suffix.lower() in DELIMITERS:
        with _opened(table) as reader:
            for row in reader:
                yield f"{table}, line {reader.line_num}", row
        return
    with _explained(table), import_extra("pyarrow.parquet", "parquet").ParquetFile(table) as file:
        number = 0
        for batch in file.iter_batches(columns=list(dict.fromkeys(columns))):
            for cells in batch.to_pylist():
                number += 1
                yield f"{table}, row {number}", cells


@contextmanager
def _opened(table: Path) -> Iterator["csv.DictReader[str]"]:
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            yield csv.DictReader(file, delimiter=DELIMITERS[table.suffix.lower()], strict=True)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: not a table in UTF-8 ({error})") from error


@contextmanager
def _explained(table: Path) -> Iterator[None]:
    """Name the file in pyarrow's errors."""
    try:
        yield
    except import_extra("pyarrow", "parquet").ArrowException as error:
        raise ValueError(f"{table}: not a Parquet table ({str(error).splitlines()[0]})") from error
