"""The input of a network, its image size and channels: timm's arguments for them, and the data config."""

import json
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import ValidationError
from timm.data.config import resolve_model_data_config
from timm.models import get_model_input_config
from torch import nn

from ..text import describe_fault, one_line
from .metadata import DataConfig
from .weights import create_network

Size = tuple[int, int]  # height, width
STRIDES = (32, 14)  # sides that are multiples of these fit most networks


def input_arguments(name: str, size: Size | None, channels: int | None) -> dict[str, Any]:
    """Return timm's arguments for a network that takes images of a size and number of channels; None is its own.

    >>> input_arguments("test_vit", (96, 96), 1), input_arguments("test_resnet", (96, 96), 3)
    ({'in_chans': 1, 'img_size': 96}, {})

    With them timm adapts pretrained weights: of the first layer to the channels, and position embeddings to the size.
    A network that takes images of any size needs no argument for it. It is built on the meta device.

    Raises:
        ValueError: it does not take such images; the message names sizes that it takes.
    """
    if size is None and channels is None:
        return {}
    with torch.device("meta"):
        network = create_network(name)
    own_channels, *own_size = get_model_input_config(network)["input_size"]
    takes_size = network.pretrained_cfg.get("fixed_input_size", False)  # timm then has an argument for it
    channels = channels or own_channels
    size = size or (own_size[0], own_size[1])
    arguments: dict[str, Any] = {} if channels == own_channels else {"in_chans": channels}

    def try_size(sides: Size) -> tuple[dict[str, Any], str | None]:
        shown = sides[0] if sides[0] == sides[1] else list(sides)
        given = arguments | ({"img_size": shown} if takes_size and list(sides) != own_size else {})
        try:
            with torch.device("meta"):
                network = create_network(name, **given)
        except Exception as error:  # an architecture may raise any error for an argument that it does not support
            return given, one_line(error, most=200)
        return given, find_size_problem(network, (channels, *sides))

    given, problem = try_size(size)
    if problem is not None:
        fitting = [sides for sides in _sizes_near(size) if try_size(sides)[1] is None][:2]
        also = "" if not fitting else f"; {' and '.join(map(_show, fitting))} would fit"
        raise ValueError(
            f"{name} takes no images of {channels} channels and {_show(size)} pixels ({problem}); its own are of "
            f"{own_channels} and {_show((own_size[0], own_size[1]))}{also}"
        )
    return given


def find_size_problem(network: nn.Module, size: tuple[int, int, int]) -> str | None:
    """Return why a network on the meta device does not support an image size (C, H, W); None if it does."""
    try:
        with torch.no_grad():
            network.eval()(torch.empty(1, *size, device="meta"))
    except Exception as error:  # a network may raise any error for another size
        return str(error)[:200] or type(error).__name__
    return None


def resolve_data_config(network: Any, size: Size | None = None) -> dict[str, Any]:
    """Return timm's data config of a network as it was built, for its own image size or another one.

    >>> import timm
    >>> resolve_data_config(timm.create_model("test_resnet", in_chans=2))["mean"]
    (0.5, 0.5)

    If the mean and standard deviation of its weights are of another number of channels, their average is repeated.

    Raises:
        ValueError: a model file could not keep it: a size or a value is out of range.
    """
    channels, *own_size = get_model_input_config(network)["input_size"]
    config: dict[str, Any] = resolve_model_data_config(network, args={"input_size": (channels, *(size or own_size))})  # type: ignore[no-untyped-call]
    for name in ("mean", "std"):
        if len(config[name]) != channels:
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    try:
        DataConfig.model_validate_json(json.dumps(config))
    except ValidationError as error:
        raise ValueError(
            f"images of {channels} channels and {_show(config['input_size'][1:])} pixels: {describe_fault(error)}"
        ) from error
    return config


def _sizes_near(size: Size) -> Iterator[Size]:
    for stride in STRIDES:
        for more in (0, 1):
            yield tuple((max(side // stride, 1 - more) + more) * stride for side in size)  # type: ignore[misc]


def _show(sides: Size) -> str:
    return " x ".join(map(str, sides))
