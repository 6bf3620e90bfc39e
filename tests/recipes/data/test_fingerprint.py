"""Fingerprints of images and transforms: any change that a backbone could see is seen, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from image_folders import make_folder, make_image
from timm.data import create_transform
from timm.data.transforms import ResizeKeepRatio
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import FakeData, ImageFolder
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import (
    FeatureCache,
    ImageDataset,
    data_fingerprint,
    extract_features,
    find_images,
    is_deterministic,
)

V2 = [v2.ToImage(), v2.RGB(), v2.Resize(32, antialias=True), v2.CenterCrop(32), v2.ToDtype(torch.float32, scale=True)]


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
    expected = data_fingerprint(make_dataset(tmp_path / "here"))
    assert data_fingerprint(make_dataset(tmp_path / "there")) == expected
    (tmp_path / "there" / "red" / "0.png").rename(tmp_path / "there" / "red" / "00.png")  # in the same order
    (tmp_path / "there" / "green").rename(tmp_path / "there" / "lime")
    assert data_fingerprint(make_dataset(tmp_path / "there")) == expected
    (tmp_path / "there" / "red" / "00.png").rename(tmp_path / "there" / "red" / "9.png")
    assert data_fingerprint(make_dataset(tmp_path / "there")) != expected


def test_another_transform_is_noticed_by_the_spot_check(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "backbone_finetune")
    make_folder(tmp_path / "images")
    model = FineTuneModel(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    cropped, squashed, shifted = (
        make_dataset(tmp_path / "images", create_transform(32, **changes))
        for changes in ({}, {"crop_mode": "squash", "crop_pct": 1.0}, {"mean": (0.5, 0.5, 0.5)})
    )
    for dataset, is_new in ((cropped, True), (cropped, False), (squashed, True), (shifted, True), (shifted, False)):
        cache = FeatureCache(tmp_path / "cache", data_fingerprint(dataset))
        caplog.clear()
        features, _ = extract_features(model, DataLoader(dataset, 4), cache=cache).tensors
        assert torch.equal(features, torch.stack([image.flatten() for image, _ in dataset]))  # type: ignore[attr-defined]
        assert len(caplog.messages) == (is_new and dataset is not cropped)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [32, (32, 48)])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_evaluation_transforms_of_timm_are_deterministic(crop_mode: str, size: Any, normalize: bool) -> None:
    transform = create_transform(size, crop_mode=crop_mode, crop_border_pixels=2, normalize=normalize)
    assert is_deterministic(transform)


@pytest.mark.parametrize(
    "transform",
    [
        v2.Compose([*V2, v2.Normalize([0.5], [0.5])]),
        nn.Sequential(*V2),
        transforms.Compose([v2.Compose(V2), transforms.Normalize([0.5], [0.5])]),
        ResNet18_Weights.DEFAULT.transforms(),
    ],
)
def test_the_evaluation_transforms_of_torchvision_are_deterministic(transform: Any) -> None:
    assert is_deterministic(transform)


def test_the_evaluation_transforms_of_open_clip_are_deterministic() -> None:
    open_clip = pytest.importorskip("open_clip")
    for resize_mode in ("shortest", "longest", "squash"):
        assert is_deterministic(open_clip.image_transform(32, is_train=False, resize_mode=resize_mode))
    assert not is_deterministic(open_clip.image_transform(32, is_train=True))


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
        v2.Compose([*V2, v2.RandomHorizontalFlip()]),
        nn.Sequential(*V2, v2.ColorJitter()),
        OwnResize(32),
        lambda image: image,
    ],
)
def test_what_may_be_random_is_not_taken_for_deterministic(tmp_path: Path, transform: Any) -> None:
    assert not is_deterministic(transform)
    dataset = make_dataset(make_folder(tmp_path, per_class=1))
    dataset.transform = transform
    with pytest.raises(
        ValueError, match=r"not known to give the same tensor .* use an evaluation transform, .* or pass"
    ):
        data_fingerprint(dataset)


class Own(Dataset[Any]):
    """Images of a class of one's own, which says nothing of a transform."""

    def __init__(self, images: torch.Tensor, *, noise: float = 0.0) -> None:
        self.images, self.noise = images, noise

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return {"image": self.images[index] + self.noise * torch.rand(2), "names": ("cat", index)}


ONES, ZEROS = torch.ones(4, 2), torch.zeros(4, 2)
CHANGED = torch.cat([ONES[:3], ZEROS[:1]])


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (TensorDataset(ONES, ZEROS), TensorDataset(ONES.clone(), ZEROS), TensorDataset(ZEROS, ONES)),
        (Subset(Own(ONES), [0, 1]), Subset(Own(ONES), [0, 1]), Subset(Own(ONES), [1, 0])),
        (ConcatDataset([Own(ONES)] * 2), ConcatDataset([Own(ONES)] * 2), ConcatDataset([Own(ONES)])),
        (Own(ONES), Own(ONES), Own(CHANGED)),
        ([(ONES, 0)], [(ONES.clone(), 0)], [(ONES, 1)]),
        (list(ONES.numpy()), list(ONES.numpy()), list(CHANGED.numpy())),
        (FakeData(3, (3, 4, 4)), FakeData(3, (3, 4, 4)), FakeData(3, (3, 4, 4), random_offset=1)),
    ],
)
def test_any_dataset_has_a_fingerprint(one: Any, same: Any, other: Any) -> None:
    assert data_fingerprint(one) == data_fingerprint(same) != data_fingerprint(other)


def test_torchvisions_image_folder_counts_by_its_files(tmp_path: Path) -> None:
    make_folder(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = (
        data_fingerprint(ImageFolder(str(tmp_path / name), create_transform(32))) for name in ("here", "there")
    )
    assert here == there
    change_one_byte_and_nothing_else(tmp_path / "here")  # which no decoder may read any more
    assert data_fingerprint(ImageFolder(str(tmp_path / "here"), create_transform(32))) != there


def test_a_dataset_that_draws_never_has_the_same_fingerprint() -> None:
    assert data_fingerprint(Own(ONES, noise=1.0)) != data_fingerprint(Own(ONES, noise=1.0))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


@pytest.mark.parametrize(
    "given", [DataLoader(TensorDataset(ONES)), Stream(), "photos/", Path("photos"), b"photos", {"image": 0}, iter([])]
)
def test_what_has_no_fingerprint_says_what_to_pass(given: Any) -> None:
    remedies = "of a loader, loader.dataset; of a folder, .*; for a stream, pass a name of your own: FeatureCache"
    with pytest.raises(ValueError, match=rf"got .*{type(given).__name__}.*; pass a dataset with a length: {remedies}"):
        data_fingerprint(given)


def test_an_item_that_cannot_be_compared_raises() -> None:
    with pytest.raises(ValueError, match=r"gave a set, which cannot be compared; return tensors, .*, or pass a name"):
        data_fingerprint([{1, 2}])  # type: ignore[arg-type]
