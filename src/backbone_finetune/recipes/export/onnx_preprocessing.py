"""timm's evaluation transform as an ONNX graph, from the bytes of an image to the input of a network."""

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

# Pillow's weights: antialiased, with a = -0.5 for bicubic, and normalised at the edges.
RESIZE = {
    "bilinear": 'mode = "linear", antialias = 1, exclude_outside = 1',
    "bicubic": 'mode = "cubic", cubic_coeff_a = -0.5, antialias = 1, exclude_outside = 1',
}
GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
preprocessing (uint8[batch, height, width, {channels}] image)
=> (float[batch, {channels}, {rows}, {columns}] preprocessed) {{
    pre_image = Transpose <perm = [0, 3, 1, 2]> (image)
    pre_size = Shape <start = 1, end = 3> (image)
    {resized_size}
    pre_outer = Shape <end = 2> (pre_image)
    pre_shape = Concat <axis = 0> (pre_outer, pre_resized_size)
    pre_resized = Resize <{resize}> (pre_image, , , pre_shape)
    pre_crop = Constant <value = int64[2] {{{rows}, {columns}}}> ()
    pre_margins = Sub (pre_resized_size, pre_crop)
    pre_double_margins = Cast <to = 11> (pre_margins)
    pre_half = Constant <value = double {{0.5}}> ()
    pre_halves = Mul (pre_double_margins, pre_half)
    pre_rounded = Round (pre_halves)
    pre_starts = Cast <to = 7> (pre_rounded)
    pre_ends = Add (pre_starts, pre_crop)
    pre_axes = Constant <value = int64[2] {{2, 3}}> ()
    pre_cropped = Slice (pre_resized, pre_starts, pre_ends, pre_axes)
    pre_bytes = Cast <to = 1> (pre_cropped)
    pre_largest = Constant <value = float {{255.0}}> ()
    pre_shares = Div (pre_bytes, pre_largest)
    pre_mean = Constant <value = float[1, {channels}, 1, 1] {{{mean}}}> ()
    pre_shifted = Sub (pre_shares, pre_mean)
    pre_std = Constant <value = float[1, {channels}, 1, 1] {{{std}}}> ()
    preprocessed = Div (pre_shifted, pre_std)
}}
"""
# The shorter side becomes the target, and the longer one is rounded down: torchvision's Resize.
SHORTER_SIDE = """
    pre_target = Constant <value = int64 {{{0}}}> ()
    pre_shorter = ReduceMin <keepdims = 0> (pre_size)
    pre_product = Mul (pre_size, pre_target)
    pre_resized_size = Div (pre_product, pre_shorter)
"""
# For targets that are not square, the smaller ratio counts, and both sides are rounded: timm's ResizeKeepRatio.
SMALLER_RATIO = """
    pre_target = Constant <value = double[2] {{{0}.0, {1}.0}}> ()
    pre_double_size = Cast <to = 11> (pre_size)
    pre_ratios = Div (pre_double_size, pre_target)
    pre_ratio = ReduceMin <keepdims = 0> (pre_ratios)
    pre_scaled = Div (pre_double_size, pre_ratio)
    pre_nearest = Round (pre_scaled)
    pre_resized_size = Cast <to = 7> (pre_nearest)
"""
BOTH_SIDES = """
    pre_resized_size = Constant <value = int64[2] {{{0}, {1}}}> ()
"""


def build_preprocessing(data_config: Mapping[str, Any]) -> Any:
    """Build a graph from ``image``, uint8 ``(B, height, width, C)``, to ``preprocessed``, ``(B, C, H, W)``.

    The image is in RGB, or grey for a model of one channel.

    It resizes, crops and normalizes like timm's evaluation transform with Pillow. A pixel of a photograph differs by
    at most 2 of 255, on average by less than 0.1; by up to 7 where bicubic interpolation enlarges one side and reduces
    the other, since Pillow clips to bytes between the two.

    Raises:
        ValueError: the interpolation, the crop, or the number of channels is not supported.
    """
    channels, rows, columns = data_config["input_size"]
    if channels not in {1, 3}:
        raise ValueError(
            f"ONNX preprocessing takes grey or RGB images of 8 bits, and this model has {channels} channels; export "
            "without it"
        )
    interpolation, crop_mode, crop_pct = (data_config[name] for name in ("interpolation", "crop_mode", "crop_pct"))
    if interpolation not in RESIZE or crop_mode not in {"center", "squash"} or crop_pct > 1:
        raise ValueError(
            "ONNX preprocessing supports interpolation bilinear and bicubic, crop_mode center and squash, and crop_pct "
            f"up to 1; this model has {interpolation}, {crop_mode} and {crop_pct}; export without preprocessing"
        )
    target = [math.floor(side / crop_pct) for side in (rows, columns)]
    resized_size = BOTH_SIDES if crop_mode == "squash" else SHORTER_SIDE if rows == columns else SMALLER_RATIO
    text = GRAPH.format(
        channels=channels,
        rows=rows,
        columns=columns,
        resized_size=resized_size.format(*target).strip(),
        resize=RESIZE[interpolation],
        mean=_write(data_config["mean"]),
        std=_write(data_config["std"]),
    )
    return importlib.import_module("onnx.parser").parse_model(text)


def _write(values: Sequence[float]) -> str:
    return ", ".join(repr(float(value)) for value in values)
