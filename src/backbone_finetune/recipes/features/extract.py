"""Run a frozen backbone once: what its classifier sees of every image, in memory or on disk."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_unflatten
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from backbone_finetune import FineTuneModel

from ..data.images import IGNORED
from ..data.loading import DeviceLoader
from .backbone_pass import FeatureBatch, UncacheableError, autocast_dtype, backbone_batches, in_eval, trains
from .cache import FeatureCache, FeatureStore, UnwritableStoreError, agree, bytes_per_row, layout_of
from .compiled import Compile

__all__ = ["Features", "extract_features", "feature_batches", "module_inputs", "without_unread"]

logger = logging.getLogger(__name__)

MEMORY_SHARE = FeatureCache.memory_share
_CHECKED_ROWS = 8


class Features(TensorDataset):
    """Features and targets, ``tensors = (*features, targets)``; ``structure`` says what the backbone's output was.

    >>> model = FineTuneModel(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).freeze_backbone()
    >>> features = extract_features(model, DataLoader(TensorDataset(torch.ones(2, 3), torch.tensor([0, 1]))))
    >>> [tuple(tensor.shape) for tensor in features.tensors]
    [(2, 4), (2,)]
    """

    def __init__(self, tensors: Sequence[Tensor], structure: TreeSpec) -> None:
        super().__init__(*tensors)
        self.structure = structure


def module_inputs(data: Dataset[Any], inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """Arrange a batch of a dataset's input tensors as the arguments of a module: of features, the one it expects.

    >>> module_inputs(TensorDataset(), [torch.ones(1)])
    (tensor([1.]),)
    """
    return (tree_unflatten(list(inputs), data.structure),) if isinstance(data, Features) else tuple(inputs)


def without_unread(data: TensorDataset) -> TensorDataset:
    """Leave out the images that could not be read.

    >>> without_unread(TensorDataset(torch.ones(2, 1), torch.tensor([IGNORED, 1]))).tensors
    (tensor([[1.]]), tensor([1]))
    """
    seen = data.tensors[-1] != IGNORED
    if seen.all():
        return data
    tensors = [tensor[seen] for tensor in data.tensors]
    return Features(tensors, data.structure) if isinstance(data, Features) else TensorDataset(*tensors)


def extract_features(
    model: FineTuneModel,
    loader: DataLoader[Any],
    *,
    device: torch.device | None = None,
    cache: FeatureCache | None = None,
    autocast: bool = True,
    compile: Compile | None = None,  # noqa: A002
    title: str | None = None,
) -> Features:
    """Run a frozen backbone once over ``(input, ..., target)`` batches: a dataset of ``(features, target)``, in order.

    A frozen backbone computes the same features in every epoch, so a classifier that trains on them trains as it would
    above the backbone, but without its cost. Where the backbone returns several tensors, each (B, ...) of any shape and
    dtype, in a tuple, list or dict, the dataset's ``tensors`` are ``(*features, targets)``, on the CPU.

    >>> model = FineTuneModel(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).freeze_backbone()
    >>> images = TensorDataset(torch.ones(3, 3), torch.tensor([0, 1, 1]))
    >>> features, targets = extract_features(model, DataLoader(images, batch_size=2)).tensors
    >>> tuple(features.shape), targets
    ((3, 4), tensor([0, 1, 1]))

    With a ``cache`` they are kept on disk, and used again when two things hold. The key is equal: each parameter and
    buffer to the bit, the class of each module, data, precision and versions. And eight images, spread over the
    dataset, give what is stored when they are read, transformed and run through the backbone now. A change that touches
    no weight and no class name, and acts on few images or stays below 1e-3 of the largest value (5e-2 under bf16), is
    not noticed. Otherwise they are computed again, and a line in the log says why. Without a cache they are in memory,
    or from a quarter of it on in a temporary folder; so they are where the cache's disk is full.

    Images go through convolutions in channels_last. The model's modes are left as they were.

    Args:
        model: its backbone is frozen.
        loader: gives each item once and in order.
        device: where the backbone runs; the model goes there and stays. By default where it is.
        cache: where to keep the features.
        autocast: run a float32 backbone under bf16 autocast on CUDA and on a CPU with bf16 instructions. What comes out
            in bf16 is widened to float32, so that a float32 classifier can train on it.
        compile: makes a faster callable of the backbone, as ``compile_openvino`` does. Where its answer on the first
            batch is not the backbone's, a line in the log says so and the backbone itself runs.
        title: show a progress bar under this name.

    Raises:
        FileExistsError: the cache's folder holds other files.
        ValueError: part of the backbone trains; the loader shuffles, drops images or has none; or what it or the
            backbone gives is not what can be stored.
    """
    refuse_other_orders(loader)
    count = count_images(loader)
    if cache is not None and count is None:
        raise ValueError("a stream or a loader of whole batches cannot be cached; pass DataLoader(dataset, batch_size)")
    dtype, device = prepare_backbone(model, device, autocast=autocast)

    def batches() -> Iterator[FeatureBatch]:
        return backbone_batches(model.backbone, loader, device, dtype, title, compile=compile)

    def sample() -> FeatureBatch:
        return next(backbone_batches(model.backbone, spread_rows(loader, count or 0), device, dtype, None))

    with in_eval(model.backbone):
        if cache is None or count is None:
            return _collect(batches(), count)
        store = FeatureStore(cache.folder, count=count, key=cache.key(model.backbone, dtype))
        store.check_folder()
        try:
            with store.lock():
                structure = open_store(store, sample, autocast=dtype is not None)
                if structure is None:
                    structure = _collect(batches(), count, store).structure
                    store.commit()
                return Features(load_if_fits(store, cache.memory_share), structure)
        except UnwritableStoreError as error:
            logger.warning("%s; going on without this cache", error)
            return _collect(batches(), count)


def prepare_backbone(
    model: FineTuneModel, device: torch.device | None, *, autocast: bool
) -> tuple[torch.dtype | None, torch.device]:
    """Move a model to where its features are computed; returns the dtype of autocast there, and the device."""
    if trains(model.backbone):
        raise ValueError("features of a backbone that trains change with every step; call freeze_backbone() first")
    device = device or find_device_of(model)
    model.to(device)
    return autocast_dtype(model.backbone, device) if autocast else None, device


def find_device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first tensor, the CPU where it has none.

    >>> find_device_of(nn.Flatten())
    device(type='cpu')
    """
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), torch.device("cpu"))


def _checked_rows(count: int) -> list[int]:
    """Choose up to eight rows, spread over all."""
    return sorted({round(number * (count - 1) / (_CHECKED_ROWS - 1)) for number in range(_CHECKED_ROWS)})


def spread_rows(loader: DataLoader[Any], count: int) -> DataLoader[Any]:
    """Load the rows that are checked as one batch, as the loader itself would."""
    if count == 0:
        raise ValueError("the loader has no images")
    if isinstance(loader, DeviceLoader):
        return loader.over([_checked_rows(count)], workers=0)
    chosen = Subset(loader.dataset, _checked_rows(count))
    # With a generator of its own a loader draws nothing from torch's.
    return DataLoader(chosen, len(chosen), collate_fn=loader.collate_fn, generator=torch.Generator())


def open_store(store: FeatureStore, sample: Callable[[], FeatureBatch], *, autocast: bool) -> TreeSpec | None:
    """Check stored features against ``sample``, computed now; returns its structure, or None and logs why not."""
    problem = store.find_problem()
    if problem is None:
        computed, rows = sample(), _checked_rows(store.count)
        stored = [slot[rows] for slot in store.read(in_memory=False)]
        if agree(stored, rows_of(computed), autocast=autocast):
            return computed.structure
        problem = f"{len(rows)} images give other features now than those stored"
    if problem:
        logger.info("features in %s: %s; computing them again", store.folder, problem)
    return None


def rows_of(batch: FeatureBatch) -> tuple[Tensor, ...]:
    return (*batch.slots, batch.targets)


def matching_rows(batches: Iterable[FeatureBatch], first: FeatureBatch) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors of batches that are as the first one.

    Raises:
        ValueError: one has other shapes or dtypes.
    """
    expected = layout_of(rows_of(first))
    for batch in batches:
        found = layout_of(rows_of(batch))
        if found != expected or batch.structure != first.structure:
            raise ValueError(
                f"a batch holds {list(found)} per image, the first one {list(expected)}; all images need features of "
                "one shape and dtype to be stored together"
            )
        yield rows_of(batch)


def _collect(batches: Iterator[FeatureBatch], count: int | None, store: FeatureStore | None = None) -> Features:
    """Collect batches in a store; without one in memory, or where they would take too much of it in a temporary folder.

    Raises:
        UncacheableError: there is room neither in memory nor in the temporary folder.
        ValueError: there are no images, or more or fewer than ``count``, or they differ in shape.
    """
    first = next(batches, None)
    if first is None:
        raise ValueError("the loader has no images")
    rows = matching_rows(chain([first], batches), first)
    if count is None:
        return Features([torch.cat(parts) for parts in zip(*rows, strict=True)], first.structure)
    if store is not None:
        store.allocate(layout_of(rows_of(first)))
        with store.writing() as write:
            _fill(write, rows, count)
        return Features(store.read(in_memory=False), first.structure)
    if _fits(count * sum(tensor[0].nbytes for tensor in rows_of(first))):
        whole = [torch.empty(count, *tensor.shape[1:], dtype=tensor.dtype) for tensor in rows_of(first)]

        def copy(start: int, part: Sequence[Tensor]) -> None:
            for tensor, values in zip(whole, part, strict=True):
                tensor[start : start + len(values)] = values

        _fill(copy, rows, count)
        return Features(whole, first.structure)
    with TemporaryDirectory(prefix="features-", ignore_cleanup_errors=True) as folder:
        logger.info("features: too large for memory; on disk in %s (TMPDIR names another place)", folder)
        try:
            # The files go now, and what is mapped of them with the last tensor: even a killed process leaves nothing.
            return _collect(chain([first], batches), count, FeatureStore(Path(folder), count=count))
        except UnwritableStoreError as error:
            raise UncacheableError(f"the features are too large for memory, and {error}") from error


def _fill(write: Callable[[int, Sequence[Tensor]], None], rows: Iterable[Sequence[Tensor]], count: int) -> None:
    """Write rows one batch after another."""
    start = 0
    for part in rows:
        if start + len(part[0]) <= count:
            write(start, part)
        start += len(part[0])
    if start != count:
        raise ValueError(f"the loader gave {start} images, and its dataset says that it has {count}")


def load_if_fits(store: FeatureStore, memory_share: float) -> list[Tensor]:
    """Read stored features into memory where they fit its share, and map them where not."""
    size = sum(store.count * bytes_per_row(slot) for slot in store.layout)
    return store.read(in_memory=_fits(size, memory_share))


def _fits(size: int, memory_share: float = MEMORY_SHARE) -> bool:
    """Tell whether so many bytes are within a share of this machine's memory."""
    return bool(size <= memory_share * psutil.virtual_memory().total)


def count_images(loader: DataLoader[Any]) -> int | None:
    """Count a loader's images, None where its dataset is a stream, or gives whole batches."""
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return None
    return len(loader.dataset)  # type: ignore[arg-type]  # torch's Dataset declares no length; a sampled one has it


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
    """Check that a loader gives each image of its dataset once and in order, as far as can be told.

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
