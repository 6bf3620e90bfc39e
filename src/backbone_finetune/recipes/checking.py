"""What is refused: an argument that is not what it must be, and a training whose numbers are not finite any more."""

import math
from collections.abc import Iterable
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["DivergedError", "count_not_finite", "expect", "is_number", "is_whole"]


class DivergedError(ValueError):
    """A training diverged, and the message says when; ``test_accuracy`` is what it had come to.

    >>> DivergedError("the loss became nan in epoch 2", test_accuracy=0.1).test_accuracy
    0.1
    """

    def __init__(self, message: str, *, test_accuracy: float) -> None:
        super().__init__(message)
        self.test_accuracy = test_accuracy


def count_not_finite(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Count the tensors that hold a NaN or an infinity, where they are, and fetch nothing: ``()``, float32.

    >>> count_not_finite([torch.ones(2), torch.tensor([0, torch.inf]), torch.tensor(1)], torch.device("cpu"))
    tensor(1.)

    Of a tensor in parts (FSDP2) this process's part counts.
    """
    count = torch.zeros((), device=device)
    for tensor in tensors:
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if own.is_floating_point():
            count += ~own.isfinite().all()
    return count


def expect(name: str, value: object, expected: str, fulfilled: bool) -> None:
    """Raise ValueError, naming an argument and what came, unless it is as expected.

    >>> expect("epochs", 0, "a whole number from 1", fulfilled=False)
    Traceback (most recent call last):
    ...
    ValueError: epochs = 0: expected a whole number from 1
    """
    if not fulfilled:
        raise ValueError(f"{name} = {value!r}: expected {expected}")


def is_whole(value: object, *, least: int = 0) -> bool:
    """Say whether a value is a whole number, from ``least`` on.

    >>> is_whole(3), is_whole(True), is_whole(3.0), is_whole(0, least=1)
    (True, False, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def is_number(value: object) -> bool:
    """Say whether a value is a finite number.

    >>> is_number(1e-3), is_number(True), is_number(math.nan), is_number("1")
    (True, False, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
