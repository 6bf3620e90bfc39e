"""Rows of features on the device that trains on them, and their batches, without waiting for the device."""

import copy
from collections.abc import Iterator, Sequence
from typing import TypeVar

import psutil
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ..sending import send

D = TypeVar("D", bound=TensorDataset)


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
    moved = copy.copy(data)
    moved.tensors = tuple(tensor.to(device) for tensor in data.tensors)
    return moved


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
