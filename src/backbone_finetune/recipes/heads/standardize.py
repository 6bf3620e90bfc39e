"""A classifier trains on features of mean 0 and standard deviation 1, and then takes the features as they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..data.images import is_read
from ..features.dataset import D, with_tensors

CHUNK = 8192  # rows whose copy in double precision is in memory at once
SMALLEST = 1e-6  # of a standard deviation relative to the mean: below, it is rounding


class Standardization(NamedTuple):
    """The means of features, ``(D,)``, and what they are multiplied by: 1 / standard deviation, 0 if constant.

    A linear layer on standardized features is a linear layer on the features themselves, with ``W' = W / std`` and
    ``b' = b - W' mean``: the classifier in a file needs no further step.

    >>> data = TensorDataset(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([0, 1]))
    >>> standardization = Standardization.measure(data)
    >>> standardization.apply(data).tensors[0].tolist()
    [[-1.0, 0.0], [1.0, 0.0]]
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def measure(cls, data: TensorDataset) -> Standardization:
        """Measure features ``(N, D)`` of readable images, in double precision.

        Raises:
            ValueError: they are not one vector per image.
        """
        features, read = data.tensors[0], is_read(data.tensors[-1])
        if len(data.tensors) != 2 or features.ndim != 2:
            raise ValueError("standardize: the features are not one vector per image (N, D); leave it out")
        total, squares = torch.zeros(2, features.shape[1], dtype=torch.float64, device="cpu")
        for chunk, readable in zip(torch.split(features, CHUNK), torch.split(read, CHUNK), strict=True):
            total += chunk[readable].cpu().double().sum(0)  # MPS has no double precision
        mean = total / read.sum().cpu()
        for chunk, readable in zip(torch.split(features, CHUNK), torch.split(read, CHUNK), strict=True):
            squares += (chunk[readable].cpu().double() - mean).square().sum(0)
        std = (squares / read.sum().cpu()).sqrt()
        is_constant = std <= SMALLEST * mean.abs()
        return cls(mean, torch.where(is_constant, 0.0, 1 / std.masked_fill(is_constant, 1.0)))

    def apply(self, data: D) -> D:
        """Return a dataset with standardized features, in memory."""
        features, *others = data.tensors
        standardized = torch.empty_like(features, memory_format=torch.contiguous_format)
        mean, scale = (values.to(features.dtype).to(features.device) for values in self)
        for source, target in zip(torch.split(features, CHUNK), torch.split(standardized, CHUNK), strict=True):
            torch.sub(source, mean, out=target).mul_(scale)
        return with_tensors(data, [standardized, *others])

    @torch.no_grad()
    def enter(self, classifier: nn.Module) -> None:
        """Change a classifier of features to the same one of standardized features, in place."""
        layer = first_linear(classifier)
        weight, bias = layer.weight.cpu().double(), layer.bias.cpu().double()
        inverse = torch.where(self.scale == 0, 0.0, 1 / self.scale.masked_fill(self.scale == 0, 1.0))
        layer.bias.copy_((bias + weight @ self.mean).to(layer.bias.dtype))
        layer.weight.copy_((weight * inverse).to(layer.weight.dtype))

    @torch.no_grad()
    def leave(self, classifier: nn.Module) -> None:
        """Change a classifier of standardized features to the same one of features, in place."""
        layer = first_linear(classifier)
        weight = layer.weight.cpu().double() * self.scale
        layer.bias.copy_((layer.bias.cpu().double() - weight @ self.mean).to(layer.bias.dtype))
        layer.weight.copy_(weight.to(layer.weight.dtype))


def first_linear(classifier: nn.Module) -> nn.Linear:
    """Return the linear layer that a classifier applies to the features.

    Raises:
        ValueError: it begins with another layer, or one without bias.
    """
    layer = classifier[0] if isinstance(classifier, nn.Sequential) and len(classifier) else classifier
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        kind = type(layer).__name__
        raise ValueError(
            f"standardize: the classifier begins with {kind}, and the mean and standard deviation of the features are "
            "folded into a Linear with bias; leave it out"
        )
    return layer
