"""A dataset of features: rows of tensors for each image, and their structure."""

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset

D = TypeVar("D", bound=TensorDataset)


class Features(TensorDataset):
    """Features and targets, ``tensors = (*features, targets)``; ``structure`` is that of the backbone's output.

    >>> from torch.utils._pytree import tree_structure
    >>> Features([torch.ones(2, 4), torch.tensor([0, 1])], tree_structure(0))[1]
    (tensor([1., 1., 1., 1.]), tensor(1))
    """

    transform = None  # known to draw nothing: training on features caches what a backbone computes of them

    def __init__(self, tensors: Sequence[Tensor], structure: TreeSpec) -> None:
        super().__init__(*tensors)
        self.structure = structure


def select_rows(data: D, rows: Tensor) -> D:
    """Return a dataset of some of the rows: their indices, or a mask.

    >>> select_rows(TensorDataset(torch.arange(3)), torch.tensor([2, 0])).tensors
    (tensor([2, 0]),)
    """
    selected = copy.copy(data)
    selected.tensors = tuple(tensor[rows] for tensor in data.tensors)
    return selected


def module_inputs(data: Dataset[Any], inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """Arrange a batch of a dataset's input tensors as the arguments of a module; features become one argument."""
    return (tree_unflatten(list(inputs), data.structure),) if isinstance(data, Features) else tuple(inputs)


def feature_batches(
    features: TensorDataset, batch_size: int, *, generator: torch.Generator | None = None, drop_last: bool = False
) -> DataLoader[Any]:
    """Return a fast loader of features: a batch is indexed at once, not collated from single items.

    With a ``generator`` each epoch has a new order, the same as in
    ``DataLoader(features, batch_size, shuffle=True, generator=generator)``.

    >>> dataset = TensorDataset(torch.arange(5.0), torch.arange(5))
    >>> [len(targets) for _, targets in feature_batches(dataset, 2)]
    [2, 2, 1]
    """
    order = SequentialSampler(features) if generator is None else RandomSampler(features, generator=generator)
    batches = BatchSampler(order, batch_size, drop_last)
    # torch types a loader's sampler by single indices; with batch_size=None it accepts these lists.
    return DataLoader(features, sampler=batches, batch_size=None, generator=generator)
