"""Images and their classes: read them, and check that they fit a model."""

import logging
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, PLANAR_CONFIGURATION, SAMPLESPERPIXEL
from torch import Tensor
from torch.utils.data import Dataset

from ..text import printable
from .augmentation import Augmentation
from .bands import (
    MIN_IS_WHITE,
    NPY,
    TIFF,
    BandsError,
    Picture,
    check_pixels,
    from_array,
    read_npy,
    read_tiff,
    to_all_bits,
)

logger = logging.getLogger(__name__)

# The target of an unreadable image, which keeps its position without weight. torch's losses ignore it by default.
IGNORED = -100


def is_read(targets: Tensor) -> Tensor:
    """Return which targets are of readable images, ``(N,)``: others are ``IGNORED``, or nan in floats.

    >>> is_read(torch.tensor([2, IGNORED])), is_read(torch.tensor([[0.5, 0.5], [torch.nan, torch.nan]]))
    (tensor([ True, False]), tensor([ True, False]))
    """
    # Compared as int64: -100 would be 156 in uint8.
    read = ~targets.isnan() if targets.is_floating_point() else targets.long() != IGNORED
    return read if targets.ndim == 1 else read.flatten(1).all(1)


@dataclass(frozen=True)
class LabelledFolder:
    """Images and their classes: ``paths[i]`` is an image of ``class_names[targets[i]]``.

    If an image has several labels, or values, ``targets[i]`` is a row with one number for each of ``class_names``.
    Images of one of the ``groups`` are never on two sides of a split.

    >>> LabelledFolder(Path("animals"), ("cat", "dog"), (Path("animals/dog/1.jpg"),), (1,)).targets
    (1,)
    """

    root: Path
    class_names: tuple[str, ...]
    paths: tuple[Path, ...]
    targets: tuple[Any, ...]  # int, or tuple[float, ...]
    groups: tuple[str, ...] | None = None

    def select(self, indices: Sequence[int]) -> "LabelledFolder":
        """Return some of the images, in the given order."""
        paths, targets = tuple(self.paths[i] for i in indices), tuple(self.targets[i] for i in indices)
        groups = None if self.groups is None else tuple(self.groups[i] for i in indices)
        return replace(self, paths=paths, targets=targets, groups=groups)

    def by_class(self) -> tuple[tuple[int, ...], list[str]]:
        """Return the class of each image and the classes in words; images with rows as targets are of one class."""
        if isinstance(self.targets[0], int):
            return self.targets, [f"class {name}" for name in self.class_names]
        return (0,) * len(self.targets), ["the data"]


class ImageDataset(Dataset[tuple[Tensor, Any]]):
    """Images as ``(tensor, target)`` pairs, read from disk each time.

    An unreadable image raises an error. Passes of the recipes skip it instead: ``broken`` has a message for each that
    was skipped, by its path. Phases with an `Augmentation` need ``augment``, which returns the transform of one.
    Images have the ``channels`` of a model, as in the table of ``--in-chans`` in the README.

    >>> folder = LabelledFolder(Path("animals"), ("cat", "dog"), (Path("animals/dog/1.jpg"),), (1,))
    >>> len(ImageDataset(folder, transform=lambda image: torch.zeros(3, 8, 8)))
    1
    """

    def __init__(
        self,
        folder: LabelledFolder,
        transform: Callable[[Any], Tensor],
        *,
        augment: Callable[[Augmentation], Callable[[Any], Tensor]] | None = None,
        channels: int = 3,
    ) -> None:
        self.folder = folder
        self.transform = transform
        self.augment = augment
        self.channels = channels
        self.broken: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.folder.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        with torch.device("cpu"):  # whatever the caller's default is
            return self.transform(read_image(self.folder.paths[index], self.channels)), self.target(index)

    def target(self, index: int) -> Any:
        """Return the target of an image: a class index, or a row of float32."""
        target = self.folder.targets[index]
        return target if isinstance(target, int) else torch.tensor(target, dtype=torch.float32, device="cpu")

    def augmented(self, augmentation: Augmentation) -> "ImageDataset":
        """Return the same images with the transform of an augmentation; both record broken images in one place."""
        if self.augment is None:
            raise ValueError(
                "the training images have no transform for Phase(augment=...); pass "
                "ImageDataset(folder, transform, augment=...)"
            )
        augmented = ImageDataset(self.folder, self.augment(augmentation), augment=self.augment, channels=self.channels)
        augmented.broken = self.broken
        return augmented

    def readable(self) -> LabelledFolder:
        """Return the images that are not known to be broken."""
        indices = [index for index, path in enumerate(self.folder.paths) if str(path) not in self.broken]
        return self.folder.select(indices)

    def skip_ignored(self, targets: Tensor) -> None:
        """Record the images whose target is ``IGNORED`` in the targets of a pass over all images."""
        for index in (~is_read(targets)).nonzero().flatten().tolist():
            path = self.folder.paths[index]
            self.broken.setdefault(str(path), f"{path}: not a readable image")

    def check_classes(self) -> None:
        """Raise ValueError unless each class, or with rows as targets the dataset, has a readable image."""
        targets, names = self.folder.by_class()
        labelled = list(zip(map(str, self.folder.paths), targets, strict=True))
        readable = {target for path, target in labelled if path not in self.broken}
        for path, target in labelled:
            if target not in readable:
                raise ValueError(
                    f"{self.folder.root}: {names[target]} needs at least 2 readable images, to train and to test, and "
                    f"lacks one of these; the first that is broken is {self.broken[path]}"
                )


def read_image(path: Path, channels: int | None = 3) -> Picture:
    """Read an image with the channels of a model, rotated by its EXIF entry, with transparent pixels on white.

    Grey and RGB are converted to each other. One channel keeps 16 bits, and 32 bits in floats. Other numbers of
    channels are bands as they are in the file, without a conversion of colours: of ``.npy`` files, of TIFF files, and
    of images with 4 bands (RGBA, CMYK) or 2 (grey and alpha), whose alpha is then a band like the others.

    Args:
        path: The file.
        channels: The number of channels; None reads 8 bits in RGB, or a ``.npy`` file as it is.

    Returns:
        An image in 8 bits, grey or RGB; or a float32 tensor ``(C, H, W)``, uint8 / 255, uint16 / 65535, float32 as it
        is.

    Raises:
        FileNotFoundError: there is no such file.
        BandsError: the image has another number of bands; a ValueError.
        ValueError: the file is not an image, or is truncated.
    """
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            # Pillow's warnings about damaged metadata of a readable image are not useful here.
            warnings.simplefilter("ignore")
            # Pillow warns about a decompression bomb, and raises an error at twice the size; here both are errors.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            start = file.read(len(NPY))
            file.seek(0)
            if start == NPY:
                return read_npy(file, channels)
            try:
                with Image.open(file) as image:
                    if not start.startswith(TIFF) or _reads_all(image, channels):
                        return _from_pillow(image, channels)
            except UnidentifiedImageError:
                if not start.startswith(TIFF):
                    raise
            file.seek(0)
            return read_tiff(file, channels)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except MemoryError:
        raise ValueError(f"{path}: takes more memory than there is") from None
    except BandsError as error:
        raise BandsError(f"{path}: {error}") from None
    except Exception as error:  # Pillow may raise anything for a damaged file, including struct.error and KeyError
        reason = re.sub(" <.*>$", "", str(error))  # Pillow ends some of its messages with the file
        raise ValueError(f"{path}: not a readable image ({reason})") from error


def _reads_all(image: Image.Image, channels: int | None) -> bool:
    """Return whether Pillow reads a TIFF file: it reduces bands of 16 bits to 8, separates pages, and omits bands.

    It mixes the bytes of 16 bits where each band is stored as a plane (PlanarConfiguration 2).
    """
    tags: Any = getattr(image, "tag_v2", {})
    bits, found, read = tags.get(BITSPERSAMPLE, (8,)), tags.get(SAMPLESPERPIXEL, 1), len(image.getbands())
    if channels in {None, 1, 3}:
        return found == 1 or (read > 1 and (tags.get(PLANAR_CONFIGURATION) != 2 or set(bits) <= {8}))
    return read == found and set(bits) <= {8} and getattr(image, "n_frames", 1) == 1


def _from_pillow(file: Image.Image, channels: int | None) -> Picture:
    """Convert an image that Pillow has opened."""
    check_pixels(*file.size)
    image = ImageOps.exif_transpose(file)
    if channels not in {None, 1, 3}:
        return from_array(numpy.asarray(image.convert("RGB") if image.mode in {"P", "PA"} else image), channels)
    if image.mode.startswith("I;16") or (image.mode == "I" and file.format == "PPM"):  # Pillow scales a PGM to 16 bits
        tags: Any = getattr(file, "tag_v2", {})
        inverted = tags.get(PHOTOMETRIC_INTERPRETATION) == MIN_IS_WHITE  # Pillow inverts only 8 bits or less
        values = numpy.asarray(image).astype(numpy.uint16)
        values = to_all_bits(values, tags.get(BITSPERSAMPLE, (16,))[0], inverted=inverted)
        return from_array(values, 1) if channels == 1 else from_array((values >> 8).astype(numpy.uint8), 3)
    if channels == 1 and image.mode == "F":
        return from_array(numpy.asarray(image), channels)
    if image.mode in {"I", "F"}:
        raise ValueError("its 32-bit values have no known range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def spread_rows(count: int) -> list[int]:
    """Return up to eight indices, spread over all rows."""
    return sorted({round(look * (count - 1) / 7) for look in range(8)})


def check_first_images(folder: LabelledFolder, channels: int) -> None:
    """Raise ValueError if none of up to eight images, spread over all, fits the channels of a model.

    Images that are broken do not count: a pass reports them. Pages of a TIFF file that are not read are logged.
    """
    misfit: OSError | ValueError | None = None
    for index in spread_rows(len(folder.paths)):
        try:
            read_image(folder.paths[index], channels)
        except (OSError, ValueError) as error:
            if isinstance(error, BandsError) or isinstance(error.__cause__, ModuleNotFoundError):
                misfit = misfit or error
            continue
        if channels in {1, 3} and (pages := _count_pages(folder.paths[index])) > 1:
            logger.warning(
                "%s: has %d pages, of which only the first is read; to train on pages as bands, save them as an array "
                "(H, W, %d) in a .npy file",
                *(printable(folder.paths[index]), pages, pages),
            )
        return
    if misfit is not None:
        raise misfit


def _count_pages(path: Path) -> int:
    """Return the number of pages of a TIFF file that Pillow reads; 1 of other files."""
    with warnings.catch_warnings(), path.open("rb") as file:
        warnings.simplefilter("ignore")  # as in `read_image`
        try:
            return int(getattr(Image.open(file, formats=["TIFF"]), "n_frames", 1))
        except UnidentifiedImageError:
            return 1
