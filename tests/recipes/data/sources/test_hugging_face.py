"""Datasets of Hugging Face on disk: images in rows, classes by their names, splits and groups."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from image_folders import make_folder

from backbone_finetune.recipes import data_fingerprint, find_images, find_splits
from backbone_finetune.recipes.data.images import ImageDataset, read_image
from backbone_finetune.recipes.data.sources.finding import list_images
from backbone_finetune.recipes.data.sources.parts import find_data

pytestmark = pytest.mark.clients
datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()
COLOURS = ("red", "blue", "green")


@pytest.fixture
def images(tmp_path: Path) -> list[dict[str, Any]]:
    """Return two images of each of three classes as rows."""
    root = make_folder(tmp_path / "folder", per_class=2)
    paths = [root / name / f"{index}.png" for name in COLOURS for index in range(2)]
    return [{"path": path.name, "bytes": path.read_bytes()} for path in paths]


def make(images: Sequence[Any], **columns: tuple[Any, Sequence[Any]]) -> Any:
    """Return a dataset of images and of typed columns."""
    features = {"image": datasets.Image(), **{name: feature for name, (feature, _) in columns.items()}}
    cells = {"image": images, **{name: values for name, (_, values) in columns.items()}}
    return datasets.Dataset.from_dict(cells, features=datasets.Features(features))


def save(dataset: Any, path: Path) -> Path:
    dataset.save_to_disk(path)
    return path


CLASSES = datasets.ClassLabel(names=list(COLOURS))
TEXT = datasets.Value("string")


def test_a_dataset_is_read_as_the_folder(tmp_path: Path, images: list[Any]) -> None:
    root = save(make(images, label=(CLASSES, [0, 0, 1, 1, 2, 2])), tmp_path / "saved")
    found, folder = find_images(root), find_images(tmp_path / "folder")
    assert (found.class_names, found.targets) == (folder.class_names, folder.targets)
    assert [path.open().read() for path in found.paths] == [path.read_bytes() for path in folder.paths]
    assert found.paths[0] == root / "2-0.png"
    copied = pickle.loads(pickle.dumps(found))
    assert read_image(copied.paths[5]).tobytes() == read_image(folder.paths[5]).tobytes()
    assert len({data_fingerprint(ImageDataset(each, None)) for each in (found, copied)}) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "column", "expected"),
    [
        ("label", (datasets.Value("int64"), [3, 3, 12, 12, 3, 3]), ("12", "3")),
        ("label", (TEXT, ["b", "b", "a", "a", "b", "b"]), ("a", "b")),
        ("breed", (CLASSES, [0, 0, 1, 1, 0, 0]), ("blue", "red")),
        ("labels", (CLASSES, [0, 0, 1, 1, 0, 0]), ("blue", "red")),
        ("labels", (datasets.List(CLASSES), [[0, 1], [], [2], [0], [1], [0]]), ("blue", "green", "red")),
        ("labels", (datasets.List(TEXT), [["a", "b"], [], ["a"], ["a"], [], []]), ("a", "b")),
    ],
)
def test_columns_of_classes_and_labels(
    tmp_path: Path, images: list[Any], name: str, column: tuple[Any, list[Any]], expected: tuple[str, ...]
) -> None:
    found = find_images(save(make(images, **{name: column}), tmp_path / "saved"))
    assert found.class_names == expected
    assert isinstance(found.targets[0], int) == (not isinstance(column[1][0], list))


def test_splits_and_groups(tmp_path: Path, images: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    whole = make(
        images,
        label=(CLASSES, [0, 0, 1, 1, 0, 1]),
        patient=(datasets.Value("int64"), [0, 1, 0, 1, 0, 1]),
        age=(datasets.Value("float32"), [1.5, 2, 3, 4, 5, 6]),
        split=(TEXT, ["train", "train", "train", "train", "test", "test"]),
    )
    assert [len(part.paths) for part in find_splits(save(whole, tmp_path / "column")).values()] == [4, 2]
    unknown = make(images[:1], label=(CLASSES, [-1]), patient=(datasets.Value("int64"), [7]))
    splits = {"train": whole, "validation": whole.select([1, 3, 5]), "unsupervised": whole, "test": unknown}
    root = save(datasets.DatasetDict(splits), tmp_path / "saved")
    parts = find_splits(root, group="patient")
    assert {part: found.groups for part, found in parts.items()} == {
        "train": ("0", "1", "1", "0", "1", "0"),
        "validation": ("1", "1", "1"),
    }
    assert caplog.messages == [
        f"{root}: left out: unsupervised; only train, val and test are used",
        f"{root / 'test'}: left out: no row of it has a label",
    ]
    del splits["test"]
    assert find_splits(save(datasets.DatasetDict(splits), tmp_path / "values"), values=["age"])[
        "validation"
    ].targets == (
        (2.0,),
        (4.0,),
        (6.0,),
    )
    parts = find_data(save(whole.remove_columns("split"), tmp_path / "one"), test_share=0.5, seed=0, group="patient")
    assert len(set(parts["train"].groups or ())) == len(set(parts["test"].groups or ())) == 1


def test_each_split_has_its_own_columns(tmp_path: Path, images: list[Any]) -> None:
    train = make(images, label=(CLASSES, [0, 0, 1, 1, 2, 2]), group=(TEXT, list("aabbcc")))
    texts = make(images[2:4], Class=(TEXT, ["blue", "red"]))
    splits = {"test": texts, "train": train}
    parts = find_splits(save(datasets.DatasetDict(splits), tmp_path / "saved"))
    assert {part: (found.targets, found.groups) for part, found in parts.items()} == {
        "train": ((0, 0, 1, 1, 2, 2), ("b", "b", "c", "c", "a", "a")),
        "test": ((0, 2), None),
    }
    several = make(images[:1], labels=(datasets.List(TEXT), [["red"]]))
    save(datasets.DatasetDict({**splits, "val": several}), tmp_path / "kinds")
    message = r"kinds/val: Class of test and labels of val are targets of two kinds; rename one column"
    with pytest.raises(ValueError, match=message):
        find_splits(tmp_path / "kinds")
    save(datasets.DatasetDict({**splits, "val": texts.remove_columns("Class")}), tmp_path / "none")
    with pytest.raises(ValueError, match=r"none/val: its columns are image; expected one of label, class, target"):
        find_splits(tmp_path / "none")
    with pytest.raises(ValueError, match=r"saved/test: no column group; its columns are image, Class"):
        find_splits(tmp_path / "saved", group="group")
    with pytest.raises(ValueError, match=r"tests: its splits are test; expected train and"):
        find_splits(save(datasets.DatasetDict(test=texts), tmp_path / "tests"))


def test_datasets_without_rows_or_train(tmp_path: Path, images: list[Any]) -> None:
    whole, empty = make(images[2:4], label=(CLASSES, [1, 0])), make([], label=(CLASSES, []))
    for name, saved in (("empty", empty), ("split", datasets.DatasetDict(train=whole, test=empty))):
        for look in (find_images, list_images):
            with pytest.raises(
                ValueError, match=rf"{name}: it, or a split of it, has no row; save it with rows, or with"
            ):
                look(save(saved, tmp_path / name))
    tests = save(datasets.DatasetDict(test=whole), tmp_path / "tests")
    assert list(find_splits(tests, COLOURS)) == ["test"]  # to test a model of these classes


def test_images_are_listed_without_labels(tmp_path: Path, images: list[Any]) -> None:
    alone = make(images[:2])
    assert list_images(save(alone, tmp_path / "saved")) == [
        tmp_path / "saved" / name for name in ("0-0.png", "1-1.png")
    ]
    splits = datasets.DatasetDict({"all": alone, "test": make(images[2:3], label=(CLASSES, [-1]))})
    found = list_images(save(splits, tmp_path / "splits"))
    assert [path.relative_to(tmp_path / "splits") for path in found] == [
        Path("all/0-0.png"),
        Path("all/1-1.png"),
        Path("test/0-0.png"),
    ]
    assert found[2].open().read() == images[2]["bytes"]


def test_images_that_are_files_or_missing(tmp_path: Path, images: list[Any]) -> None:
    file = tmp_path / "folder" / "red" / "0.png"
    found = find_images(save(make([str(file), None, images[2]], label=(CLASSES, [0, 0, 1])), tmp_path / "saved"))
    paths = {path.name: path for path in found.paths}
    assert paths["0-0.png"].open().read() == file.read_bytes()
    with pytest.raises(ValueError, match=r"saved/1: not a readable image"):
        read_image(paths["1"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": (CLASSES, [0, None])}, r"saved, row 1: no label; fill it in, or remove the row"),
        ({"a": (CLASSES, [0, 1]), "b": (CLASSES, [0, 1])}, r"its columns are image, a, b; expected one of label"),
        ({"label": (datasets.List(TEXT), [["a"], ["b"]])}, r"label is a list; name the column labels"),
    ],
)
def test_wrong_datasets_raise(tmp_path: Path, images: list[Any], columns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_images(save(make(images[:2], **columns), tmp_path / "saved"))


def test_a_dataset_without_images_raises(tmp_path: Path) -> None:
    saved = save(datasets.Dataset.from_dict({"label": [0, 1]}), tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved: its columns are label; expected one of type Image"):
        find_images(saved)
    parts = save(datasets.DatasetDict({"all": datasets.load_from_disk(saved)}), tmp_path / "parts")
    with pytest.raises(ValueError, match=r"parts: its splits are all; expected train and, optionally, val and test"):
        find_images(parts)
