"""Divergence: losses or weights that are not finite."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["DivergedError", "count_not_finite"]


class DivergedError(ValueError):
    """The loss, or a trainable tensor, is not finite."""


def count_not_finite(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Count the tensors with a NaN or an infinity, on their device and without synchronizing: ``()``, float32.

    >>> count_not_finite([torch.ones(2), torch.tensor([0, torch.inf]), torch.tensor(1)], torch.device("cpu"))
    tensor(1.)

    For a sharded tensor (FSDP2), the local shard is checked.
    """
    count = torch.zeros((), device=device)
    for tensor in tensors:
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if own.is_floating_point():
            count += ~own.isfinite().all()
    return count
