"""Finding images: class folders, train, val and test folders, links, tables, and files that are left out."""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from image_folders import make_folder, make_image

from backbone_finetune.recipes import LabelledFolder, find_images, find_splits
from backbone_finetune.recipes.data.sources.finding import list_images
from backbone_finetune.recipes.data.sources.identical import find_copies
from backbone_finetune.recipes.data.sources.packed import PackedPath
from backbone_finetune.recipes.data.sources.parts import find_data
from backbone_finetune.recipes.files import digest_files

NAMES = ("blue", "green", "red")


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def find(path: Path, **arguments: Any) -> list[LabelledFolder]:
    """Find what there is of train, validation and test, and what is identical."""
    parts = find_data(path, **arguments, test_share=0.3, seed=0)
    find_copies(parts, digest_files(each for images in parts.values() for each in images.paths))
    return list(parts.values())


@pytest.mark.parametrize("folders", [("val", "test"), ("train", "dev"), ("train", "Train")])
def test_folders_of_the_same_classes_that_are_no_known_parts_are_refused(
    tmp_path: Path, folders: tuple[str, ...]
) -> None:
    for name in folders:
        make_folder(tmp_path / name, per_class=2)
    touch(tmp_path, *(["extra/1.jpg"] if "val" in folders else []))
    names = ", ".join(sorted(folders))
    message = f"{names} have the same sub-folders; name them train, val and test, or pass one of them"
    for class_names in (None, NAMES):
        with pytest.raises(ValueError, match=message):
            find_splits(tmp_path, class_names)


def test_parts_without_train_can_be_tested_on(tmp_path: Path) -> None:
    for name in ("val", "test"):
        make_folder(tmp_path / name, per_class=2)
    assert list(find_splits(tmp_path, NAMES)) == ["validation", "test"]
    with pytest.raises(ValueError, match="its splits are validation, test; expected train"):
        find_splits(tmp_path)


@pytest.mark.parametrize("train", ["train", "Train", "training"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "test", "Testing"])
def test_train_and_val_folders_are_not_classes(tmp_path: Path, train: str, val: str) -> None:
    make_folder(tmp_path / train)
    make_folder(tmp_path / val, per_class=2)
    parts = find_splits(tmp_path)
    assert list(parts) == ["train", "test" if val.lower().startswith("test") else "validation"]
    assert {found.class_names for found in parts.values()} == {NAMES}
    assert [len(found.paths) for found in find(tmp_path)] == [18, 6]
    with pytest.raises(ValueError, match=r"is split in train, (test|validation); pass one of these, or call find_spl"):
        find_images(tmp_path)


def test_val_and_test_folders_are_used_as_such(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, count in (("train", 3), ("val", 2), ("test", 1), ("extra", 1)):
        make_folder(tmp_path / name, per_class=count)
    caplog.set_level("INFO")
    assert [len(found.paths) for found in find(tmp_path)] == [9, 6, 3]
    assert f"{tmp_path}: left out: extra; only train, val and test are used" in caplog.messages
    for part, folder, count in (("train", "train", 9), ("validation", "val", 6), ("test", "test", 3)):
        assert f"{part}: {count} images from {tmp_path / folder}" in caplog.messages
    counts = "blue 3 + 2 + 1, green 3 + 2 + 1, red 3 + 2 + 1"
    assert f"images by class, train + validation + test: {counts}" in caplog.messages


@pytest.mark.parametrize(
    ("folders", "chooses", "expected"),
    [
        (("val",), None, [30, 0, 6]),  # nothing is chosen on them: the model is tested on them
        (("val",), False, [30, 0, 6]),
        (("val",), True, [30, 6, 0]),
        (("test",), None, [30, 0, 6]),
        (("test",), True, [24, 6, 6]),
        (("val", "test"), None, [30, 6, 6]),
        (("val", "test"), False, [30, 6, 6]),
        ((), None, [21, 0, 9]),
        ((), True, [18, 3, 9]),  # a fifth of each class of the 21
    ],
)
def test_what_is_chosen_on_is_not_tested_on(
    tmp_path: Path, folders: tuple[str, ...], chooses: bool | None, expected: list[int]
) -> None:
    make_folder(tmp_path / "train", per_class=10)
    for name in folders:
        make_folder(tmp_path / name, per_class=2)
    parts = find_data(tmp_path, chooses=chooses, test_share=0.3, seed=0)
    assert [len(parts[name].paths) if name in parts else 0 for name in ("train", "validation", "test")] == expected
    paths = [path for part in parts.values() for path in part.paths]
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("pair", [("val", "valid"), ("test", "Testing"), ("train", "training")])
def test_two_folders_of_one_part_are_refused(tmp_path: Path, pair: tuple[str, str]) -> None:
    for name in {"train", "val", "test", *pair}:
        make_folder(tmp_path / name, per_class=2)
    with pytest.raises(ValueError, match=r": (\w+) and \w+ are both of \w+ images; join them, or remove one") as caught:
        find_splits(tmp_path)
    assert all(name in str(caught.value) for name in pair)


def test_a_share_of_a_train_folder_alone_is_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path / "train", per_class=10)
    caplog.set_level("INFO")
    assert [len(found.paths) for found in find(tmp_path)] == [21, 9]
    assert f"test: 9 images from {tmp_path / 'train'}, 30 % of each class, held out" in caplog.messages


def test_one_folder_around_the_classes_is_entered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = touch(tmp_path / "data", "pets/cat/1.jpg", "pets/dog/1.jpg", "README")
    assert find_images(root).class_names == ("cat", "dog")
    assert caplog.messages == [f"{root}: 1 file left out: 1 without a suffix beside the folders"]
    nested = touch(tmp_path / "nested", "cat/2023/1.jpg", "cat/2024/1.jpg")
    assert find_images(nested, ("cat", "dog")).targets == (0, 0)  # a class of the model is no such folder


def test_a_class_folder_without_images_raises(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "dog/1.heic", "dog/2.heic")
    with pytest.raises(ValueError, match=r"class folder .*dog holds no image \(.*\), but 2 \.heic; add images to it"):
        find_images(tmp_path)
    (tmp_path / "ant").mkdir()
    with pytest.raises(
        ValueError, match=r"class folder .*ant holds no image \(.*\), and nothing else; add images to it"
    ):
        find_images(tmp_path)


def test_a_class_may_have_the_name_train(tmp_path: Path) -> None:
    touch(tmp_path, "bus/1.jpg", "train/steam/1.jpg", "train/2.jpg", "test/deep/1.jpg")
    assert find_images(tmp_path).class_names == ("bus", "test", "train")


def test_a_part_may_lack_classes_but_not_have_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/dog/2.jpg", "test/3.jpg")
    parts = find_splits(tmp_path)
    assert {part: found.targets for part, found in parts.items()} == {"train": (0, 1), "validation": (1,)}
    assert f"{tmp_path / 'test'}: left out: no sub-folders, so its images are of no known class" in caplog.messages
    touch(tmp_path, "val/fox/1.jpg")
    with pytest.raises(ValueError, match=r"val: fox: not a class of this model, whose classes are cat, dog"):
        find_splits(tmp_path)


def test_parts_without_classes_raise(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.jpg", "test/2.jpg")
    with pytest.raises(
        ValueError, match=r"train has no sub-folders, but 1 \.jpg; expected a folder with a sub-folder of images per"
    ):
        find(tmp_path)


def test_parts_in_other_folders(tmp_path: Path) -> None:
    counts = {"data/train": 4, "data/val": 3, "other": 2, "third/train": 9, "third/test": 1, "third/val": 2}
    for name, count in counts.items():
        make_folder(tmp_path / name, per_class=count)
    data, other, third = (tmp_path / name for name in ("data", "other", "third"))
    assert [len(part.paths) for part in find(data, validation=other)] == [12, 6]
    assert [len(part.paths) for part in find(data, test=third)] == [12, 9, 3]
    assert [len(part.paths) for part in find(data, test=third, validation=third)] == [12, 6, 3]
    tests = tmp_path / "tests.csv"  # has no training images
    tests.write_text("path,label,split\nother/red/0.png,red,test\n")
    assert [len(part.paths) for part in find(data, test=tests)] == [12, 9, 1]
    assert [len(part.paths) for part in find(other, validation=data / "val", test=third / "test")] == [6, 9, 3]


def test_links_to_folders_are_followed_except_loops(tmp_path: Path) -> None:
    elsewhere = touch(tmp_path / "elsewhere", *(f"{index}.jpg" for index in range(5)), "deep/5.jpg")
    root = touch(tmp_path / "data", "cat/0.jpg", "cat/deep/1.jpg")
    for link, target in (
        ("dog", elsewhere),
        ("cat/more", elsewhere),
        ("cat/up", root / "cat"),
        ("loop", root),
        ("cat/all", root),
    ):
        (root / link).symlink_to(target)
    (root / "cat" / "deep" / "root").symlink_to(root / "cat")
    (elsewhere / "back").symlink_to(root / "cat" / "deep")
    found = find_images(root)
    assert found.class_names == ("cat", "dog")
    assert found.targets.count(0) == 9  # one of them also through the links `more` and `back`
    assert found.targets.count(1) == 7  # one of cat, through the link `back`
    assert len(list_images(root / "cat")) == 9


def test_a_link_to_a_folder_above_gives_a_class_no_images_of_others(tmp_path: Path) -> None:
    root = touch(tmp_path / "data", "cat/0.jpg", "dog/0.jpg", "dog/1.jpg")
    (root / "cat" / "up").symlink_to(root)
    (root / "dog" / "top").symlink_to(tmp_path)
    assert find_images(root).targets == (0, 1, 1)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all folders")
def test_an_unreadable_folder_raises(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "cat/deep/1.jpg", "dog/1.jpg")
    (tmp_path / "cat" / "deep").chmod(0)
    with pytest.raises(PermissionError, match="deep"):
        find_images(tmp_path)


def test_all_suffixes_of_pillow_are_images_and_other_files_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    suffixes = [".jfif", ".ppm", ".pgm", ".jpe", ".jp2", ".avif", ".BMP", ".tiff", ".jpg"]
    images = (f"cat/1{suffix}" for suffix in suffixes)
    touch(tmp_path, *images, "dog/1.webp", "dog/.hidden", ".git/1.png", "__MACOSX/1.png")
    assert [path.suffix for path in find_images(tmp_path).paths] == [*sorted(suffixes), ".webp"]
    assert not caplog.messages
    touch(tmp_path, "dog/a.txt", "dog/deep/b.TXT", "cat/README", "dog/c.eps", "stray.png")
    assert len(find_images(tmp_path).paths) == 10
    kinds = "2 .txt, 1 .png beside the folders, 1 without a suffix and 1 more"
    assert caplog.messages[0].startswith(f"{tmp_path}: 5 files left out: 2 .txt, "), kinds
    assert all(kind in caplog.messages[0] for kind in ("1 .png beside the folders", "1 without a suffix", "1 .eps"))


@pytest.mark.parametrize(
    ("name", "mark"), [("images.csv", ","), ("images.csv", ";"), ("images.csv", "\t"), ("images.TSV", "\t")]
)
def test_a_table_lists_images(tmp_path: Path, name: str, mark: str) -> None:
    make_folder(tmp_path / "data")
    rows = [
        ("image", " Label ", "id"),
        ("data/red/0.png", "warm, red", "1"),
        ("", "", ""),
        ("data/blue/1.png", "cold", "2"),
    ]
    text = "\r\n".join(mark.join(f'"{value}"' if value else "" for value in row).strip(mark) for row in rows)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = find_images(tmp_path / name)
    assert found.class_names == ("cold", "warm, red")
    assert found.paths == (tmp_path / "data/blue/1.png", tmp_path / "data/red/0.png")
    assert found.targets == (0, 1)
    assert find_images(tmp_path / name, ("warm, red", "other", "cold")).targets == (2, 0)
    (tmp_path / name).write_text(text.replace(f'{mark}"', f'{mark} "') + mark * 3)
    assert find_images(tmp_path / name) == found


def test_a_table_is_split_by_its_column(tmp_path: Path) -> None:
    make_folder(tmp_path)
    lines = ["filename,class,split"]
    lines += [f"{name}/{index}.png,{name},{'train' if index < 4 else 'Val'}" for index in range(6) for name in NAMES]
    table = tmp_path / "images.csv"
    table.write_text("\n".join(lines))
    train, test = find(table)
    assert [train.targets.count(target) for target in range(3)] == [4, 4, 4]
    assert [path.name for path in test.paths] == ["4.png", "5.png"] * 3
    with pytest.raises(ValueError, match=r"images\.csv is split in train, validation; pass one of these, or call"):
        find_images(table)
    table.write_text("path,label\n" + "\n".join(f"{name}/{index}.png,{name}" for index in range(6) for name in NAMES))
    assert [len(part.paths) for part in find(table)] == [12, 6]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"its columns are none; expected one of path, file, filename"),
        (
            b"id,breed\n1,pug",
            r"its columns are id, breed; expected one of path, file.*; a table has path, .*; a CSV file names them",
        ),
        (b"path,file,label\na,b,c", r"expected one of path, .*; it has 2 of these: rename or remove all but one"),
        (b"path,label,class\na,b,c", r"expected one of label, .*; it has 2 of these: rename or remove all but one"),
        (b"path,label\n0.png,red\n1.png\n", r"images\.csv, line 3: no label; fill it in, or remove the row"),
        (b"path,label\n,red\n", r"images\.csv, line 2: no path"),
        (b"path,label\n0.png,red\n1.png,red\n", r"images\.csv has one class only \(red\)"),
        (
            b"path,label\nno.png,red\nnone.png,blue\n",
            r"none of its 2 paths, relative to .*, is a file; the first: .*no\.",
        ),
        (b"path,label\n", r"images\.csv: it has no row"),
        (
            b"path,label\n0.png,red\n1.png,blue, dark\n",
            r"images\.csv, line 3: more cells than columns; put a text that",
        ),
        (b"path,label\n0.png,re\xff\n", r"images\.csv: not in UTF-8 \(.*\); save it so: spreadsheets"),
        ("path,label\n".encode("utf-16"), r"images\.csv: not in UTF-8"),
        (b'path,label\n0.png,"red\n', r"images\.csv: not a table \(unexpected end"),
        (b"path,label,split\n0.png,red,dev\n", r"split 'dev'; expected one of train, training, val"),
        (
            b"path,label,split\n0.png,red,test\n",
            r"images\.csv: its splits are test; expected train and, optionally, val and test",
        ),
        (b"path,label\n0.png,red\n1.png,blue\x1b[2J\n", r"class 'blue\\x1b\[2J' has control characters in its name"),
    ],
)
def test_invalid_tables_raise(tmp_path: Path, content: bytes, message: str) -> None:
    make_image(tmp_path / "0.png", (0, 0, 0))
    (tmp_path / "images.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        find(tmp_path / "images.csv")


def test_what_to_install_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    touch(tmp_path, "images.parquet", "saved/state.json")
    for name, extra in (("images.parquet", "parquet"), ("saved", "datasets")):
        with pytest.raises(ModuleNotFoundError, match=rf"run: pip install 'backbone-finetune\[{extra}\]'"):
            find_splits(tmp_path / name)


def test_images_in_both_parts_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path / "train")
    for name, other in (("red/a.png", (1, 2, 3)), ("blue/b.png", (4, 5, 6))):
        make_image(tmp_path / "test" / name, other)
    find(tmp_path)
    assert not caplog.messages
    shutil.copy(tmp_path / "train" / "red" / "3.png", tmp_path / "test" / "blue" / "copy.png")
    same_size = bytearray((tmp_path / "train" / "red" / "3.png").read_bytes())
    same_size[-1] ^= 1
    (tmp_path / "test" / "blue" / "other.png").write_bytes(same_size)
    (tmp_path / "test" / "blue" / "nowhere.png").symlink_to(tmp_path / "no such file")
    touch(tmp_path, "train/red/empty.png", "test/blue/empty.png")  # not images that are the same, but broken
    find(tmp_path)
    assert caplog.messages == [
        "1 of 6 test images is also among the training images, byte for byte, which makes the test accuracy too high: "
        f"{tmp_path}/test/blue/copy.png (blue) is {tmp_path}/train/red/3.png (red)"
    ]


def test_identical_images_of_two_classes_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder(tmp_path / "train")
    make_image(tmp_path / "test" / "red" / "a.png", (1, 2, 3))
    shutil.copy(root / "red" / "3.png", root / "red" / "same.png")  # harmless: of the same class, and part
    find(tmp_path)
    assert not caplog.messages
    shutil.copy(root / "red" / "3.png", root / "green" / "copy.png")
    shutil.copy(root / "red" / "3.png", tmp_path / "test" / "red" / "copy.png")
    find(tmp_path)
    assert caplog.messages == [
        "2 of 20 training images are the same as one with another target, byte for byte: "
        f"{root}/red/3.png (red) is {root}/green/copy.png (green); "
        f"{root}/red/same.png (red) is {root}/green/copy.png (green)",
        "1 of 2 test images is also among the training images, byte for byte, which makes the test accuracy too high: "
        f"{tmp_path}/test/red/copy.png (red) is {root}/green/copy.png (green)",
    ]
    (tmp_path / "test" / "blue").mkdir()
    shutil.copy(tmp_path / "test" / "red" / "a.png", tmp_path / "test" / "blue" / "a.png")
    shutil.copy(root / "blue" / "0.png", tmp_path / "test" / "blue" / "copy.png")
    caplog.clear()
    find(tmp_path)
    assert [message.partition(",")[0] for message in caplog.messages] == [
        "2 of 20 training images are the same as one with another target",
        "1 of 4 test images is the same as one with another target",
        "2 of 4 test images are also among the training images",
    ]


def test_an_image_listed_with_two_labels_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path, per_class=2)
    table = tmp_path / "images.csv"
    rows = "red/0.png,red,train\nred/0.png,blue,train\nblue/0.png,blue,train\ngreen/0.png,red,test\n"
    table.write_text("path,label,split\n" + rows)
    find(table)
    start = "1 of 3 training images is the same as one with another target, byte for byte: "
    assert caplog.messages == [
        f"{table}: in several rows, which all count: 1 of 3 images: {tmp_path}/red/0.png (line 2, line 3)",
        f"{start}{tmp_path}/red/0.png (red) is listed again (blue)",
    ]


def test_each_file_is_digested_once() -> None:
    read: list[str] = []

    def open_image(name: str) -> bytes:
        read.append(name)
        return name.encode()

    paths = {name: PackedPath(name).holding(partial(open_image, name)) for name in "ab"}
    digests = digest_files([paths["a"], paths["b"], paths["a"], Path("no such file")])
    assert list(digests) == [paths["a"], paths["b"], Path("no such file")]
    assert len(set(digests.values())) == 3
    assert sorted(read) == ["a", "b"]
