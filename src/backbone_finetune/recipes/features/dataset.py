"""Datasets of features: rows of tensors for each image, their structure, their device, and their batches."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset

from ..sending import send

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


def with_tensors(data: D, tensors: Iterable[Tensor]) -> D:
    """Return a dataset of the same kind and structure with other tensors."""
    result = copy.copy(data)
    result.tensors = tuple(tensors)
    return result


def select_rows(data: D, rows: Tensor) -> D:
    """Return a dataset of some of the rows: their indices, or a mask.

    >>> select_rows(TensorDataset(torch.arange(3)), torch.tensor([2, 0])).tensors
    (tensor([2, 0]),)
    """
    return with_tensors(data, [tensor[rows] for tensor in data.tensors])


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


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a CUDA device, with those that torch keeps for later; else those of the machine."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def on_device(data: D, device: torch.device) -> D:
    """Return a dataset whose rows are on a device, if they take at most half of its free memory; else ``data``.

    A step on features takes less time than sending its batch from the CPU.

    >>> on_device(TensorDataset(torch.ones(2)), torch.device("meta")).tensors[0].device
    device(type='meta')
    """
    if all(tensor.device == device for tensor in data.tensors):
        return data
    if device.type != "cpu" and 2 * sum(tensor.nbytes for tensor in data.tensors) > free_memory(device):
        return data
    return with_tensors(data, [tensor.to(device) for tensor in data.tensors])


def index_rows(
    tensors: Sequence[Tensor], batches: Sequence[Tensor], device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the rows of each batch of indices on a device; the indices of all batches are sent at once.

    >>> list(index_rows([torch.arange(4) * 10], [torch.tensor([3, 0]), torch.tensor([1])], torch.device("cpu")))
    [(tensor([30,  0]),), (tensor([10]),)]
    """
    if not batches:
        return
    # Each tensor is indexed where it is: an index on the CPU would be sent to the device, and waited for, in each step.
    places = {tensor.device for tensor in tensors}
    indices = torch.cat(list(batches))
    split = {place: torch.split(send(indices, place), list(map(len, batches))) for place in places}
    for number in range(len(batches)):
        yield tuple(send(tensor[split[tensor.device][number]], device) for tensor in tensors)
