"""A network of any origin that classifies images into named classes: what ``predict`` and ``evaluate`` need to know."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class NamedModel:
    """A network in eval mode with the names of its classes and timm's data config.

    The network takes ``(B, 3, H, W)`` as the data config says; if it ``preprocesses``, it takes whole images in uint8.
    """

    model: nn.Module
    class_names: tuple[str, ...]
    data_config: Mapping[str, Any]
    preprocesses: bool = False
