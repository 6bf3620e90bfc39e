"""A folder of images: finding, errors, unreadable images, and the split."""

from __future__ import annotations

import logging
import struct
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_folders import make_folder, make_image
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from backbone_finetune.recipes.data.groups import split
from backbone_finetune.recipes.data.images import (
    IGNORED,
    ImageDataset,
    LabelledFolder,
    check_first_images,
    read_image,
)
from backbone_finetune.recipes.data.loading import DeviceLoader
from backbone_finetune.recipes.data.sources.finding import find_images, list_images


def test_finds_classes_in_order_and_skips_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.webp", "a/deeper/1.png", "b/notes.txt", "b/.hidden.png", ".git/1.png", "stray.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    folder = find_images(tmp_path)
    assert folder.class_names == ("a", "b")
    assert [path.relative_to(tmp_path).as_posix() for path in folder.paths] == ["a/deeper/1.png", "b/1.webp", "b/2.JPG"]
    assert folder.targets == (0, 1, 1)


def test_a_missing_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nowhere: there is no such file or folder; expected a folder with a sub-folder"
    ):
        find_images(tmp_path / "nowhere")


def test_a_file_raises(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match=r"one\.png is a file; expected a folder"):
        find_images(make_image(tmp_path / "one.png", (0, 0, 0)))


def test_an_empty_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has no sub-folders; expected a folder with a sub-folder of images per class"
    ):
        find_images(tmp_path)


def test_a_single_class_raises(tmp_path: Path) -> None:
    make_image(tmp_path / "cat" / "1.png", (0, 0, 0))
    with pytest.raises(ValueError, match=r"has one class only \(cat\); .*two classes or more$"):
        find_images(tmp_path)


def test_a_class_with_control_characters_raises(tmp_path: Path) -> None:
    make_folder(tmp_path)
    make_image(tmp_path / "cat\x1b[2J" / "1.png", (0, 0, 0))
    with pytest.raises(ValueError, match=r"cat\\x1b\[2J' has control characters in its name; rename it"):
        find_images(tmp_path)


def test_a_class_without_images_raises(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(
        ValueError, match=r"class folder .*empty holds no image \(\.jpg, .*\), but 1 \.txt; add images to it"
    ):
        find_images(tmp_path)


def broken_files(folder: Path) -> list[Path]:
    jpg = make_image(folder / "whole.jpg", (90, 90, 90), size=(64, 64)).read_bytes()
    png = make_image(folder / "whole.png", (90, 90, 90), size=(400, 400)).read_bytes()
    (folder / "whole.png").unlink()
    first, second, rest = png.split(b"IDAT", 2)
    contents = {
        "chunk.png": first + b"IDAT" + second + b"\0\0\0\0" + rest,
        "cut.jpg": jpg[: len(jpg) // 2],
        "empty.png": b"",
        "text.jpg": b"a text file",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return sorted(folder / name for name in contents)


def load_all(folder: LabelledFolder) -> tuple[list[int], dict[str, str]]:
    data = ImageDataset(folder, lambda image: pil_to_tensor(image.resize((8, 8))))
    targets = [int(target) for _, batch in DeviceLoader(data, torch.device("cpu")) for target in batch]
    return targets, data.broken


def test_broken_images_are_recorded_and_left_out(tmp_path: Path) -> None:
    make_folder(tmp_path)
    expected = broken_files(tmp_path / "red")
    found = find_images(tmp_path)
    targets, broken = load_all(found)
    assert list(broken) == [str(path) for path in expected]
    assert len(expected) == 4
    for path, message in broken.items():
        assert message.startswith(f"{path}: not a readable image (")
        assert message.count(Path(path).name) == 1
    pairs = zip(found.paths, found.targets, strict=True)
    assert targets == [IGNORED if path in expected else target for path, target in pairs]


def test_a_decompression_bomb_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path)
    bomb = make_image(tmp_path / "red" / "bomb.png", (0, 0, 0), size=(50, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40)
    _, broken = load_all(find_images(tmp_path))
    assert list(broken) == [str(bomb)]


def test_damaged_metadata_is_ignored_or_a_clear_error(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    path = tmp_path / "image.jpg"
    Image.new("RGB", (8, 4), (200, 0, 0)).save(path, exif=exif)
    whole = path.read_bytes()
    start = whole.index(b"Exif")
    outcomes = set()
    for position in range(start + 6, start + 60):
        for octet in (0, 1, 5, 255):
            path.write_bytes(whole[:position] + bytes([octet]) + whole[position + 1 :])
            try:
                outcomes.add(read_image(path).size)
            except ValueError as error:
                outcomes.add(str(error).partition(" (")[0])
    assert outcomes == {(4, 8), (8, 4), f"{path}: not a readable image"}
    assert not recwarn.list


def test_an_image_that_would_be_resized_to_gigabytes_raises(tmp_path: Path) -> None:
    Image.new("L", (1, 101)).save(tmp_path / "line.png")
    with pytest.raises(ValueError, match=r"line\.png: not a readable image \(1 x 101 pixels; at most 1 to 100"):
        read_image(tmp_path / "line.png")
    Image.new("L", (100, 1)).save(tmp_path / "line.png")
    assert read_image(tmp_path / "line.png").size == (100, 1)


def test_folders_are_searched_and_files_are_listed(tmp_path: Path) -> None:
    for name in ("b/deeper/2.JPG", "b/1.webp", "b/notes.txt", "b/.hidden/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    given = [tmp_path / "missing.png", tmp_path / "b", tmp_path / "b" / "notes.txt"]
    expected = [given[0], tmp_path / "b" / "1.webp", tmp_path / "b" / "deeper" / "2.JPG", given[2]]
    assert [image for path in given for image in list_images(path)] == expected
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no image in it \(\.jpg"):
        list_images(tmp_path / "empty")


def test_a_class_with_one_image_raises(tmp_path: Path) -> None:
    make_folder(tmp_path)
    make_image(tmp_path / "white" / "1.png", (255, 255, 255))
    with pytest.raises(ValueError, match=r"white holds 1 image, and needs 2: one to train, one to test"):
        split(find_images(tmp_path), test_share=0.3, seed=0)


def test_a_class_without_a_readable_image_raises(tmp_path: Path) -> None:
    make_folder(tmp_path)
    data = ImageDataset(find_images(tmp_path), lambda image: torch.zeros(1))
    data.check_classes()
    for path in (tmp_path / "red").iterdir():
        path.write_bytes(b"")
    targets = torch.tensor(
        [target if data.folder.class_names[target] != "red" else IGNORED for target in data.folder.targets]
    )
    data.skip_ignored(targets)
    with pytest.raises(
        ValueError, match=r"red needs at least 2 readable images.*the first that is broken is .*red/0\.png: not a"
    ):
        data.check_classes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_image_reads_as_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.tiff"
    Image.new(mode, (5, 4)).save(path)
    assert (read_image(path).mode, read_image(path).size) == ("RGB", (5, 4))


def test_sixteen_bits_keep_their_shades(tmp_path: Path) -> None:
    image = Image.new("I;16", (3, 1))
    for x, value in enumerate((0, 128 * 256, 65535)):
        image.putpixel((x, 0), value)
    image.save(tmp_path / "image.png")
    read = read_image(tmp_path / "image.png")
    assert [read.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_big_endian_sixteen_bits_keep_their_shades(tmp_path: Path) -> None:
    Image.frombytes("I;16B", (3, 1), bytes((0, 0, 128, 0, 255, 255))).save(tmp_path / "image.tiff")
    assert (tmp_path / "image.tiff").read_bytes().startswith(b"MM")
    read = read_image(tmp_path / "image.tiff")
    assert [read.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize("kind", ["P5", "P2"])
@pytest.mark.parametrize("largest", [1023, 65535])
def test_a_grey_map_of_more_than_8_bits_keeps_its_shades(tmp_path: Path, kind: str, largest: int) -> None:
    values = numpy.array([[0, largest // 4, largest]], dtype=numpy.uint16)
    content = values.astype(">u2").tobytes() if kind == "P5" else " ".join(map(str, values[0])).encode()
    (tmp_path / "image.pgm").write_bytes(f"{kind} 3 1 {largest}\n".encode() + content)
    assert torch.allclose(read_image(tmp_path / "image.pgm", 1), torch.tensor(values / largest).float(), atol=1e-5)
    assert numpy.asarray(read_image(tmp_path / "image.pgm"))[0, :, 0].tolist() == [0, 63, 255]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_tiff_file_whose_zero_is_white_is_read_so(tmp_path: Path, bits: int, channels: int) -> None:
    values = numpy.array([[0, 2 ** (bits - 2), 2**bits - 1]], dtype=f"uint{bits}")
    Image.fromarray(values).save(tmp_path / "black.tif")
    tag = b"\x06\x01\x03\x00\x01\x00\x00\x00"  # PhotometricInterpretation, a short
    content = (tmp_path / "black.tif").read_bytes()
    assert content.count(tag + b"\x01") == 1
    (tmp_path / "white.tif").write_bytes(content.replace(tag + b"\x01", tag + b"\x00"))
    black, white = (numpy.asarray(read_image(tmp_path / f"{name}.tif", channels)) for name in ("black", "white"))
    assert numpy.allclose(black.max() - black, white)


def test_twelve_bits_of_a_tiff_file_are_scaled(tmp_path: Path) -> None:
    """Pillow reads them as values to 4095, and writes none: the bits and the length of the data are changed here."""
    Image.fromarray(numpy.array([[1, 2, 3, 4]], dtype=numpy.uint16)).save(tmp_path / "image.tif")
    content = (tmp_path / "image.tif").read_bytes()
    changes = {struct.pack("<4H", 1, 2, 3, 4): bytes.fromhex("0008000ffff0")}
    for tag, kind, old, new in ((258, 3, 16, 12), (279, 4, 8, 6)):
        changes[struct.pack("<HHII", tag, kind, 1, old)] = struct.pack("<HHII", tag, kind, 1, new)
    for before, after in changes.items():
        assert content.count(before) == 1
        content = content.replace(before, after)
    (tmp_path / "image.tif").write_bytes(content)
    assert numpy.asarray(read_image(tmp_path / "image.tif"))[0, :, 0].tolist() == [0, 128, 15, 255]


def test_a_link_to_nothing_is_named_and_left_out(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "red" / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "red" / "loop.jpg").symlink_to(tmp_path / "red" / "loop.jpg")
    (tmp_path / "red" / "folder.jpg").mkdir()
    found = find_images(tmp_path)
    targets, broken = load_all(found)
    assert len(targets) - targets.count(IGNORED) == 18
    nowhere, loop = broken.values()
    assert nowhere == f"{tmp_path / 'red' / 'link.jpg'}: there is no such file"
    assert loop.startswith(f"{tmp_path / 'red' / 'loop.jpg'}: not a readable image (")
    assert set(list_images(tmp_path / "red")) == {path for path in found.paths if path.parent.name == "red"}


@pytest.mark.parametrize("mode", ["F", "I"])
def test_values_without_a_range_raise(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (5, 4)).save(tmp_path / "image.tiff")
    with pytest.raises(ValueError, match=r"image\.tiff.*no known range; save it with 8 or 16 bits"):
        read_image(tmp_path / "image.tiff")


def test_transparent_pixels_are_read_as_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.save(tmp_path / "image.png")
    read = read_image(tmp_path / "image.png")
    assert [read.getpixel((x, 0)) for x in range(2)] == [(200, 0, 0), (255, 255, 255)]


def test_a_rotated_photograph_is_read_upright(tmp_path: Path) -> None:
    orientation = Image.Exif()
    orientation[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "image.jpg", exif=orientation)
    assert read_image(tmp_path / "image.jpg").size == (4, 8)


@given(
    sizes=st.lists(st.integers(2, 30), min_size=2, max_size=5),
    test_share=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**32),
)
def test_a_split_is_complete_disjoint_stratified_and_repeatable(sizes: list[int], test_share: float, seed: int) -> None:
    targets = tuple(target for target, size in enumerate(sizes) for _ in range(size))
    paths = tuple(Path(f"{index}.png") for index in range(len(targets)))
    folder = LabelledFolder(Path("."), tuple(map(str, range(len(sizes)))), paths, targets)
    train, test = split(folder, test_share=test_share, seed=seed)
    assert set(train.paths) | set(test.paths) == set(paths)
    assert not set(train.paths) & set(test.paths)
    for part in (train, test):
        assert all(targets[paths.index(path)] == target for path, target in zip(part.paths, part.targets, strict=True))
    for target, size in enumerate(sizes):
        assert 1 <= Counter(train.targets)[target] < size
        assert abs(Counter(test.targets)[target] - test_share * size) <= 1
    assert split(folder, test_share=test_share, seed=seed) == (train, test)


def test_another_seed_holds_out_other_images() -> None:
    paths = tuple(Path(f"{index}.png") for index in range(40))
    folder = LabelledFolder(Path("."), ("a", "b"), paths, (0,) * 20 + (1,) * 20)
    held_out = {split(folder, test_share=0.3, seed=seed)[1].paths for seed in range(5)}
    assert len(held_out) == 5


def test_a_dataset_returns_transformed_images_and_targets(tmp_path: Path) -> None:
    folder = find_images(make_folder(tmp_path))
    data = ImageDataset(folder, pil_to_tensor)
    assert len(data) == 18
    tensor, target = data[17]
    assert target == 2
    assert torch.equal(tensor, pil_to_tensor(Image.open(tmp_path / "red" / "5.png")))


@pytest.mark.parametrize("pages", [1, 3])
def test_pages_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, pages: int) -> None:
    for name in ("a/0.tif", "a/1.tif", "b/0.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(
            tmp_path / name, save_all=True, append_images=[Image.new("L", (8, 8))] * (pages - 1)
        )
    with caplog.at_level(logging.WARNING):
        check_first_images(find_images(tmp_path), 3)
    expected = [f"{tmp_path / 'a' / '0.tif'}: has 3 pages, of which only the first is read"] if pages == 3 else []
    assert [message.partition(";")[0] for message in caplog.messages] == expected
