"""Fingerprints of images and transforms: any change that a backbone could see is seen, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from image_folders import make_folder, make_image
from timm.data import create_transform
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio, TrimBorder
from torchvision import transforms

from backbone_finetune.recipes import data_fingerprint, is_deterministic
from backbone_finetune.recipes.data.images import ImageDataset, find_images


def make_dataset(root: Path, transform: Any = None) -> ImageDataset:
    return ImageDataset(find_images(root), transform or create_transform(32))


def swap_two(root: Path) -> None:
    (root / "red" / "0.png").rename(root / "red" / "kept")
    (root / "red" / "1.png").rename(root / "red" / "0.png")
    (root / "red" / "kept").rename(root / "red" / "1.png")


def change_one_byte_and_nothing_else(root: Path) -> None:
    path = root / "blue" / "3.png"
    before = path.stat()
    octets = bytearray(path.read_bytes())
    octets[len(octets) // 2] ^= 1
    path.write_bytes(octets)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def add_one(root: Path) -> None:
    make_image(root / "blue" / "7.png", (0, 0, 0))


def remove_one(root: Path) -> None:
    (root / "blue" / "0.png").unlink()


@pytest.mark.parametrize("change", [swap_two, change_one_byte_and_nothing_else, add_one, remove_one])
def test_a_changed_image_is_always_noticed(tmp_path: Path, change: Callable[[Path], None]) -> None:
    before = data_fingerprint(make_dataset(make_folder(tmp_path)))
    change(tmp_path)
    assert data_fingerprint(make_dataset(tmp_path)) != before


def test_other_targets_and_another_order_are_noticed(tmp_path: Path) -> None:
    dataset = make_dataset(make_folder(tmp_path))
    folder = dataset.folder
    swapped = replace(folder, targets=(1, *folder.targets[1:]))
    reversed_order = replace(folder, paths=folder.paths[::-1], targets=folder.targets[::-1])
    fingerprints = {
        data_fingerprint(ImageDataset(each, dataset.transform)) for each in (folder, swapped, reversed_order)
    }
    assert len(fingerprints) == 3


def test_where_the_images_are_and_when_they_were_written_does_not_count(tmp_path: Path) -> None:
    make_folder(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    os.utime(tmp_path / "there" / "red" / "0.png", (1, 1))
    assert data_fingerprint(make_dataset(tmp_path / "here")) == data_fingerprint(make_dataset(tmp_path / "there"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (create_transform(32), create_transform(48)),
        (create_transform(32, interpolation="bilinear"), create_transform(32, interpolation="bicubic")),
        (create_transform(32, crop_pct=0.8), create_transform(32, crop_pct=0.9)),
        # A tensor's repr has four digits; that of CenterCropOrPad leaves its fill out, and that of TrimBorder all.
        (create_transform(32, mean=(0.5, 0.5, 0.5)), create_transform(32, mean=(0.500001, 0.5, 0.5))),
        (CenterCropOrPad(32, fill=0), CenterCropOrPad(32, fill=9)),
        (TrimBorder(1), TrimBorder(2)),
        (transforms.Compose([TrimBorder(1)]), transforms.Compose([])),
    ],
)
def test_another_transform_is_noticed(tmp_path: Path, one: Any, other: Any) -> None:
    make_folder(tmp_path, per_class=1)
    assert data_fingerprint(make_dataset(tmp_path, one)) != data_fingerprint(make_dataset(tmp_path, other))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [32, (32, 48)])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_evaluation_transforms_of_timm_are_deterministic(crop_mode: str, size: Any, normalize: bool) -> None:
    transform = create_transform(size, crop_mode=crop_mode, crop_border_pixels=2, normalize=normalize)
    assert is_deterministic(transform)


class OwnResize(transforms.Resize):
    """It may do anything."""


@pytest.mark.parametrize(
    "transform",
    [
        create_transform(32, is_training=True),
        transforms.Compose([transforms.Resize(32), transforms.Compose([transforms.RandomHorizontalFlip()])]),
        transforms.RandomApply([transforms.Resize(32)], p=0.5),
        ResizeKeepRatio((32, 32), random_scale_prob=0.1),
        ResizeKeepRatio((32, 32), random_aspect_prob=0.1),
        ResizeKeepRatio((32, 32), interpolation="random"),
        OwnResize(32),
        lambda image: image,
        None,
    ],
)
def test_what_may_be_random_is_not_taken_for_deterministic(tmp_path: Path, transform: Any) -> None:
    assert not is_deterministic(transform)
    dataset = make_dataset(make_folder(tmp_path, per_class=1))
    dataset.transform = transform
    with pytest.raises(
        ValueError, match=r"not known to give the same tensor .* use timm's evaluation transform, or pass"
    ):
        data_fingerprint(dataset)
