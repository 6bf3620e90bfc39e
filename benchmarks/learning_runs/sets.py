"""The two image sets, their splits, and the views of an image: itself, its mirror image, seeded augmentations."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

from backbone_finetune.recipes.commands.settings import CLIPART
from backbone_finetune.recipes.commands.setup import TEST_SHARE
from backbone_finetune.recipes.data.bands import to_rgb
from backbone_finetune.recipes.data.groups import split
from backbone_finetune.recipes.data.images import read_image
from backbone_finetune.recipes.data.loading import seeded
from backbone_finetune.recipes.data.sources.finding import find_images

FASHION = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package has it
FASHION_FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
SIDE = 28  # of an image of Fashion-MNIST


class Views(NamedTuple):
    """How an image is shown: as it is, or augmented."""

    plain: Callable[[Image.Image], Tensor]
    augmented: Callable[[Image.Image], Tensor]


def make_views(config: dict[str, Any]) -> Views:
    """Make timm's transforms for a network's data config; crops for training have half of the image or more."""
    augmented = create_transform(**config, is_training=True, scale=(0.5, 1.0), color_jitter=0.2)
    return Views(create_transform(**config, is_training=False), augmented)


@dataclass(frozen=True)
class Images:
    """Labelled images of one side of a split. `key` tells its augmented views from those of another side."""

    key: str
    images: Sequence[Image.Image]
    targets: Tensor  # (N,)

    def view(self, views: Views, number: int | None) -> Tensor:
        """Return all images as they are, (N, 3, H, W), or an augmented view of each by its number."""
        return torch.stack([self._view(views, number, index) for index in range(len(self.images))])

    def _view(self, views: Views, number: int | None, index: int) -> Tensor:
        if number is None:
            return views.plain(self.images[index])
        with seeded(f"{self.key} {number} {index}"):
            return views.augmented(self.images[index])


def split_clipart(seed: int) -> tuple[Images, Images]:
    """Split the packaged clipart as `train` does: returns (train, test)."""
    train, test = (
        Images(f"clipart {seed} {name}", [to_rgb(read_image(path)) for path in part.paths], torch.tensor(part.targets))
        for name, part in zip(
            ("train", "test"), split(find_images(CLIPART), test_share=TEST_SHARE, seed=seed), strict=True
        )
    )
    return train, test


def split_fashion(folder: Path, train_images: int, test_images: int, seed: int) -> tuple[Images, Images]:
    """Draw images of Fashion-MNIST's training file, as many of each class: returns (train, test).

    FileNotFoundError says how to get the files.
    """
    for name in FASHION_FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: there is no such file. On Debian or Ubuntu run: apt install dataset-fashion-mnist; "
                "elsewhere pass --fashion-mnist DIR with the files of github.com/zalandoresearch/fashion-mnist, or "
                "leave it out: --sets clipart."
            )
    pixels, labels = (gzip.decompress((folder / name).read_bytes()) for name in FASHION_FILES)
    targets = torch.frombuffer(bytearray(labels[8:]), dtype=torch.uint8).long()
    generator = random.Random(seed)
    drawn: list[list[int]] = [[], []]
    for target in range(10):
        members = (targets == target).nonzero().flatten().tolist()
        chosen = generator.sample(members, train_images // 10 + test_images // 10)
        drawn[0] += chosen[: train_images // 10]
        drawn[1] += chosen[train_images // 10 :]

    def read(index: int) -> Image.Image:
        start = 16 + index * SIDE**2
        return Image.frombytes("L", (SIDE, SIDE), pixels[start : start + SIDE**2]).convert("RGB")

    train, test = (
        Images(f"fashion {seed} {name}", [read(index) for index in indices], targets[indices])
        for name, indices in zip(("train", "test"), drawn, strict=True)
    )
    return train, test
