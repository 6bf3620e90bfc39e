"""What a network computes, asked of a shadow of it, so that the network itself stays as it was found."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def shadow(network: ModuleT) -> ModuleT:
    """Copy a network in eval mode; it shares the parameters, and has modes, buffers and caches of its own.

    >>> layer = nn.BatchNorm1d(2)
    >>> twin = shadow(layer)
    >>> twin.weight is layer.weight, twin.running_mean is layer.running_mean, twin.training
    (True, False, False)
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in network.parameters()}
    return _copy_with(network, memo)


def meta_shadow(network: ModuleT) -> ModuleT:
    """Copy a network in eval mode with its parameters and buffers on the meta device: shapes without values.

    >>> meta_shadow(nn.Linear(4, 2))(torch.empty(8, 4, device="meta")).shape
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
def quiet(network: nn.Module) -> Iterator[None]:
    """Run without gradients, and leave the random state of the CPU and of the network's devices as it was.

    >>> network = nn.Linear(2, 2)
    >>> before = torch.get_rng_state()
    >>> with quiet(network):
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


def refuse_misfit(classifier: nn.Module, features: object, origin: str) -> None:
    """Raise ValueError when a classifier cannot take these features.

    >>> refuse_misfit(nn.Linear(3, 2), torch.zeros(1, 4), "from_timm")
    Traceback (most recent call last):
    ...
    ValueError: from_timm: the classifier (Linear) cannot take the backbone's features of shape (B, 4): ...
    """
    try:
        with quiet(classifier):
            shadow(classifier)(features)
    except RuntimeError as error:
        shape = ", ".join(["B", *map(str, features.shape[1:])]) if isinstance(features, torch.Tensor) else "unknown"
        raise ValueError(
            f"{origin}: the classifier ({type(classifier).__name__}) cannot take the backbone's features of shape "
            f"({shape}): {error}. Size it for what the backbone gives."
        ) from error
