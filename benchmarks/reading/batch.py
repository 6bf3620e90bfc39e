"""A batch of JPEGs that is read as an epoch reads it: decoded and transformed, image by image."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from reading.folder import make_folder


class JpegBatch:
    """So many JPEGs in a folder, and timm's evaluation transform."""

    def __init__(self, folder: Path, count: int, image_size: int) -> None:
        make_folder(folder, count)
        self._paths = sorted(folder.rglob("*.jpg"))
        self._transform = create_transform(image_size, is_training=False)

    def read(self) -> torch.Tensor:
        """Return the images, (count, 3, H, W)."""
        return torch.stack([self._transform(Image.open(path).convert("RGB")) for path in self._paths])
