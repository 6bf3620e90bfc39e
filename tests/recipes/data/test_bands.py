"""Images of any number of bands: how files are read for the channels of a model, and their transform."""

from __future__ import annotations

import pickle
import resource
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from backbone_finetune.recipes.data.bands import BandsError, blank, to_rgb
from backbone_finetune.recipes.data.images import ImageDataset, LabelledFolder, read_image
from backbone_finetune.recipes.data.loading import DeviceLoader
from backbone_finetune.recipes.data.sources.finding import find_images
from backbone_finetune.recipes.data.transforms import split_transform
from backbone_finetune.recipes.models.file import build_transform

DRAW = numpy.random.default_rng(0)
BANDS = DRAW.integers(0, 256, (40, 48, 5), dtype=numpy.uint8)
CPU = torch.device("cpu")


def write_npy(path: Path, array: Any) -> Path:
    numpy.save(path, array)
    return path


def values_of(picture: Image.Image | Tensor) -> Any:
    return numpy.asarray(picture)


@pytest.mark.parametrize("shape", [(40, 48), (40, 48, 1), (40, 48, 3)])
def test_bytes_of_one_or_three_bands_are_images_as_pillow_gives_them(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = BANDS.reshape(-1)[: numpy.prod(shape)].reshape(shape)
    png = tmp_path / "image.png"
    Image.fromarray(array.squeeze()).save(png)
    for channels in (1, 3):
        read = read_image(write_npy(tmp_path / "image.npy", array), channels)
        assert isinstance(read, Image.Image)
        assert numpy.array_equal(values_of(read), values_of(read_image(png, channels)))


@pytest.mark.parametrize(("dtype", "largest"), [("uint8", 255), ("uint16", 65535), ("float32", 1), (">u2", 65535)])
def test_values_of_each_dtype_have_a_documented_range(tmp_path: Path, dtype: str, largest: int) -> None:
    array = (BANDS * (largest / 255 if largest > 1 else 0.7)).astype(dtype)
    read = read_image(write_npy(tmp_path / "image.npy", array), 5)
    assert isinstance(read, Tensor)
    assert read.dtype == torch.float32
    assert numpy.allclose(read, numpy.moveaxis(array, 2, 0).astype("float64") / largest, rtol=1e-6)


def test_one_channel_keeps_16_bits_and_three_channels_8(tmp_path: Path) -> None:
    low, high = (numpy.full((40, 40), value, dtype=numpy.uint16) for value in (1000, 1001))
    for name, array in (("low.png", low), ("high.png", high), ("low.tif", low), ("high.tif", high)):
        Image.fromarray(array).save(tmp_path / name)
    for suffix in ("png", "tif"):
        one, other = (read_image(tmp_path / f"{name}.{suffix}", 1) for name in ("low", "high"))
        assert torch.allclose(torch.as_tensor(values_of(other) - values_of(one)), torch.tensor(1 / 65535), atol=1e-7)
        one, other = (read_image(tmp_path / f"{name}.{suffix}", 3) for name in ("low", "high"))
        assert numpy.array_equal(values_of(one), values_of(other))


def test_one_channel_is_grey_as_pillow_converts_it_with_transparency_on_white(tmp_path: Path) -> None:
    Image.fromarray(BANDS[..., :3]).save(tmp_path / "colour.png")
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert values_of(read_image(tmp_path / "clear.png", 1)).min() == 255
    with Image.open(tmp_path / "colour.png") as image:
        expected = values_of(image.convert("L"))
    assert numpy.array_equal(values_of(read_image(tmp_path / "colour.png", 1)), expected)
    floats = write_npy(tmp_path / "floats.npy", (BANDS[..., :3] / 255).astype("float32"))
    assert numpy.abs(values_of(read_image(floats, 1))[0] * 255 - expected).max() < 1
    back = read_image(write_npy(tmp_path / "grey.npy", (BANDS[..., 0] / 255).astype("float32")), 3)
    assert torch.equal(back[0], back[2])


def test_four_channels_are_the_bands_of_an_image_without_blending(tmp_path: Path) -> None:
    array = BANDS[..., :4].copy()
    array[..., 3] = 0  # fully transparent
    for mode, name in (("RGBA", "image.png"), ("RGBA", "image.tif"), ("CMYK", "ink.tif")):
        Image.fromarray(array, mode).save(tmp_path / name)
        read = read_image(tmp_path / name, 4)
        assert numpy.allclose(values_of(read), numpy.moveaxis(array, 2, 0) / 255)
    assert values_of(read_image(tmp_path / "image.png", 3)).min() == 255


@pytest.mark.parametrize(
    ("array", "channels", "message"),
    [
        (BANDS, 3, r"image.npy: 5 bands; the model takes 3; train one with --in-chans 5$"),
        (BANDS, 1, "5 bands; the model takes 1"),
        (BANDS[..., 0], 5, "1 band; the model takes 5"),
        (BANDS.transpose(2, 0, 1), 5, r"48 bands; the model takes 5, and bands come last \(its shape is \(5, 40, 48\)"),
        (
            BANDS.astype("int32"),
            5,
            r"an array of int32; expected uint8, uint16 or float32; convert it with array\.astype",
        ),
        (numpy.array([["text"]]), 1, "expected uint8"),
        (BANDS[None], 5, r"shape \(1, 40, 48, 5\); expected \(H, W\) or \(H, W, C\)"),
        (BANDS[:0], 5, "48 x 0 pixels"),
        (numpy.zeros((2, 400), dtype="uint8"), 1, "at most 1 to 100"),
        (numpy.full((4, 4), numpy.inf, dtype="float32"), 1, "not all finite"),
        (numpy.full((4, 4), numpy.nan, dtype="float32"), 3, "not all finite"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(tmp_path: Path, array: Any, channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_image(write_npy(tmp_path / "image.npy", array), channels)


def test_a_photo_for_a_model_of_bands_is_refused(tmp_path: Path) -> None:
    for mode in ("RGB", "P"):
        Image.new(mode, (32, 32)).save(tmp_path / "photo.png")
        with pytest.raises(BandsError, match="3 bands; the model takes 5; train one with --in-chans 3"):
            read_image(tmp_path / "photo.png", 5)


class Harmful:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("harmed"),)


def test_a_hostile_npy_file_runs_nothing_and_allocates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    numpy.save("objects.npy", numpy.array([[Harmful()]], dtype=object), allow_pickle=True)
    Path("pickle.npy").write_bytes(pickle.dumps(Harmful()))
    for name in ("objects.npy", "pickle.npy"):
        with pytest.raises(ValueError, match=f"{name}: not a readable image"):
            read_image(Path(name), 1)
    assert not Path("harmed").exists()
    # A header may name any shape.
    whole = write_npy(Path("whole.npy"), BANDS).read_bytes()
    Path("short.npy").write_bytes(whole[:-1])
    for shape in (b"(40, 48, 5)", b"(8000, 8000, 5)", b"(90000, 90000, 5)", b"(-4, -8, 5)"):
        old = b"'shape': (40, 48, 5), }"
        new = b"'shape': " + shape + b", }"
        Path("short.npy").write_bytes(whole[:-1].replace(old + b" " * (len(new) - len(old)), new.ljust(len(old))))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match=r"short\.npy: (not a readable image|takes more memory)"):
            read_image(Path("short.npy"), 5)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # kilobytes


def smooth(size: tuple[int, int]) -> Image.Image:
    """Draw an image whose values stay away from 0 and 255, where Pillow clips what bicubic interpolation adds."""
    small = DRAW.integers(40, 216, (12, 16, 3), dtype=numpy.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("sides", [(64, 64), (48, 80)])
def test_floats_are_transformed_like_bytes(crop_mode: str, interpolation: str, sides: tuple[int, int]) -> None:
    config = timm.data.resolve_model_data_config(timm.create_model("test_resnet"))
    config |= {"input_size": (3, *sides), "crop_pct": 0.9, "crop_mode": crop_mode, "interpolation": interpolation}
    transform = build_transform(config)
    decode, normalize = split_transform(transform)
    assert normalize is not None
    std = torch.tensor(config["std"]).view(3, 1, 1)
    for size in ((200, 150), (90, 131), (40, 50)):
        image = smooth(size)
        floats = torch.from_numpy(numpy.array(image)).permute(2, 0, 1) / 255
        expected, found = transform(image), transform(floats)
        # Pillow rounds to a byte after each of the two axes.
        assert ((found - expected) * std).abs().max() < 1.5 / 255
        assert ((found - expected) * std).abs().mean() < 0.4 / 255
        decoded = decode(floats)
        assert all(torch.equal(normalize(decoded), found) for _ in range(2))  # what it is given does not change


def test_a_batch_may_mix_bytes_and_floats_and_broken_images(tmp_path: Path) -> None:
    grey = numpy.full((40, 40), 200, dtype=numpy.uint8)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype("uint16") * 257).save(tmp_path / "16.png")
    (tmp_path / "broken.png").touch()
    config = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.25,), "interpolation": "bicubic", "crop_pct": 1.0}
    paths = tuple(tmp_path / name for name in ("broken.png", "8.png", "16.png"))
    data = ImageDataset(LabelledFolder(tmp_path, ("a", "b"), paths, (0, 1, 0)), build_transform(config), channels=1)
    ((images, targets),) = DeviceLoader(data, CPU)
    assert images.shape == (3, 1, 32, 32)
    assert torch.allclose(images, torch.tensor((200 / 255 - 0.5) / 0.25), atol=1e-5)
    assert targets.tolist() == [-100, 1, 0]
    assert torch.allclose(data[2][0], images[2])
    for paths in ((tmp_path / "8.png",), (tmp_path / "broken.png",)):  # bytes alone are sent as bytes
        alone = ImageDataset(LabelledFolder(tmp_path, ("a",), paths, (0,)), build_transform(config), channels=1)
        assert DeviceLoader(alone, CPU).samples.__getitems__([0]).values[0].dtype == torch.uint8


def test_blank_images_have_the_channels_of_the_model() -> None:
    assert [values_of(blank(channels)).shape for channels in (1, 3, 5)] == [(64, 64), (64, 64, 3), (5, 64, 64)]


def test_thumbnails_show_the_first_bands_from_their_least_to_their_largest_value() -> None:
    floats = torch.linspace(-3, 9, 5 * 8 * 8).reshape(5, 8, 8)
    shown = numpy.asarray(to_rgb(floats))
    assert (shown.min(), shown.max(), shown.shape) == (0, 255, (8, 8, 3))
    assert numpy.asarray(to_rgb(torch.zeros(2, 8, 8))).max() == 0


def test_npy_files_are_images_of_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_npy(tmp_path / name / "0.npy", BANDS)
    assert find_images(tmp_path).targets == (0, 1)


class TestTiff:
    """Bands of TIFF files that Pillow does not read whole."""

    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
    @pytest.mark.parametrize("planar", [False, True])
    def test_reads_bands_of_each_dtype_and_layout(self, tmp_path: Path, dtype: str, planar: bool) -> None:
        tifffile: Any = pytest.importorskip("tifffile")
        array = BANDS.astype(dtype)
        layout = {"planarconfig": "separate" if planar else "contig", "photometric": "minisblack"}
        tifffile.imwrite(tmp_path / "image.tif", array.transpose(2, 0, 1) if planar else array, **layout)
        expected = read_image(write_npy(tmp_path / "image.npy", array), 5)
        assert torch.equal(
            torch.as_tensor(values_of(read_image(tmp_path / "image.tif", 5))), torch.as_tensor(values_of(expected))
        )
        with pytest.raises(BandsError, match="5 bands; the model takes 3"):
            read_image(tmp_path / "image.tif", 3)

    def test_four_bands_of_16_bits_keep_them(self, tmp_path: Path) -> None:
        tifffile: Any = pytest.importorskip("tifffile")
        array = BANDS[..., :4].astype("uint16") + 1000
        tifffile.imwrite(tmp_path / "image.tif", array, planarconfig="contig", photometric="rgb", extrasamples=[2])
        assert numpy.allclose(values_of(read_image(tmp_path / "image.tif", 4)), array.transpose(2, 0, 1) / 65535)

    def test_pages_are_bands_and_other_axes_are_refused(self, tmp_path: Path) -> None:
        tifffile: Any = pytest.importorskip("tifffile")
        pages = BANDS.transpose(2, 0, 1)
        for array in (pages, pages[None], pages[:, None]):  # an axis of length 1 does not count
            tifffile.imwrite(tmp_path / "pages.tif", array, photometric="minisblack")
            assert numpy.array_equal(values_of(read_image(tmp_path / "pages.tif", 5)), pages.astype("f") / 255)
        tifffile.imwrite(tmp_path / "stack.tif", numpy.stack([pages, pages]), photometric="minisblack")
        with pytest.raises(ValueError, match="expected height"):
            read_image(tmp_path / "stack.tif", 5)

    @pytest.mark.parametrize("dtype", ["uint8", "uint16"])
    @pytest.mark.parametrize("bands", [1, 5])
    def test_zero_is_white_where_the_file_says_so(self, tmp_path: Path, dtype: str, bands: int) -> None:
        tifffile: Any = pytest.importorskip("tifffile")
        array = BANDS.transpose(2, 0, 1)[:bands].astype(dtype)
        for name in ("black", "white"):
            # In this order of bytes Pillow does not read 16 bits whose zero is white.
            tifffile.imwrite(tmp_path / f"{name}.tif", array, photometric=f"minis{name}", byteorder=">")
        black, white = (values_of(read_image(tmp_path / f"{name}.tif", bands)) for name in ("black", "white"))
        assert numpy.allclose(black + white, 255 if black.dtype == numpy.uint8 else 1)

    def test_twelve_bits_are_scaled(self, tmp_path: Path) -> None:
        tifffile: Any = pytest.importorskip("tifffile")
        pytest.importorskip("imagecodecs")
        array = numpy.array([[0, 2048, 4095]], dtype=numpy.uint16)
        tifffile.imwrite(tmp_path / "image.tif", array, photometric="miniswhite", bitspersample=12)
        assert numpy.allclose(values_of(read_image(tmp_path / "image.tif", 1)), [[1, 0.5, 0]], atol=1e-3)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_planes_of_16_bits_are_not_read_by_pillow_which_mixes_their_bytes(
        self, tmp_path: Path, channels: int
    ) -> None:
        tifffile: Any = pytest.importorskip("tifffile")
        planes = numpy.full((3, 4, 6), 20000, dtype=numpy.uint16)
        tifffile.imwrite(tmp_path / "image.tif", planes, planarconfig="separate", photometric="rgb")
        found = read_image(tmp_path / "image.tif", channels)
        assert isinstance(found, Tensor)
        torch.testing.assert_close(found, torch.full((channels, 4, 6), 20000 / 65535))

    @pytest.mark.parametrize("channels", [3, 5])
    def test_a_missing_package_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
        monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
        (tmp_path / "image.tif").write_bytes(b"II*\0" + bytes(60))
        with pytest.raises(
            ValueError, match=r"tifffile is not installed; run: pip install 'backbone-finetune\[tiff\]'"
        ):
            read_image(tmp_path / "image.tif", channels)
