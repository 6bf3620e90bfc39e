"""Tables in Parquet: as in CSV, with typed cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from image_folders import make_folder

from backbone_finetune.recipes import find_splits
from backbone_finetune.recipes.data.sources.tables import read_table

pytestmark = pytest.mark.clients
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write(path: Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    parquet.write_table(pyarrow.table(dict(columns)), path, row_group_size=3)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_folder(tmp_path, per_class=2)


PATHS = [f"{name}/{index}.png" for index in range(2) for name in ("red", "blue")]


def test_a_table_is_read_as_in_csv(root: Path) -> None:
    cells = {"path": PATHS, "label": ["warm", "cold"] * 2, "split": ["train", "train", "Val", "val"]}
    cells["group"] = ["a", "b", "c", "c"]
    (root / "table.csv").write_text("\n".join(map(",".join, [list(cells), *zip(*cells.values(), strict=True)])))
    table = write(root / "table.parquet", cells)
    assert read_table(table) == read_table(root / "table.csv")
    assert find_splits(table)["validation"].paths == (root / "blue/1.png", root / "red/1.png")


def test_typed_cells(root: Path) -> None:
    numbers = write(root / "numbers.parquet", {"path": PATHS, "label": [3.0, 12.0, 3.0, 12.0], "group": [1, 2, 3, 4]})
    found = find_splits(numbers)["train"]
    assert (found.class_names, found.groups) == (("12", "3"), ("2", "4", "1", "3"))
    lists = write(root / "lists.parquet", {"path": PATHS, "labels": [["cat", "dog"], [], None, ["dog"]]})
    found = find_splits(lists)["train"]
    assert found.class_names == ("cat", "dog")
    assert sorted(found.targets) == [(0, 0), (0, 0), (0, 1), (1, 1)]
    texts = write(root / "texts.parquet", {"path": PATHS, "labels": ["cat;dog", "", None, "dog"]})
    assert find_splits(texts)["train"].targets == found.targets
    values = write(root / "values.parquet", {"path": PATHS, "age": [1.5, 2.0, 3.0, 4.0]})
    assert find_splits(values, values=["age"])["train"].targets == ((1.5,), (2.0,), (3.0,), (4.0,))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": [1]}, r"its columns are id; expected one of path, .*; a table has path, label and, optionally, split"),
        ({"path": PATHS[:2], "label": ["red", None]}, r"t\.parquet, row 2: no label; fill it in, or remove the row"),
        ({"path": PATHS[:2], "label": [1.0, math.nan]}, r"t\.parquet, row 2: no label"),
        ({"path": PATHS[:2], "label": [["red"], ["blue"]]}, r"row 1: label is a list; name the column labels"),
        (
            {"path": ["a.png", "b.png"], "label": ["a", "b"]},
            r"none of its 2 paths, relative to .*: .*a\.png",
        ),
        (
            {"image": [{"bytes": b"GIF", "path": None}], "label": [0]},
            r"row 1: image holds an image, not its",
        ),
        ({"path": PATHS, "label": ["a"] * 4, "split": ["dev"] * 4}, r"split 'dev'; expected one of train"),
    ],
)
def test_wrong_tables_raise(root: Path, columns: Mapping[str, Sequence[Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_splits(write(root / "t.parquet", columns))


def test_another_file_raises(root: Path) -> None:
    (root / "t.parquet").write_text("path,label\n")
    with pytest.raises(ValueError, match=r"t\.parquet: not a Parquet table \(Parquet magic bytes not found"):
        find_splits(root / "t.parquet")
