"""Tables of images: each row of a CSV, TSV or Parquet file has the path of an image and its class, labels or values."""

import csv
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backbone_finetune.names import shortened

from ...extras import import_extra
from ...text import printable
from .rows import Labelled, Row, choose_columns, find_column, require, sort_rows

logger = logging.getLogger(__name__)

PARQUET = ".parquet"
TABLES = (".csv", ".tsv", PARQUET)
DELIMITERS = ",;\t"  # spreadsheets write ; where a comma is in numbers
PATHS = ("path", "file", "filename", "file_name", "image")
Cells = Mapping[Any, Any]
COLUMNS = "; a table has path, label and, optionally, split and group; a CSV file names them in its first line"


def read_table(table: Path, values: Sequence[str] = (), group: str | None = None) -> dict[str, list[Labelled]]:
    """Read the paths and targets of each part of the data from a table.

    CSV and TSV are in UTF-8, and their first line names the columns, between commas, semicolons or tabs: those that it
    has most of. Paths are relative to the table's folder. For targets see `sort_rows`; ``values`` and ``group`` are
    columns.

    Raises:
        ModuleNotFoundError: it is a Parquet file, and pyarrow is not installed.
        ValueError: a column is missing or duplicated, none of the paths is a file, or as for `sort_rows`.
    """
    with _opened(table) as (names, read):
        path = str(find_column(table, names, PATHS, hint=COLUMNS))
        columns = choose_columns(table, names, values, group)
        read_rows = (Row(f"{table}, {place}", table, cells) for place, cells in read([path, *columns.names]))
        rows = [row._replace(path=table.parent / _read_path(row, path)) for row in read_rows]
    found, places = sort_rows(table, columns, rows), dict[Path, list[str]]()
    for row in rows:
        places.setdefault(row.path, []).append(row.place.removeprefix(f"{table}, "))
    if not any(each.is_file() for each in places):
        raise ValueError(
            f"{table}: none of its {len(places)} paths, relative to {table.parent}, is a file; the first: "
            f"{next(iter(places))}"
        )
    if repeated := [f"{each} ({', '.join(own)})" for each, own in places.items() if len(own) > 1]:
        logger.warning(
            "%s: in several rows, which all count: %d of %d images: %s",
            *(printable(table), len(repeated), len(places), printable(shortened(repeated))),
        )
    return found


def _read_path(row: Row, column: str) -> str:
    if any(row.cells.get(None) or ()):  # the key of cells beyond the columns
        raise ValueError(f"{row.place}: more cells than columns; put a text that has a separator in it in quotes")
    if isinstance(row.cells[column], dict | bytes):
        raise ValueError(
            f"{row.place}: {column} holds an image, not its path; convert the table with the package datasets, "
            "load_dataset('parquet', data_files=TABLE).save_to_disk(FOLDER), and pass the folder"
        )
    return require(row, column)


@contextmanager
def _opened(table: Path) -> Iterator[tuple[list[str], Callable[[Sequence[str]], Iterable[tuple[str, Cells]]]]]:
    """Open a table: the names of its columns, and a function that reads some of them, by row and its place.

    Errors of the readers are ValueErrors that name the table.
    """
    if table.suffix.lower() == PARQUET:
        parquet, pyarrow = import_extra("pyarrow.parquet", "parquet"), import_extra("pyarrow", "parquet")
        try:
            with parquet.ParquetFile(table) as file:

                def read(columns: Sequence[str]) -> Iterator[tuple[str, Cells]]:
                    cells = file.read(list(dict.fromkeys(columns))).to_pylist()
                    return ((f"row {number}", each) for number, each in enumerate(cells, 1))

                yield file.schema_arrow.names, read
        except pyarrow.ArrowException as error:
            raise ValueError(f"{table}: not a Parquet table ({str(error).splitlines()[0]})") from error
        return
    try:
        with open(table, encoding="utf-8-sig", newline="") as text:
            delimiter = max(DELIMITERS, key=text.readline().count)
            text.seek(0)
            reader = csv.DictReader(text, delimiter=delimiter, skipinitialspace=True, strict=True)
            yield list(reader.fieldnames or ()), lambda _: ((f"line {reader.line_num}", cells) for cells in reader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{table}: not in UTF-8 ({error}); save it so: spreadsheets call it CSV UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{table}: not a table ({error})") from error
