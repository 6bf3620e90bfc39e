"""Divergence: numbers of a training that are no longer finite."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["DivergedError", "count_not_finite"]


class DivergedError(ValueError):
    """A training diverged; ``test_accuracy`` is the last one before that.

    >>> DivergedError("the loss became nan in epoch 2", test_accuracy=0.1).test_accuracy
    0.1
    """

    def __init__(self, message: str, *, test_accuracy: float) -> None:
        super().__init__(message)
        self.test_accuracy = test_accuracy


def count_not_finite(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Count the tensors that hold a NaN or an infinity, on their device and without synchronising: ``()``, float32.

    >>> count_not_finite([torch.ones(2), torch.tensor([0, torch.inf]), torch.tensor(1)], torch.device("cpu"))
    tensor(1.)

    Of a sharded tensor (FSDP2), this process's shard counts.
    """
    count = torch.zeros((), device=device)
    for tensor in tensors:
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if own.is_floating_point():
            count += ~own.isfinite().all()
    return count
