"""Which images a step sees, on how many processes ever: a function of the seed and the epoch, and of nothing else."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ..data.loading import DeviceLoader

__all__ = ["Share", "epoch_batches", "load_batches", "local_batch"]


def epoch_batches(count: int, batch_size: int, *, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Draw the batches of an epoch: every one of ``count`` images once, in an order of ``(seed, epoch)`` alone.

    >>> [batch.tolist() for batch in epoch_batches(5, 2, seed=0, epoch=1)]  # image 3 sits this epoch out
    [[2, 1], [0, 4]]

    BatchNorm cannot train on a batch of one, so a last image left alone is left out (another one the next time).
    """
    # Python's seeding by text mixes both numbers well, and is the same everywhere.
    drawn = random.Random(f"{seed} {epoch}").getrandbits(63)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(drawn), device="cpu")
    batches = torch.split(order, batch_size)
    return batches[:-1] if len(batches[-1]) == 1 < len(batches) else batches


class Share:
    """One process's part of a batch: ``indices`` of images, of which only the first ``own`` count.

    The processes' shares of a batch are equally long, as what they compute together must be; the images beyond
    ``own`` are others' images, seen once more without weight.

    >>> share = Share(torch.tensor([4, 7, 4]), own=2)
    >>> [(part.indices.tolist(), part.own) for part in share.split(2)]
    [([4, 7], 2), ([4], 0)]
    """

    def __init__(self, indices: Tensor, own: int) -> None:
        self.indices = indices
        self.own = own

    def __len__(self) -> int:
        return len(self.indices)

    def split(self, parts: int) -> "list[Share]":
        """Cut into consecutive parts, nearly equal."""
        cut, start = [], 0
        for indices in self.indices.tensor_split(parts):
            cut.append(Share(indices, min(max(self.own - start, 0), len(indices))))
            start += len(indices)
        return cut


def local_batch(batch: Tensor, *, process: int, processes: int) -> Share:
    """Take a process's share of a batch: together the shares' own images are the batch, each image once.

    >>> [(share.indices.tolist(), share.own) for share in (
    ...     local_batch(torch.tensor([5, 6, 7, 8, 9]), process=process, processes=2) for process in (0, 1))]
    [([5, 7, 9], 3), ([6, 8, 5], 2)]

    With several processes no share is shorter than two, which BatchNorm needs to train.
    """
    if processes == 1:
        return Share(batch, len(batch))
    size = max(-(-len(batch) // processes), 2)
    positions = torch.arange(process, process + size * processes, processes, device="cpu")
    return Share(batch[positions % len(batch)], int((positions < len(batch)).sum()))


def load_batches(
    data: Dataset[Any],
    shares: Sequence[Share],
    *,
    device: torch.device | None = None,
    workers: int = 0,
    seed: str | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """Load the images of each share: a batch of ``(inputs..., targets)`` each, on ``device``; see `DeviceLoader`.

    >>> data = TensorDataset(torch.arange(4.0), torch.arange(4))
    >>> next(load_batches(data, [Share(torch.tensor([3, 1]), own=2)]))
    (tensor([3., 1.]), tensor([3, 1]))
    """
    device = torch.device("cpu") if device is None else device
    if isinstance(data, TensorDataset):  # indexed at once, not collated from single images
        for share in shares:
            yield tuple(tensor[share.indices].to(device) for tensor in data.tensors)
        return
    indices = [share.indices.tolist() for share in shares]
    for batch in DeviceLoader(data, device, batches=indices, workers=workers, seed=seed):
        yield tuple(batch)
