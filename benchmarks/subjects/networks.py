"""The networks that the benchmarks know by name: any timm architecture, and the networks of the article."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from torch import Tensor, nn

from backbone_finetune import FineTuneModel

ARTICLE_NETWORKS = ("ConvModel", "PretrainedResNet", "PretrainedResNetVariation")
NUM_CLASSES = 10


@cache
def article_module() -> ModuleType:
    """Load the article's networks and its recipe."""
    # The article's networks are written once, beside the tests that hold us to the article; the benchmarks run from a
    # clone, where that file is at hand, so they load it from there and need no second copy.
    path = Path(__file__).resolve().parents[2] / "tests" / "helpers" / "article_networks.py"
    spec = importlib.util.spec_from_file_location("article_networks", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{path}: the article's networks are not there; run the benchmarks from a clone.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_names(names: Sequence[str], *, beside_timm: Sequence[str] = ()) -> None:
    """Raise ValueError for a name that is neither a timm architecture nor one of `beside_timm`, before any work."""
    unknown = [name for name in names if name not in beside_timm and not timm.is_model(name)]
    if unknown:
        others = "".join(f", or {name}" for name in beside_timm)
        raise ValueError(
            f"--models {' '.join(unknown)}: timm {timm.__version__} has no such architecture; "
            f"pass one that timm.list_models() names{others}."
        )


@dataclass(frozen=True)
class Network:
    """A network ready to measure, with the images and labels that all its variants share."""

    name: str
    model: FineTuneModel
    images: Tensor  # (B, 3, H, W)
    labels: Tensor  # (B,)

    @property
    def depth(self) -> int:
        """The number of layer groups: what `trainable_groups` goes up to."""
        return len(self.model.layer_groups)


def build_network(
    name: str,
    *,
    batch_size: int,
    image_size: int | None,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Network:
    """Build a network with random weights, as weights do not change what a step costs, and a batch of random images.

    `image_size` None takes timm's input size. The article's networks see its 64 pixels: ConvModel fits no others.
    """
    torch.manual_seed(0)
    if name in ARTICLE_NETWORKS:
        model, size = _wrap_article_network(name), (3, 64, 64)
    else:
        model, size = _wrap_timm_network(name, image_size)
    images = torch.randn(batch_size, *size, device=device).contiguous(memory_format=memory_format)
    labels = torch.randint(NUM_CLASSES, (batch_size,), device=device)
    model.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    return Network(name, model, images, labels)


def _wrap_article_network(name: str) -> FineTuneModel:
    network: nn.Module = getattr(article_module(), name)()
    classifier = network.get_submodule("fc")
    return FineTuneModel.from_module(network, classifier, example_input=torch.zeros(1, 3, 64, 64))


def _wrap_timm_network(name: str, image_size: int | None) -> tuple[FineTuneModel, tuple[int, int, int]]:
    size, arguments = input_size_of(name, image_size)
    return FineTuneModel.from_timm(name, num_classes=NUM_CLASSES, **arguments), size


def input_size_of(name: str, image_size: int | None) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Return the size of a timm architecture's images, (channels, height, width), and what to build it with for them.

    `image_size` None takes the architecture's own.
    """
    config = timm.get_pretrained_cfg(name)
    size = config.input_size if config is not None else (3, 224, 224)
    if image_size is None:
        return size, {}
    # A network whose position embeddings have a fixed size must be built for the images it will see.
    built_for_size = config is not None and config.fixed_input_size
    return (size[0], image_size, image_size), {"img_size": image_size} if built_for_size else {}
