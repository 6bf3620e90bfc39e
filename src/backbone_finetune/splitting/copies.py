"""What a network computes, run on a copy that shares its weights, leaving the network unchanged."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from timm.models import get_model_input_config
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def eval_copy(network: ModuleT) -> ModuleT:
    """Copy a network in eval mode; it shares the parameters, and has modes, buffers and caches of its own.

    >>> layer = nn.BatchNorm1d(2)
    >>> twin = eval_copy(layer)
    >>> twin.weight is layer.weight, twin.running_mean is layer.running_mean, twin.training
    (True, False, False)
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in network.parameters()}
    return _copy_with(network, memo)


def meta_copy(network: ModuleT) -> ModuleT:
    """Copy a network in eval mode with its parameters and buffers on the meta device: shapes without values.

    >>> meta_copy(nn.Linear(4, 2))(torch.empty(8, 4, device="meta")).shape
    torch.Size([8, 2])
    """
    memo: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in network.buffers()}
    for parameter in network.parameters():
        values = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    return _copy_with(network, memo)


def _copy_with(network: ModuleT, memo: dict[int, Any]) -> ModuleT:
    # Attention caches and the like hang on plain attributes; deepcopy refuses those that autograd has computed.
    for module in network.modules():
        for value in vars(module).values():
            for tensor in _tensors_in(value):
                if not tensor.is_leaf:
                    memo.setdefault(id(tensor), tensor)
    return copy.deepcopy(network, memo).eval()


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (entry for entry in value.values() if isinstance(entry, torch.Tensor))
    elif isinstance(value, (list, tuple)):
        yield from (entry for entry in value if isinstance(entry, torch.Tensor))


@contextmanager
def isolated(network: nn.Module) -> Iterator[None]:
    """Run without gradients, and leave the random state of the CPU and of the network's devices as it was.

    >>> network = nn.Linear(2, 2)
    >>> before = torch.get_rng_state()
    >>> with isolated(network):
    ...     _ = torch.rand(1)
    >>> torch.equal(before, torch.get_rng_state())
    True
    """
    devices = {p.device for p in network.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng(sorted(devices, key=str), device_type=kind), torch.no_grad():
        yield


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise AssertionError unless two tensors are the same but for rounding.

    >>> assert_same(torch.tensor([1e-7, 2e-7]), torch.tensor([1e-7, 3e-7]))
    Traceback (most recent call last):
    ...
    AssertionError: Tensor-likes are not close!...

    By `torch.testing`'s tolerances for the dtype, measured against the largest value: what is large as a whole rounds
    coarsely near zero too, and what is small as a whole would pass an absolute tolerance whatever it is.
    """
    largest = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    torch.testing.assert_close(actual / largest, expected / largest)


def check_classifier_fits(classifier: nn.Module, features: object, origin: str) -> None:
    """Raise ValueError when a classifier cannot take these features.

    >>> check_classifier_fits(nn.Linear(3, 2), torch.zeros(1, 4), "from_timm")
    Traceback (most recent call last):
    ...
    ValueError: from_timm: the classifier (Linear) cannot take the backbone's features of shape (B, 4): ...
    """
    try:
        with isolated(classifier):
            eval_copy(classifier)(features)
    except RuntimeError as error:
        shape = ", ".join(["B", *map(str, features.shape[1:])]) if isinstance(features, torch.Tensor) else "unknown"
        raise ValueError(
            f"{origin}: the classifier ({type(classifier).__name__}) cannot take the backbone's features of shape "
            f"({shape}): {error}. Size it for what the backbone gives."
        ) from error


def probe(network: nn.Module, device: str | torch.device) -> torch.Tensor:
    """Draw two pictures of the size that a network is built for.

    >>> import timm
    >>> probe(timm.create_model("test_resnet"), "cpu").shape
    torch.Size([2, 3, 160, 160])
    """
    return torch.randn(2, *get_model_input_config(network)["input_size"], device=device, dtype=dtype_of(network))


def dtype_of(network: nn.Module) -> torch.dtype:
    """Give the precision that a network computes in.

    >>> dtype_of(nn.Linear(2, 2).half())
    torch.float16
    """
    return next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())


def check_width(backbone: nn.Module, classifier: nn.Module) -> None:
    """Raise ValueError for a linear classifier that a timm backbone does not fit, where both say their width.

    >>> import timm
    >>> check_width(timm.create_model("test_resnet", num_classes=0), nn.Linear(3, 2))
    Traceback (most recent call last):
    ...
    ValueError: FineTuneModel: the classifier takes 3 features, and ResNet gives 96; ...
    """
    said = getattr(backbone, "head_hidden_size", None)
    if not isinstance(classifier, nn.Linear) or not isinstance(said, int) or classifier.in_features in {0, said}:
        return  # 0 is a lazy one's, which takes what it is given
    # A backbone that the user has changed may give something else than it says, so that it is asked.
    try:
        with isolated(backbone):
            features = meta_copy(backbone)(probe(backbone, "meta"))
    except Exception:  # it may take more than pictures, or have no shapes without values: the first forward tells
        return
    if isinstance(features, torch.Tensor) and features.ndim == 2 and features.shape[1] != classifier.in_features:
        raise ValueError(
            f"FineTuneModel: the classifier takes {classifier.in_features} features, and {type(backbone).__name__} "
            f"gives {features.shape[1]}; build it as nn.Linear({features.shape[1]}, num_classes), from timm's "
            f"backbone.head_hidden_size ({said})."
        )
