"""The networks that people fine-tune beside timm's own, each as the backbone that is left without its classifier."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
from torch import nn

TORCHVISION = {  # what takes off the classifier
    "efficientnet_b0": "classifier",
    "mobilenet_v3_small": "classifier",
    "densenet121": "classifier",
    "regnet_y_400mf": "fc",
    "resnet18": "fc",
    "resnet50": "fc",
    "vgg16": "classifier.6",
    "vit_b_16": "heads",
    "swin_t": "head",
    "convnext_tiny": "classifier.2",
    "maxvit_t": "classifier.5",
}
TRANSFORMERS = ("ViT", "Dinov2", "DINOv3ViT", "Beit", "Swin", "ConvNext", "ConvNextV2", "ResNet", "Bert")
OPEN_CLIP = ("ViT-B-32", "RN50", "convnext_base")
FEATURES_ONLY = ("vit_tiny_patch16_224", "convnext_tiny", "resnet50")


class PopularNetwork(NamedTuple):
    """A network, the package that it needs, and how it is built with random weights."""

    name: str
    package: str
    build: Callable[[], nn.Module]


class Adapter(nn.Module):
    """A timm network as a child of a user's own module."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


def popular_networks() -> list[PopularNetwork]:
    """List them all, whether their packages are installed or not."""
    return [
        *(PopularNetwork(f"torchvision {name}", "torchvision", _torchvision(name)) for name in TORCHVISION),
        *(PopularNetwork(f"transformers {name}", "transformers", _transformers(name)) for name in TRANSFORMERS),
        *(PopularNetwork(f"open_clip {name}, image tower", "open_clip_torch", _open_clip(name)) for name in OPEN_CLIP),
        *(PopularNetwork(f"timm {name}, features_only", "timm", _features_only(name)) for name in FEATURES_ONLY),
        PopularNetwork("timm resnet18 in an adapter", "timm", lambda: Adapter(_timm("resnet18"))),
        PopularNetwork("timm convnext_tiny in an adapter", "timm", lambda: Adapter(_timm("convnext_tiny"))),
        PopularNetwork(
            "timm vit_tiny_patch16_224 in PEFT's LoRA", "peft", _lora(lambda: _timm(FEATURES_ONLY[0]), "qkv")
        ),
        PopularNetwork("transformers ViT in PEFT's LoRA", "peft", _lora(_transformers("ViT"), "q_proj")),
    ]


def _timm(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=0)


def _features_only(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, features_only=True)


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        network: nn.Module = getattr(importlib.import_module("torchvision.models"), name)()
        network.set_submodule(TORCHVISION[name], nn.Identity())
        return network

    return build


def _transformers(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers: Any = importlib.import_module("transformers")
        network: nn.Module = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")())
        return network

    return build


def _open_clip(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        tower: nn.Module = importlib.import_module("open_clip").create_model(name).visual
        return tower

    return build


def _lora(build: Callable[[], nn.Module], target: str) -> Callable[[], nn.Module]:
    def build_with_adapters() -> nn.Module:
        peft: Any = importlib.import_module("peft")
        network: nn.Module = peft.get_peft_model(build(), peft.LoraConfig(target_modules=[target]))
        return network

    return build_with_adapters
