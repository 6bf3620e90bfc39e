"""Images with any number of bands: arrays in ``.npy`` and TIFF files, and their conversion to a model's channels."""

from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy
import torch
from PIL import Image
from torch import Tensor

from ..extras import import_extra

# An image of 8 bits, grey or RGB; or a float32 tensor (C, H, W): uint8 / 255, uint16 / 65535, float32 as it is.
Picture = Image.Image | Tensor

NPY, TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the first bytes of these files
LARGEST = {"uint8": 255, "uint16": 65535, "float32": 1}  # the value that becomes 1, by dtype
MIN_IS_WHITE = 0  # the photometric interpretation of a grey TIFF whose value 0 is white
GREY = (0.299, 0.587, 0.114)  # Pillow's weights of red, green and blue (ITU-R 601)
# Resized by its shorter side, an image of 1 x 100,000 pixels would need many gigabytes.
MOST_ELONGATED = 100


class BandsError(ValueError):
    """An image has another number of bands than the model has channels."""


def check_bands(found: int, channels: int | None, hint: str = "") -> None:
    """Raise BandsError unless an image can be converted to the channels of a model: grey and RGB, or the same number.

    >>> try:
    ...     check_bands(4, 3)
    ... except BandsError as error:
    ...     print(error)
    4 bands; the model takes 3; train one with --in-chans 4
    """
    if channels not in {None, found} and {found, channels} != {1, 3}:
        count = f"{found} band{'s' * (found > 1)}"
        raise BandsError(f"{count}; the model takes {channels}{hint}; train one with --in-chans {found}")


def check_pixels(width: int, height: int) -> None:
    """Raise ValueError for an image without pixels, with more than Pillow allows, or that is too elongated."""
    if not 0 < width * height <= (Image.MAX_IMAGE_PIXELS or width * height):
        raise ValueError(f"{width} x {height} pixels; 1 to {Image.MAX_IMAGE_PIXELS:,} are allowed")
    if max(width, height) > MOST_ELONGATED * min(width, height):
        raise ValueError(f"{width} x {height} pixels; at most 1 to {MOST_ELONGATED} is allowed")


def convert(picture: Picture, channels: int | None) -> Picture:
    """Convert an image to the channels of a model; None leaves it as it is.

    Raises:
        BandsError: it has another number of bands, and they are not grey or RGB.
    """
    found = len(picture.getbands()) if isinstance(picture, Image.Image) else len(picture)
    check_bands(found, channels)
    if channels in {None, found}:
        return picture
    if isinstance(picture, Image.Image):
        return picture.convert("L" if channels == 1 else "RGB")
    return (
        picture.expand(3, -1, -1)
        if channels == 3
        else torch.einsum("c,chw->hw", torch.tensor(GREY, device="cpu"), picture)[None]
    )


def from_array(array: Any, channels: int | None = None) -> Picture:
    """Convert an array ``(H, W)`` or ``(H, W, C)`` to an image with the channels of a model.

    >>> from_array(numpy.full((2, 3), 65535, dtype=numpy.uint16))
    tensor([[[1., 1., 1.],
             [1., 1., 1.]]])

    Raises:
        ValueError: its dtype is not uint8, uint16 or float32, or its values are not finite.
    """
    check_array(array.shape, array.dtype, channels)
    array = array if array.ndim == 3 else array[..., None]
    if array.dtype == numpy.uint8 and array.shape[2] in {1, 3}:
        return convert(
            Image.fromarray(numpy.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array)), channels
        )
    values = numpy.moveaxis(array, 2, 0).astype(numpy.float32)
    if not numpy.isfinite(values).all():
        raise ValueError("its values are not all finite")
    return convert(torch.from_numpy(values / numpy.float32(LARGEST[array.dtype.name])), channels)


def check_array(shape: Sequence[int], dtype: Any, channels: int | None) -> None:
    """Raise ValueError unless an array of this shape and dtype is an image that a model with these channels takes."""
    if len(shape) not in {2, 3}:
        raise ValueError(f"an array of shape {tuple(shape)}; expected (H, W) or (H, W, C)")
    are_first = len(shape) == 3 and shape[0] == channels
    hint = f", and bands come last (its shape is {tuple(shape)}; use numpy.moveaxis(array, 0, -1))" if are_first else ""
    check_bands(shape[2] if len(shape) == 3 else 1, channels, hint)
    if dtype.name not in LARGEST:
        raise ValueError(f"an array of {dtype.name}; expected uint8, uint16 or float32; convert it with array.astype")
    check_pixels(shape[1], shape[0])


def read_npy(file: BinaryIO, channels: int | None) -> Picture:
    """Read an image from a ``.npy`` file; nothing is unpickled."""
    return from_array(numpy.load(file, allow_pickle=False), channels)


def read_tiff(file: BinaryIO, channels: int | None) -> Picture:
    """Read the first image of a TIFF file with any number of bands, by ``tifffile``."""
    with import_extra("tifffile", "tiff").TiffFile(file) as tiff:
        series, page = tiff.series[0], tiff.series[0].keyframe
        axes, shape = series.get_axes(squeeze=True), series.get_shape(squeeze=True)
        bands = [position for position, axis in enumerate(axes) if axis not in "YX"]
        if not {"Y", "X"} <= set(axes) or len(bands) > 1:
            raise ValueError(f"axes {axes} of {shape}; expected height (Y), width (X) and bands")
        order = [axes.index("Y"), axes.index("X"), *bands]
        check_array([shape[position] for position in order], series.dtype, channels)
        array = series.asarray().reshape(shape).transpose(order)
        if array.dtype.kind == "u":
            inverted = page.photometric == MIN_IS_WHITE and page.samplesperpixel == 1
            array = to_all_bits(array, page.bitspersample, inverted=inverted)
        return from_array(array, channels)


def to_all_bits(array: Any, bits: int, *, inverted: bool) -> Any:
    """Scale whole numbers of some bits, such as 12 in uint16, to all bits of their dtype, and invert them.

    >>> to_all_bits(numpy.array([0, 4095], dtype=numpy.uint16), 12, inverted=True)
    array([65535,    15], dtype=uint16)
    """
    array = array << (8 * array.itemsize - bits)
    return numpy.iinfo(array.dtype).max - array if inverted else array


def to_rgb(picture: Picture) -> Image.Image:
    """Convert an image to RGB, to look at: its first bands, each from its least to its largest value.

    >>> to_rgb(torch.tensor([[[0.1, 0.2]]] * 5)).getpixel((1, 0))
    (255, 255, 255)
    """
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    shown = picture[:3] if len(picture) >= 3 else picture[:1].expand(3, -1, -1)
    least, most = shown.amin((1, 2), keepdim=True), shown.amax((1, 2), keepdim=True)
    shares = (shown - least) / (most - least).clamp(min=torch.finfo(torch.float32).tiny)
    return Image.fromarray((shares * 255).byte().permute(1, 2, 0).contiguous().numpy())


def size_of(picture: Picture) -> tuple[int, int]:
    """Return the width and height of an image.

    >>> size_of(torch.zeros(5, 40, 60))
    (60, 40)
    """
    if isinstance(picture, Tensor):
        return picture.shape[2], picture.shape[1]
    return picture.width, picture.height


def blank(channels: int) -> Picture:
    """Return ImageNet's mean colour, which is almost neutral for a BatchNorm."""
    red, green, blue = (124, 116, 104)
    if channels == 3:
        return Image.new("RGB", (64, 64), (red, green, blue))
    return from_array(numpy.full((64, 64, channels), green, dtype=numpy.uint8))
