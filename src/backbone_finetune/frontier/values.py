"""Values that replace those of other images or of outputs, and comparisons of what then comes out."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from .layouts import BatchLayout
from .rest import StandIn

LARGE = 10_000.0  # replaces values, also in float16


def among(value: float, tensor: torch.Tensor) -> torch.Tensor:
    """Replace all images but the second one by a value; integers stay. No reduction over the batch hides NaN.

    >>> among(torch.nan, torch.ones(3, 2))[:, 0].tolist()
    [nan, 1.0, nan]
    """
    if not can_be_nan(tensor):
        return tensor
    poisoned = torch.full_like(tensor, value)
    poisoned[1] = tensor[1]
    return poisoned


def _not_a_number(layout: BatchLayout, images: int) -> torch.Tensor:
    tensor = layout.empty(images)
    return tensor.fill_(torch.nan) if can_be_nan(tensor) else tensor.zero_()


def _large(layout: BatchLayout, images: int) -> torch.Tensor:
    """Return large values of both signs, for operations that hide NaN: comparisons, ``nan_to_num``."""
    tensor = layout.empty(images)
    if not can_be_nan(tensor):
        return tensor.fill_(1)  # most likely a valid index
    signs = torch.arange(tensor.numel(), device=tensor.device).remainder(2).mul(2).sub(1)
    return layout.from_rows(signs.mul(LARGE).reshape(images, *layout.row_shape))


POISONS: tuple[StandIn, ...] = (_not_a_number, _large)


def can_be_nan(tensor: torch.Tensor) -> bool:
    """Return whether values of this dtype can be NaN."""
    return tensor.is_floating_point() or tensor.is_complex()


def same_output(expected: Any, output: Any) -> bool:
    """Return whether two outputs have one structure, and tensors of the same bits.

    >>> same_output({"logits": torch.ones(2)}, {"logits": torch.ones(2)}), same_output(torch.ones(2), [torch.ones(2)])
    (True, False)
    """
    (leaves, structure), (others, other_structure) = tree_flatten(expected), tree_flatten(output)
    return structure == other_structure and all(
        same_bits(leaf, other)
        for leaf, other in zip(leaves, others, strict=True)
        if isinstance(leaf, torch.Tensor) or isinstance(other, torch.Tensor)
    )


def same_bits(one: Any, other: Any) -> bool:
    """Return whether both are tensors of one dtype and of equal values."""
    both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return both and bool(one.dtype == other.dtype) and torch.equal(one, other)


def is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are equal up to rounding, relative to the largest value.

    >>> is_close(torch.tensor([1.0, 1000.0]), torch.tensor([1.01, 1000.0]))
    True
    """
    if not one.is_floating_point():
        return torch.equal(one, other)
    largest = other.abs().max().clamp_min(torch.finfo(other.dtype).tiny)
    return bool(((one - other).abs().max() / largest) <= torch.finfo(other.dtype).eps ** 0.5)
