"""Features that several processes compute together: each its part, put together batch by batch, and kept once."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from backbone_finetune import FineTuneModel

from ..data.loading import DeviceLoader
from .backbone_pass import backbone_batches, in_eval
from .cache import UnusableStoreError, build_store, open_store, refuse_other_files, remove_store
from .extract import MEMORY_SHARE, FeatureCache, gather, open_cache, ready_backbone, settle, uniform

__all__ = ["Exchange", "share_features"]

T = TypeVar("T")
COPIED_ROWS = 256


class Exchange:
    """What the processes of one work tell each other at each step of it; an error of one is then raised on all.

    >>> exchange = Exchange(Accelerator(cpu=True))
    >>> with exchange.together():
    ...     number = 3
    >>> exchange.tell(number)
    [3]
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.failed = False

    def tell(self, value: T, error: Exception | None = None) -> list[T]:
        """Give every process the value of each.

        Raises:
            Exception: what a process told; of another process's, only a ValueError or OSError comes as what it was.
        """
        index = self.accelerator.process_index
        sent = error
        if error is not None and type(error) is not ValueError and not isinstance(error, OSError):
            # What can't be pickled, or only in part, would end in an error of its own.
            sent = RuntimeError(f"process {index}: {type(error).__name__}: {error}")
        told: list[tuple[T, Exception | None]] = gather_object([(value, sent)])
        faults = [fault for _, fault in told if fault is not None]
        if faults:
            self.failed = True
            raise error if error is not None else faults[0]
        return [other for other, _ in told]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Go on after the block where every process came to its end; otherwise raise on all what one of them met.

        Inside, too, processes may tell each other things: an error that all of them know is not told again.
        """
        error = None
        try:
            yield
        except Exception as caught:
            if self.failed:
                raise
            error = caught
        self.tell(None, error)


def share_features(
    model: FineTuneModel,
    data: Dataset[Any],
    *,
    batch_size: int,
    accelerator: Accelerator,
    cache: FeatureCache | None,
    autocast: bool,
    title: str | None,
    moved: bool,
    workers: int,
) -> TensorDataset:
    """Run a frozen backbone once over a dataset on several processes; see `gather_features`."""
    exchange = Exchange(accelerator)
    count, processes = len(data), accelerator.num_processes  # type: ignore[arg-type]  # a Dataset of no declared length
    # Every process takes as many images, the first ones once more where they do not come out even.
    positions = torch.arange(accelerator.process_index, -(-count // processes) * processes, processes) % count
    batches_of_mine = [batch.tolist() for batch in torch.split(positions, batch_size)]
    loader = DeviceLoader(data, accelerator.device, batches=batches_of_mine, workers=workers)
    with exchange.together():
        if cache is not None and accelerator.is_main_process:
            (remove_store if moved else refuse_other_files)(cache.folder)
        narrow = ready_backbone(model, accelerator.device, autocast=autocast)
    with in_eval(model.backbone):
        own = uniform(backbone_batches(model.backbone, loader, accelerator.device, narrow, title))
        batches = put_together(own, count, exchange)
        if cache is not None:
            return TensorDataset(*keep_once(cache, model.backbone, narrow, batches, count=count, exchange=exchange))
        with exchange.together():
            features = gather(batches, count, MEMORY_SHARE / processes)
    return TensorDataset(*features)


def put_together(own: Iterator[tuple[Tensor, ...]], count: int, exchange: Exchange) -> Iterator[tuple[Tensor, ...]]:
    """Put together on every process what all compute of ``count`` images dealt out one by one: batches, in order.

    >>> [batch] = put_together(iter([(torch.arange(3),)]), 2, Exchange(Accelerator(cpu=True)))
    >>> batch
    (tensor([0, 1]),)

    Raises:
        ValueError: the processes' batches differ in shape or dtype.
    """
    accelerator = exchange.accelerator
    start = 0
    while start < count:
        with exchange.together():
            batch = next(own, None)
            if batch is None:
                raise ValueError(f"the dataset gave fewer images than the {count} that it says it has")
        if start == 0:  # later ones are as each process's first
            found = exchange.tell([(slot.dtype, tuple(slot.shape)) for slot in batch])
            if any(other != found[0] for other in found):
                raise ValueError(f"the processes' batches differ: {found}; all images need features of one shape")
        dealt = (
            accelerator.gather(slot.to(accelerator.device)).cpu().unflatten(0, (accelerator.num_processes, len(slot)))
            for slot in batch
        )
        yield tuple(slot.transpose(0, 1).flatten(0, 1)[: count - start] for slot in dealt)
        start += accelerator.num_processes * len(batch[0])


def keep_once(
    cache: FeatureCache,
    backbone: nn.Module,
    narrow: torch.dtype | None,
    batches: Iterator[tuple[Tensor, ...]],
    *,
    count: int,
    exchange: Exchange,
) -> tuple[Tensor, ...]:
    """Keep features in one store that the main process writes and trusts or not, and give every process all of them."""
    accelerator = exchange.accelerator
    kept: tuple[Tensor, ...] | None = None
    fingerprints: dict[str, str] = {}
    with exchange.together():
        if accelerator.is_main_process:
            kept, fingerprints = open_cache(cache, backbone, narrow, count)
    is_kept, fingerprints = exchange.tell((kept is not None, fingerprints))[0]
    if not is_kept:
        with exchange.together():
            if accelerator.is_main_process:
                kept = build_store(cache.folder, batches, fingerprints)
            else:
                exhaust(batches)
    unseen = None
    if kept is None:
        try:
            kept = open_store(cache.folder, fingerprints, count=count)
        except (OSError, UnusableStoreError) as fault:
            unseen = str(fault)
    slots = [(slot.dtype, tuple(slot.shape[1:])) for slot in kept or ()]
    told = exchange.tell((slots, unseen))
    memory_share = cache.memory_share / accelerator.num_processes
    if reasons := [reason for _, reason in told if reason is not None]:
        if accelerator.is_main_process:
            print(
                f"features in {cache.folder}: {len(reasons)} of {len(told)} processes do not see what the main process "
                f"has there ({reasons[0]}) and take a copy; a folder that all machines share saves it",
                file=sys.stderr,
            )
        copied = broadcast_rows(kept, told[0][0], count, exchange)
        with exchange.together():
            if kept is None:
                return gather(copied, count, memory_share)
            exhaust(copied)
    return settle(kept or (), memory_share)


def broadcast_rows(
    kept: tuple[Tensor, ...] | None,
    slots: list[tuple[torch.dtype, tuple[int, ...]]],
    count: int,
    exchange: Exchange,
) -> Iterator[tuple[Tensor, ...]]:
    """Give on every process what the main process has, little by little.

    >>> [(rows,)] = broadcast_rows((torch.arange(2),), [(torch.int64, ())], 2, Exchange(Accelerator(cpu=True)))
    >>> rows
    tensor([0, 1])
    """
    accelerator = exchange.accelerator
    for start in range(0, count, COPIED_ROWS):
        exchange.tell(None)  # or hear that one could not keep the last ones
        end = min(start + COPIED_ROWS, count)
        rows = [
            kept[index][start:end].to(accelerator.device)
            if kept is not None and accelerator.is_main_process
            else torch.empty(end - start, *shape, dtype=dtype, device=accelerator.device)
            for index, (dtype, shape) in enumerate(slots)
        ]
        yield tuple(broadcast(slot).cpu() for slot in rows)


def exhaust(batches: Iterable[tuple[Tensor, ...]]) -> None:
    """Take part in what gives batches, and keep none.

    >>> exhaust(iter([]))
    """
    for _ in batches:
        pass
