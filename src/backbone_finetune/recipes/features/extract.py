"""Run a frozen backbone once: what its classifier will see of every image, in memory or on disk."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any
from uuid import uuid4

import psutil
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, TensorDataset

from backbone_finetune import FineTuneModel

from ..data.fingerprint import backbone_fingerprint
from .backbone_pass import autocast_dtype, backbone_batches, in_eval, trains
from .cache import UnusableStoreError, build_store, map_store, open_store, refuse_other_files, write_store
from .object_description import UndescribableError

__all__ = ["FeatureCache", "extract_features", "feature_batches"]

MEMORY_SHARE = 0.25


@dataclass(frozen=True)
class FeatureCache:
    """Where features are kept between runs, and of what images they are.

    ``folder`` holds one dataset's features and nothing else. ``data_fingerprint`` says which images, targets and
    transform they come from: `data_fingerprint` gives it for a `ImageDataset`. Features larger than
    ``memory_share`` of the machine's memory stay on disk, memory-mapped; smaller ones are read.

    >>> FeatureCache(Path("cache/train"), data_fingerprint="images of 2024, 224 pixels").memory_share
    0.25
    """

    folder: Path
    data_fingerprint: str
    memory_share: float = MEMORY_SHARE


def extract_features(
    model: FineTuneModel,
    loader: DataLoader[Any],
    *,
    device: torch.device,
    cache: FeatureCache | None = None,
    autocast: bool = True,
    title: str | None = None,
) -> TensorDataset:
    """Run a frozen backbone once over ``(inputs, targets)`` batches: a dataset of ``(features, target)``, in order.

    A frozen backbone computes the same features in every epoch, so a classifier that trains on them trains as it
    would above the backbone, but without its cost. Where the backbone returns a tuple of tensors, each (B, ...) of
    any shape and dtype, so do the images of the dataset: its ``tensors`` are ``(*features, targets)``, on the CPU.

    >>> model = FineTuneModel(nn.Linear(3, 4), nn.Linear(4, 2)).freeze_backbone()
    >>> images = TensorDataset(torch.ones(3, 3), torch.tensor([0, 1, 1]))
    >>> dataset = extract_features(model, DataLoader(images, batch_size=2), device=torch.device("cpu"))
    >>> features, targets = dataset.tensors
    >>> tuple(features.shape), targets
    ((3, 4), tensor([0, 1, 1]))

    With a ``cache`` they are kept on disk, and used again when backbone, data, precision and versions are the same
    and every bit is as it was written; otherwise a line on stderr says why they are computed again, each time where
    the backbone holds what can't be compared with another process's, as a lock. Without a cache they are in memory, or
    from a quarter of it on in a temporary folder. With a ``title`` there is a progress bar.

    The model goes to ``device`` and stays there; its modes are left as they were. On CUDA, and on a CPU with bf16
    instructions, a float32 backbone runs under bf16 autocast, and what comes out in bf16 is widened to float32 again,
    so that a float32 classifier can train on it; without ``autocast`` it computes in its own precision everywhere.
    Images go through convolutions in channels_last.

    Raises:
        FileExistsError: the cache's folder holds other files.
        ValueError: part of the backbone trains; the loader shuffles, drops images or has none; or what it or the
            backbone gives is no batch of tensors of one shape.
    """
    refuse_other_orders(loader)
    if cache is not None:
        refuse_other_files(cache.folder)
    narrow = ready_backbone(model, device, autocast=autocast)
    if cache is None:
        with in_eval(model.backbone):
            return TensorDataset(
                *gather(backbone_batches(model.backbone, loader, device, narrow, title), count(loader))
            )
    kept, fingerprints = open_cache(cache, model.backbone, narrow, count(loader))
    if kept is None:
        with in_eval(model.backbone):
            batches = backbone_batches(model.backbone, loader, device, narrow, title)
            kept = build_store(cache.folder, uniform(batches), fingerprints)
    return TensorDataset(*settle(kept, cache.memory_share))


def ready_backbone(model: FineTuneModel, device: torch.device, *, autocast: bool) -> torch.dtype | None:
    """Move a model to where its features are computed; gives the dtype of autocast there, None for its own precision.

    Raises:
        ValueError: part of the backbone trains.
    """
    if trains(model.backbone):
        raise ValueError("features of a backbone that trains change with every step; call freeze_backbone() first")
    model.to(device)
    return autocast_dtype(model.backbone, device) if autocast else None


def open_cache(
    cache: FeatureCache, backbone: nn.Module, narrow: torch.dtype | None, total: int | None
) -> tuple[tuple[Tensor, ...] | None, dict[str, str]]:
    """Map the features that are kept, where they can be trusted; gives these or None, and what they must be made of.

    Where there are some that can't be trusted, or none ever will, a line on stderr says why.
    """
    fingerprints = {
        # Until it has a fingerprint, one that no other features have.
        "backbone": f"not comparable, {uuid4()}",
        "images or transform": cache.data_fingerprint,
        "precision": str(narrow),
        "versions": f"torch {torch.__version__}, timm {timm.__version__}",
    }
    try:
        fingerprints["backbone"] = backbone_fingerprint(backbone)
        return open_store(cache.folder, fingerprints, count=total), fingerprints
    except (UndescribableError, UnusableStoreError) as fault:
        print(f"features in {cache.folder}: {fault}; computing them again", file=sys.stderr)
    except FileNotFoundError:
        pass  # the first time: nothing to tell
    return None, fingerprints


def feature_batches(
    features: TensorDataset, batch_size: int, *, generator: torch.Generator | None = None, drop_last: bool = False
) -> DataLoader[Any]:
    """Load batches of features as fast as memory gives them: a batch is indexed at once, not collated from images.

    With a ``generator`` the order is drawn anew for each epoch: the very order of
    ``DataLoader(features, batch_size, shuffle=True, generator=generator)``.

    >>> dataset = TensorDataset(torch.arange(5.0), torch.arange(5))
    >>> [len(targets) for _, targets in feature_batches(dataset, 2)]
    [2, 2, 1]
    """
    order = SequentialSampler(features) if generator is None else RandomSampler(features, generator=generator)
    batches = BatchSampler(order, batch_size, drop_last)
    # torch types a loader's sampler by single indices; with batch_size=None it hands these lists of them through.
    return DataLoader(features, sampler=batches, batch_size=None, generator=generator)


def refuse_other_orders(loader: DataLoader[Any]) -> None:
    """See that a loader gives each image of its dataset once and in order, as far as can be told.

    >>> refuse_other_orders(DataLoader([1, 2], shuffle=True))
    Traceback (most recent call last):
    ...
    ValueError: the loader draws by RandomSampler; ...

    Raises:
        ValueError: it does not.
    """
    if getattr(loader.batch_sampler, "drop_last", False):
        raise ValueError("the loader drops its last images; pass one with drop_last=False")
    if isinstance(loader.dataset, IterableDataset):
        return
    sampler = loader.sampler if loader.batch_sampler is None else getattr(loader.batch_sampler, "sampler", None)
    if type(sampler) is not SequentialSampler or type(loader.batch_sampler) not in {BatchSampler, type(None)}:
        faulty = loader.batch_sampler if type(sampler) is SequentialSampler or sampler is None else sampler
        raise ValueError(
            f"the loader draws by {type(faulty).__name__}; pass one that gives every image in the dataset's order: "
            "DataLoader(dataset, batch_size)"
        )


def uniform(batches: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Pass batches on while each slot keeps the shape and dtype that the first batch gave it.

    Raises:
        ValueError: one does not, or there is no batch at all.
    """
    expected = None
    for batch in batches:
        found = [(slot.dtype, tuple(slot.shape[1:])) for slot in batch]
        expected = expected or found
        if found != expected:
            raise ValueError(
                f"a batch holds {found} per image, the first one {expected}; all images need features of one "
                "shape and dtype to be stored together"
            )
        yield batch
    if expected is None:
        raise ValueError("the loader has no images")


def gather(
    batches: Iterable[tuple[Tensor, ...]], total: int | None, memory_share: float = MEMORY_SHARE
) -> tuple[Tensor, ...]:
    """Collect batches in memory, or where they would take more than a share of it, in a temporary folder."""
    batches = uniform(batches)
    first = next(batches)
    batches = chain([first], batches)
    if total is not None and fits(total * size_of(first) // len(first[0]), memory_share):
        return fill(batches, first, total)
    if total is not None:
        print(f"features: too large for memory; on disk under {gettempdir()} (TMPDIR names another)", file=sys.stderr)
    with TemporaryDirectory(prefix="features-", ignore_cleanup_errors=True) as folder:
        write_store(Path(folder), batches, {})
        # The files go now, and what is mapped of them with the last tensor: even a killed process leaves nothing.
        return settle(map_store(Path(folder)), memory_share)


def fill(batches: Iterable[tuple[Tensor, ...]], first: tuple[Tensor, ...], total: int) -> tuple[Tensor, ...]:
    """Copy batches one by one into tensors of their whole size, so that nothing is in memory twice.

    Raises:
        ValueError: there are more or fewer images than ``total``.
    """
    whole = tuple(torch.empty(total, *slot.shape[1:], dtype=slot.dtype) for slot in first)
    start = 0
    for batch in batches:
        end = start + len(batch[0])
        if end <= total:
            for slot, part in zip(whole, batch, strict=True):
                slot[start:end] = part
        start = end
    if start != total:
        raise ValueError(f"the loader gave {start} images, and its dataset says that it has {total}")
    return whole


def settle(mapped: tuple[Tensor, ...], memory_share: float) -> tuple[Tensor, ...]:
    """Read mapped tensors into memory where they fit its share; then no file can change under them."""
    return tuple(slot.clone() for slot in mapped) if fits(size_of(mapped), memory_share) else mapped


def fits(size: int, memory_share: float) -> bool:
    """Say whether so many bytes are within a share of this machine's memory.

    >>> fits(1 << 20, 0.25), fits(1 << 60, 0.25)
    (True, False)
    """
    return bool(size <= memory_share * psutil.virtual_memory().total)


def size_of(tensors: tuple[Tensor, ...]) -> int:
    """Count the bytes of some tensors.

    >>> size_of((torch.zeros(2, 3), torch.tensor([0, 1])))
    40
    """
    return sum(tensor.nbytes for tensor in tensors)


def count(loader: DataLoader[Any]) -> int | None:
    """Count a loader's images, None where its dataset is a stream, or gives whole batches.

    >>> count(DataLoader([3, 4, 5], batch_size=2))
    3
    """
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return None
    return len(loader.dataset)  # type: ignore[arg-type]  # torch's Dataset declares no length; a sampled one has it
