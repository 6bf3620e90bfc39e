"""The images of each step: a function of the seed and the epoch, for any number of processes."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ..data.loading import DeviceLoader
from ..features.dataset import index_rows


def epoch_batches(count: int, batch_size: int, *, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Return the batches of an epoch: each of ``count`` images once, in an order that depends only on seed and epoch.

    >>> [batch.tolist() for batch in epoch_batches(5, 2, seed=0, epoch=1)]  # without image 3 in this epoch
    [[2, 1], [0, 4]]

    BatchNorm cannot train on a batch of one, so a last batch of one image is left out (another image in each epoch).
    """
    # Python's seeding with a text mixes both numbers well, and is the same on all machines.
    drawn = random.Random(f"{seed} {epoch}").getrandbits(63)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(drawn), device="cpu")
    batches = torch.split(order, batch_size)
    return batches[:-1] if len(batches[-1]) == 1 < len(batches) else batches


class LocalBatch(NamedTuple):
    """One process's part of a batch: ``indices`` of images, of which only the first ``num_real`` count.

    All processes' parts of a batch have equal length, as collectives require; the images after the first
    ``num_real`` belong to other processes and have no weight.
    """

    indices: Tensor
    num_real: int


def local_batch(batch: Tensor, *, process: int, processes: int) -> LocalBatch:
    """Return a process's part of a batch: the real images of all parts are the batch, each image once.

    >>> [(part.indices.tolist(), part.num_real) for part in (
    ...     local_batch(torch.tensor([5, 6, 7, 8, 9]), process=process, processes=2) for process in (0, 1))]
    [([5, 7, 9], 3), ([6, 8, 5], 2)]

    With several processes no part is shorter than two, which BatchNorm needs to train.
    """
    if processes == 1:
        return LocalBatch(batch, len(batch))
    size = max(-(-len(batch) // processes), 2)
    positions = torch.arange(process, process + size * processes, processes, device="cpu")
    return LocalBatch(batch[positions % len(batch)], int((positions < len(batch)).sum()))


def load_batches(
    data: Dataset[Any],
    shares: Sequence[LocalBatch],
    *,
    device: torch.device | None = None,
    workers: int = 0,
    seed: str | None = None,
    check: Callable[[Tensor], None] | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield ``(inputs..., targets)`` on ``device`` for each local batch; see `DeviceLoader`.

    >>> data = TensorDataset(torch.arange(4.0), torch.arange(4))
    >>> next(load_batches(data, [LocalBatch(torch.tensor([3, 1]), num_real=2)]))
    (tensor([3., 1.]), tensor([3, 1]))
    """
    device = torch.device("cpu") if device is None else device
    if isinstance(data, TensorDataset):  # indexed at once, not collated from single images
        yield from index_rows(data.tensors, [share.indices for share in shares], device)
        return
    indices = [share.indices.tolist() for share in shares]
    for batch in DeviceLoader(data, device, batches=indices, workers=workers, seed=seed, check=check):
        yield tuple(batch)
