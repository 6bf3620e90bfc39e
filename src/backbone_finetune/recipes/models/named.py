"""A network with named classes and a data config, for ``predict`` and ``evaluate``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import nn

from ..objectives.kinds import SingleLabel
from ..objectives.objective import Objective
from .weights import create_network


@dataclass(frozen=True)
class NamedModel:
    """A network in eval mode with the names of its classes and timm's data config.

    The network takes ``(B, C, H, W)`` as in the data config; if it ``preprocesses``, it takes whole images in uint8.
    """

    model: nn.Module
    class_names: tuple[str, ...]
    data_config: Mapping[str, Any]
    preprocesses: bool = False
    objective: Objective = field(default_factory=SingleLabel)


def load_timm_model(name: str) -> NamedModel:
    """Load a network with its weights and class names from ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.

    The names are ``label_names`` of its ``config.json``, or ImageNet's if it has those classes.

    Raises:
        ValueError: timm cannot load it, or it has no class names.
    """
    network = create_network(name, pretrained=True).eval()
    names = network.pretrained_cfg.get("label_names") or ()
    if not names and (subset := infer_imagenet_subset(network)):
        info = ImageNetInfo(subset)
        names = [f"{info.index_to_description(index)} ({label})" for index, label in enumerate(info.label_names())]  # type: ignore[no-untyped-call]
    if isinstance(names, Mapping) or len(names) != network.num_classes:
        raise ValueError(
            f"{name}: its config.json has {len(names)} label_names for {network.num_classes} classes; list all"
        )
    return NamedModel(network, tuple(map(str, names)), dict(resolve_model_data_config(network)))  # type: ignore[no-untyped-call]
