"""A folder of JPEGs that decode like photographs: 500 x 375, about 30 kB each, ten classes."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from PIL import Image

SIZE = (500, 375)
CLASSES = 10


def make_photo(seed: int) -> Image.Image:
    """Add noise of all scales, stronger the coarser, as the spectrum of a photograph falls."""
    width, height = SIZE
    generator = numpy.random.default_rng(seed)
    pixels = numpy.zeros((3, height, width), dtype=numpy.float32)
    for scale in (1, 2, 4, 8, 16, 32, 64, 128):
        noise = generator.normal(size=(1, 3, height // scale + 2, width // scale + 2)).astype("float32")
        smooth = torch.nn.functional.interpolate(torch.from_numpy(noise), size=(height, width), mode="bilinear")
        pixels += smooth[0].numpy() * scale**0.7
    pixels = 128 + 45 * (pixels - pixels.mean()) / pixels.std()
    return Image.fromarray(pixels.clip(0, 255).astype("uint8").transpose(1, 2, 0))


def make_folder(root: Path, count: int, *, distinct: int = 100) -> None:
    """Write ``count`` JPEGs, copies of ``distinct`` ones, into a folder with a sub-folder per class."""
    for number in range(count):
        path = root / f"class {number % CLASSES}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < distinct:
            make_photo(number).save(path, quality=90)
        else:
            original = number % distinct
            path.write_bytes((root / f"class {original % CLASSES}" / f"{original:06}.jpg").read_bytes())
