"""Convert a tensor of a batch to rows, one for each image, and back to its memory layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BatchLayout:
    """The batch dimension of a tensor, and its memory layout.

    >>> layout = find_layout(torch.zeros(5, 6, 4), torch.zeros(5, 4, 4), 3, 2)  # two windows for each image
    >>> layout.row_shape, layout.to_rows(torch.zeros(5, 8, 4)).shape, layout.from_rows(torch.zeros(4, 2, 5, 4)).shape
    ((2, 5, 4), torch.Size([4, 2, 5, 4]), torch.Size([5, 8, 4]))
    """

    batch_dim: int
    per_image: int  # entries along `batch_dim` for each image, e.g. windows
    others: tuple[int, ...]  # sizes of the other dimensions
    physical: tuple[int, ...]  # dimensions in memory order, the outermost first
    dtype: torch.dtype
    device: torch.device

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return self.others if self.per_image == 1 else (self.per_image, *self.others)

    @property
    def row_bytes(self) -> int:
        """The size of one row in bytes."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    def fits(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor of another batch has this layout."""
        sizes = [*tensor.shape]
        return (
            tensor.dtype == self.dtype and sizes.pop(self.batch_dim) % self.per_image == 0 and sizes == [*self.others]
        )

    def to_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of any batch as rows, (B, *row_shape); a view if possible."""
        return tensor.movedim(self.batch_dim, 0).reshape(-1, *self.row_shape)

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Copy rows, (B, *row_shape), into a tensor of the original layout, dtype and device."""
        tensor = self.empty(len(rows))
        tensor.movedim(self.batch_dim, 0).copy_(rows.reshape(-1, *self.others))
        return tensor

    def empty(self, images: int) -> torch.Tensor:
        """Return an uninitialized tensor for a number of images."""
        sizes = list(self.others)
        sizes.insert(self.batch_dim, images * self.per_image)
        return torch.empty_permuted(sizes, self.physical, dtype=self.dtype, device=self.device)


def find_layout(whole: torch.Tensor, part: torch.Tensor, whole_images: int, part_images: int) -> BatchLayout | None:
    """Return the layout of a tensor from its values for two batches; None if not exactly one dimension differs.

    >>> find_layout(torch.zeros(3, 4), torch.zeros(2, 4), 3, 2).batch_dim
    0

    Args:
        whole: the tensor for the larger batch.
        part: the tensor for the smaller batch.
        whole_images: number of images in the larger batch.
        part_images: number of images in the smaller batch.
    """
    if whole.ndim != part.ndim or whole.dtype != part.dtype:
        return None
    grown = [dim for dim in range(whole.ndim) if whole.shape[dim] != part.shape[dim]]
    if len(grown) != 1:
        return None
    per_image, rest = divmod(whole.shape[grown[0]], whole_images)
    if rest or per_image * part_images != part.shape[grown[0]]:
        return None
    others = tuple(size for dim, size in enumerate(whole.shape) if dim != grown[0])
    physical = tuple(sorted(range(whole.ndim), key=lambda dim: -whole.stride()[dim]))
    return BatchLayout(grown[0], per_image, others, physical, whole.dtype, whole.device)
