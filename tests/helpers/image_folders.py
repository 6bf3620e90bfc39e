"""Small folders of images to train on: coloured noise, so that classes are easy to distinguish."""

from pathlib import Path

import numpy
from PIL import Image

COLOURS = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30)}


def make_image(path: Path, colour: tuple[int, int, int], *, seed: int = 0, size: tuple[int, int] = (32, 32)) -> Path:
    noise = numpy.random.default_rng(seed).integers(-30, 30, (size[1], size[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((noise + colour).clip(0, 255).astype("uint8")).save(path)
    return path


def make_folder(root: Path, *, per_class: int = 6) -> Path:
    for name, colour in COLOURS.items():
        for index in range(per_class):
            make_image(root / name / f"{index}.png", colour, seed=index)
    return root
