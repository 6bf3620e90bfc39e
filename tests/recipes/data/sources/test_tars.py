"""Images in tar files: found as in folders and tables, read at random, and broken ones named."""

from __future__ import annotations

import copy
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from image_folders import make_folder
from packed_images import read_files, sample, write_tar
from torchvision.transforms.functional import pil_to_tensor

from backbone_finetune.recipes import ImageDataset, data_fingerprint, find_images, find_splits
from backbone_finetune.recipes.data.loading import DeviceLoader
from backbone_finetune.recipes.data.sources.finding import list_images
from backbone_finetune.recipes.data.sources.identical import find_copies
from backbone_finetune.recipes.data.sources.parts import find_data
from backbone_finetune.recipes.files import digest_files


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """Return two images of each of three classes, by name."""
    return read_files(make_folder(tmp_path / "folder", per_class=2))


def names(path: Path, **arguments: Any) -> dict[str, list[str]]:
    """Return the images of each part, with their classes."""
    return {
        part: [
            f"{found.class_names[target]} {path.name}" for path, target in zip(found.paths, found.targets, strict=True)
        ]
        for part, found in find_splits(path, **arguments).items()
    }


ALL = ["blue 0.png", "blue 1.png", "green 0.png", "green 1.png", "red 0.png", "red 1.png"]


@pytest.mark.parametrize("prefix", ["", "./", "colours/", "train/"])
def test_class_folders_in_a_tar_file(tmp_path: Path, files: dict[str, bytes], prefix: str) -> None:
    tar = write_tar(tmp_path / "colours.tar", {f"{prefix}{name}": content for name, content in reversed(files.items())})
    found = find_images(tar)
    assert names(tar) == {"train": ALL}
    assert found.paths[0] == tar / prefix / "blue/0.png"
    assert [path.open().read() for path in found.paths] == list(files.values())
    assert pickle.loads(pickle.dumps(found.paths[5])).open().read() == files["red/1.png"]
    with pytest.raises(ValueError, match=r"colours\.tar.*: red: not a class of this model, whose classes"):
        find_images(tar, ("blue", "green"))


def test_paths_beside_a_member_are_those_of_files(tmp_path: Path, files: dict[str, bytes]) -> None:
    path = find_images(write_tar(tmp_path / "colours.tar", files)).paths[0]
    assert path.is_file()
    assert path == copy.deepcopy(path) == tmp_path / "colours.tar/blue/0.png"
    for other in (path.parent, path.with_name("9.png"), pickle.loads(pickle.dumps(path.parent))):
        assert not other.is_file()
    with pytest.raises(OSError, match=r"9\.png"):
        path.with_name("9.png").open()


def test_parts_in_a_tar_file_and_in_names_of_tar_files(
    tmp_path: Path, files: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    first, rest = dict(list(files.items())[:1]), dict(list(files.items())[1:])
    parts = {"train": [name for name in ALL if name != "blue 0.png"], "validation": ["blue 0.png"]}
    inside = {f"data/train/{name}": content for name, content in rest.items()}
    inside |= {f"data/val/{name}": content for name, content in first.items()}
    assert names(write_tar(tmp_path / "one" / "colours.tar", inside)) == parts
    assert names(tmp_path / "one") == parts
    for train, val in (("two/train/0.tar", "two/val/0.tar"), ("three/a-train-000.tar", "three/a-valid-000.tar")):
        write_tar(tmp_path / train, rest)
        write_tar(tmp_path / val, first)
        assert names((tmp_path / train).parents[train.count("/") - 1]) == parts
    assert not caplog.messages
    write_tar(tmp_path / "three" / "extra.tar", first)
    assert names(tmp_path / "three") == parts
    assert caplog.messages == [f"{tmp_path / 'three'}: left out: extra.tar; only train, val and test are used"]
    (tmp_path / "three" / "a-train-000.tar").rename(tmp_path / "three" / "a-test-000.tar")
    with pytest.raises(ValueError, match=r"three: its tar files are named test, validation, and none train; add it"):
        names(tmp_path / "three")


@pytest.mark.parametrize(
    "layout",
    [
        "cat/1.png dog/1.png dog/deep/2.png",
        "pets/cat/1.png pets/dog/1.png README",
        "train/cat/1.png train/dog/1.png val/dog/2.png",
        "pets/Train/cat/1.png pets/Train/dog/1.png pets/valid/dog/2.png pets/extra/1.png pets/a.txt",
        "train/cat/1.png train/dog/1.png test/3.png notes.txt",
        "train/cat/1.png train/dog/1.png val/fox/2.png",
        "test/cat/1.png val/cat/1.png",
        "bus/1.png train/steam/1.png train/2.png test/deep/1.png",
        "cat/1.png dog/notes.txt",
        "cat/1.png dog/",
        "cat/2023/1.png cat/2024/1.png",
        "train/1.png test/2.png",
        "1.png 2.png",
        "cat/1.png",
        "notes.txt",
        "cat/.hidden.png dog/1.png .git/1.png",
    ],
)
@pytest.mark.parametrize("class_names", [None, ("cat", "dog")])
def test_a_folder_and_a_tar_file_of_it_are_the_same(
    tmp_path: Path, layout: str, class_names: tuple[str, ...] | None, caplog: pytest.LogCaptureFixture
) -> None:
    for name in layout.split():
        path = tmp_path / "data" / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    tar = Path(shutil.make_archive(str(tmp_path / "data"), "tar", tmp_path / "data"))

    def look(root: Path) -> tuple[str, list[str]]:
        caplog.clear()
        try:
            found: object = find_splits(root, class_names)
        except ValueError as error:
            found = error
        return str(found).replace("data.tar", "data").replace("PackedPath", "PosixPath"), caplog.messages[:]

    expected, messages = look(tmp_path / "data")
    assert look(tar) == (expected, [message.replace("/data", "/data.tar") for message in messages])


def test_a_tar_file_for_each_class(tmp_path: Path, files: dict[str, bytes]) -> None:
    for colour in ("blue", "red"):
        own = {Path(name).name: content for name, content in files.items() if name.startswith(colour)}
        write_tar(tmp_path / "tars" / f"{colour}.tar", own)
    assert names(tmp_path / "tars") == {"train": ["blue 0.png", "blue 1.png", "red 0.png", "red 1.png"]}


def test_patterns_of_shards(tmp_path: Path, files: dict[str, bytes]) -> None:
    for number, (name, content) in enumerate(files.items()):
        write_tar(tmp_path / f"train-{number:04}.tar", {name: content})
    assert names(tmp_path / "train-{0000..0005}.tar") == names(tmp_path / "train-*.tar") == {"train": ALL}
    assert names(tmp_path / "train-{0000..0002}.tar") == {"train": ALL[:3]}
    for pattern, missing in (("train-{0004..0006}.tar", "train-0006"), ("test-*.tar", r"test-\*"), ("no.tar", "no")):
        with pytest.raises(FileNotFoundError, match=rf"{missing}\.tar: there is no such tar file"):
            names(tmp_path / pattern)


def test_samples_of_webdataset(tmp_path: Path, files: dict[str, bytes], caplog: pytest.LogCaptureFixture) -> None:
    colours = [(name.partition("/")[0], content) for name, content in files.items()]

    def write(name: str, **kinds: Any) -> Path:
        tar = {}
        for index, (colour, content) in enumerate(colours):
            tar |= sample(f"{index:04}", content, **{kind: make(index, colour) for kind, make in kinds.items()})
        return write_tar(tmp_path / name, tar)

    def read_tar(name: str) -> dict[str, bytes]:
        with tarfile.open(tmp_path / name) as archive:
            return {info.name: archive.extractfile(info).read() for info in archive}  # type: ignore[union-attr]

    def number(index: int, colour: str) -> str:
        return f"{index // 2}\n"

    def columns(index: int, colour: str) -> dict[str, Any]:
        return {"labels": [colour, "all"], "split": "val" if index == 3 else "train", "group": index}

    by_class = {"train": ["0 0000.png", "0 0001.png", "1 0002.png", "1 0003.png", "2 0004.png", "2 0005.png"]}
    assert names(write("cls.tar", cls=number)) == by_class
    assert names(write("txt.tar", txt=number)) == by_class
    assert names(write("number.tar", json=lambda index, colour: index // 2)) == by_class
    parts = find_splits(write("json.tar", txt=lambda index, colour: "a caption", json=columns))
    assert parts["train"].class_names == ("all", "blue", "green", "red")
    assert parts["validation"].targets == ((1, 0, 1, 0),)
    parts = find_splits(write("both.tar", cls=number, json=columns))
    assert parts["train"].class_names == ("0", "1", "2")
    assert parts["train"].groups == ("0", "1", "2", "4", "5")
    assert find_splits(tmp_path / "both.tar", values=["group"])["validation"].targets == ((3.0,),)
    folders = {f"{part}/{name}": content for part in ("train", "val") for name, content in read_tar("cls.tar").items()}
    assert [len(part.paths) for part in find_splits(write_tar(tmp_path / "folders.tar", folders)).values()] == [6, 6]
    assert list(
        find_splits(
            write_tar(
                tmp_path / "val.tar",
                {f"val/{name}": folders[f"val/{name}"] for name in ["0000.png", "0000.cls", "0002.png", "0002.cls"]},
            )
        )
    ) == ["train"]
    write("shards/train-0.tar", cls=lambda index, colour: colour)
    write("shards/val-0.tar", cls=lambda index, colour: colour)
    assert [len(part.paths) for part in find_splits(tmp_path / "shards").values()] == [6, 6]
    assert not caplog.messages
    write_tar(tmp_path / "odd.tar", {**sample("a", b"", cls="x", npy=""), **sample("b", b"", cls="y"), "c.cls": b"z"})
    names(tmp_path / "odd.tar")
    assert caplog.messages == [f"{tmp_path / 'odd.tar'}: 2 files left out: 1 .npy, 1 .cls"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"t\.tar has no sub-folders; expected a folder with a sub-folder of images per class"),
        ({"1.png": b"", "2.png": b""}, r"t\.tar has no sub-folders, but 2 \.png; expected a folder with a sub-folder"),
        ({"cat/1.png": b""}, r"t\.tar has one class only \(cat\)"),
        ({**sample("a", b"", cls="x"), "b.png": b""}, r"t\.tar/b\.png: no label; fill it in, or remove"),
        ({**sample("a", b"", cls="x"), "a.jpg": b""}, r"the sample a has 2 images \(a\.png, a\.jpg\); leave one"),
        ({**sample("a", b"", cls="x"), "b.png": b"", "b.cls": b"\xff"}, r"b\.cls: not a text in UTF-8"),
        ({"b.png": b"", "b.json": b"{"}, r"b\.json: not JSON in UTF-8"),
        ({"b.png": b"", "b.json": b"[" * 100_000}, r"b\.json: not JSON in UTF-8 \(maximum recursion"),
        (
            sample("a", b"", json={"age": 3}),
            r"t\.tar: its columns are age; expected one of label, class, target",
        ),
    ],
)
def test_unusable_tar_files_raise(tmp_path: Path, content: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_images(write_tar(tmp_path / "t.tar", content))


def test_other_files_raise(tmp_path: Path, files: dict[str, bytes]) -> None:
    tar = write_tar(tmp_path / "colours.tar", files)
    with pytest.raises(ValueError, match=r"colours\.tar: no table; groups are read from columns of a table"):
        find_splits(tar, group="patient")
    (tmp_path / "page.tar").write_text("<html>")
    with pytest.raises(ValueError, match=r"page\.tar: not a tar file without compression \(.*\); unpack it"):
        find_images(tmp_path / "page.tar")


@pytest.mark.parametrize(
    ("name", "command"), [("a.tar.gz", "tar -xf"), ("a.TGZ", "tar -xf"), ("a.tar.xz", "tar -xf"), ("a.zip", "unzip")]
)
def test_a_compressed_archive_is_refused_with_how_to_unpack_it(tmp_path: Path, name: str, command: str) -> None:
    (tmp_path / name).touch()
    for look in (find_images, list_images):
        with pytest.raises(ValueError, match=rf"{name}: compressed; unpack it \({command} .*\) and pass the folder"):
            look(tmp_path / name)


def test_files_beside_tar_files_are_named_and_predicted(
    tmp_path: Path, files: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    root = write_tar(tmp_path / "tars" / "colours.tar", files).parent
    for name in ("1.png", "2.png", "more.tar.gz"):
        (root / name).touch()
    assert names(root) == {"train": ALL}
    assert caplog.messages == [f"{root}: 3 files left out: 2 .png beside the tar files, 1 .gz beside the tar files"]
    assert len(list_images(root)) == 2 + len(ALL)
    caplog.clear()
    (root / "broken.tar").write_bytes(b"no tar file" * 100)
    assert len(list_images(root)) == 2 + len(ALL)
    (message,) = caplog.messages
    assert message.startswith(f"left out: {root}/broken.tar: ")


def test_hidden_and_other_members_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder(tmp_path / "folder", per_class=1)
    (root / "red" / "link.png").symlink_to(root / "red" / "0.png")
    (root / "red" / ".hidden.png").touch()
    for name in ("red/notes.txt", "red/more.TXT", "above.png"):
        (root / name).touch()
    tar = Path(shutil.make_archive(str(tmp_path / "colours"), "tar", root))
    assert names(tar) == {"train": ["blue 0.png", "green 0.png", "red 0.png"]}
    assert caplog.messages == [
        f"{tar}: 1 file left out: 1 links or special files",
        f"{tar}: 3 files left out: 2 .txt, 1 .png beside the folders",
    ]


def test_broken_members_are_skipped_and_named(
    tmp_path: Path, files: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    def skipped(tar: Path) -> list[str]:
        data = ImageDataset(find_images(tar), pil_to_tensor)
        for _ in DeviceLoader(data, torch.device("cpu"), batch_size=4):
            pass
        return [message.partition(" (")[0] for message in data.broken.values()]

    tar = write_tar(tmp_path / "broken.tar", {**files, "red/1.png": b"not an image", "red/2.png": b""})
    assert skipped(tar) == [f"{tar}/red/{index}.png: not a readable image" for index in (1, 2)]
    whole = write_tar(tmp_path / "whole.tar", files)
    cut = tmp_path / "cut.tar"
    content = whole.read_bytes()
    cut.write_bytes(content[: content.index(files["red/1.png"]) + 700])  # within the last image
    assert skipped(cut) == [f"{cut}/red/1.png: not a readable image"]
    assert caplog.messages == [f"{cut}: truncated (unexpected end of data); what is before that is used"]
    damaged = bytearray(content)
    header = content.index(b"red/1.png\0")
    damaged[header + 148 : header + 156] = b"x" * 8  # its checksum
    (tmp_path / "damaged.tar").write_bytes(damaged)
    assert len(find_images(tmp_path / "damaged.tar").paths) == 5
    assert caplog.messages[1:] == [f"{tmp_path}/damaged.tar: damaged at byte {header}; what is before that is used"]


def test_contents_are_compared_and_digested(
    tmp_path: Path, files: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "folder"
    tar = write_tar(tmp_path / "colours.tar", {**files, "red/same.png": files["blue/0.png"]})
    parts = find_data(tar, test=root, test_share=0.3, seed=0)
    find_copies(parts, digest_files(path for images in parts.values() for path in images.paths))
    assert caplog.messages[0] == (
        "1 of 7 training images is the same as one with another target, byte for byte: "
        f"{tar}/red/same.png (red) is {tar}/blue/0.png (blue)"
    )
    assert caplog.messages[1].startswith("6 of 6 test images are also among the training images, byte for byte")
    prints = {
        data_fingerprint(ImageDataset(find_images(path), None)) for path in (root, write_tar(tmp_path / "t.tar", files))
    }  # type: ignore[arg-type]
    assert len(prints) == 1
