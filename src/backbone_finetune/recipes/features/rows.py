"""The outputs of the front of a model for all images, in memory or on disk, computed by one or several processes."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..data.loading import DeviceLoader
from ..together import is_alone, run_on_main, together
from .cache import SLOT, FeatureCache, Layout, RowStore, UnwritableStoreError, bytes_per_row, claim, layout_of
from .dataset import Features
from .frozen_pass import FrozenPass, UncacheableError

logger = logging.getLogger(__name__)


def compute_rows(
    run: FrozenPass,
    loader: DataLoader[Any],
    *,
    cache: FeatureCache | None = None,
    memory_share: float = FeatureCache.memory_share,
    accelerator: Accelerator | None = None,
    title: str | None = None,
) -> Features:
    """Run over all images once, or read stored rows; the rows are in the order of the dataset.

    The front must be in eval mode. Several processes, which need a ``DeviceLoader``, write into one shared folder:
    the cache's, or a temporary one. If one has no access to it, or its disk is full, each computes all
    rows for itself. An error of one process is raised on all of them.
    """
    on_disk = partial(_rows_on_disk, run, loader, title=title)
    count, alone = _count_images(loader), is_alone(accelerator)
    if cache is not None and count is None:
        raise ValueError("a stream or a loader of whole batches cannot be cached; pass DataLoader(dataset, batch_size)")
    if count and not (cache is None and alone):
        try:
            return on_disk(cache=cache, memory_share=memory_share, accelerator=accelerator)
        except UnwritableStoreError as error:
            memory_share = FeatureCache.memory_share
            if accelerator is None or accelerator.is_main_process:
                instead = "going on without this cache" if alone else "each process computes all features for itself"
                logger.warning("%s; %s", error, instead)
    batches = iter(run.over(loader, title))
    first = next(batches, None)
    if first is None:
        raise ValueError("the loader has no images")
    layout = layout_of(first.tensors)
    parts = _placed(chain([first], batches), first, count)
    if count is None:
        # Pinned memory, which results from CUDA are in, is for copies alone.
        kept = ([each.clone() if each.is_pinned() else each for each in rows] for _, rows in parts)
        tensors = [torch.cat(each) for each in zip(*kept, strict=True)]
    elif _fits(count, layout, memory_share):
        tensors = [torch.empty(count, *shape, dtype=dtype, device="cpu") for dtype, shape in layout]
        for start, rows in parts:
            for tensor, values in zip(tensors, rows, strict=True):
                tensor[start : start + len(values)] = values
    else:
        del parts, batches  # which ends its workers
        try:
            return on_disk(cache=None, memory_share=memory_share, accelerator=None)
        except UnwritableStoreError as error:
            raise UncacheableError(f"the features are too large for memory, and {error}") from error
    return Features(tensors, first.structure)


def _rows_on_disk(
    run: FrozenPass,
    loader: DataLoader[Any],
    *,
    cache: FeatureCache | None,
    memory_share: float,
    accelerator: Accelerator | None,
    title: str | None,
) -> Features:
    """Read rows from a folder, or compute them into it; each process computes its own batches."""
    count = _count_images(loader) or 0
    process, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    start = gap = 0
    own = loader
    if isinstance(loader, DeviceLoader):
        size = len(loader.batches[0])
        own, start, gap = loader.over(loader.batches[process::processes]), process * size, (processes - 1) * size
    with ExitStack() as held:

        def open_folder() -> Path:
            if cache is None:
                temporary = TemporaryDirectory(prefix="features-", ignore_cleanup_errors=True)
                folder = Path(held.enter_context(temporary))
                logger.info("features: on disk in %s (TMPDIR names another place)", folder)
            else:
                folder = Path(cache.folder)
            held.enter_context(claim(folder))
            return folder

        def open_store() -> tuple[bool, str]:
            """Return whether the stored rows are usable, and the name of a file that identifies the folder."""
            problem = store.find_problem(sample.tensors, autocast=run.dtype is not None)
            if problem:
                logger.info("features in %s: %s; computing new ones", folder, problem)
            if problem is not None:
                store.allocate()
            token = folder / SLOT.format(uuid4())
            token.touch()
            held.callback(token.unlink, missing_ok=True)
            return problem is None, token.name

        folder = main_folder = run_on_main(accelerator, open_folder)
        with together(accelerator):
            sample = run.sample(loader)
        key = {}
        if cache is not None:
            folder, key = Path(cache.folder), cache.key(run.front, run.dtype)
        store = RowStore(folder, count=count, layout=layout_of(sample.tensors), key=key)
        usable, token = run_on_main(accelerator, open_store)
        if not is_alone(accelerator) and not all(gather_object([(folder / token).exists()])):
            raise UnwritableStoreError(f"not all processes see {main_folder}")
        if not usable:
            with together(accelerator):
                store.fill(_placed(run.over(own, title), sample, count, start=start, gap=gap))
            run_on_main(accelerator, store.commit)
        with together(accelerator):
            # The files of a temporary folder are removed now; mapped memory is freed with the last tensor.
            in_memory = _fits(count, store.layout, memory_share / processes)
            return Features(store.read(in_memory=in_memory), sample.structure)


def _placed(
    batches: Iterable[Features], sample: Features, count: int | None, *, start: int = 0, gap: int = 0
) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Yield the first row and the tensors of each batch, after checking that their layout is that of a sample.

    Between two batches ``gap`` rows are left for other processes.
    """
    expected = layout_of(sample.tensors)
    for batch in batches:
        if (found := layout_of(batch.tensors)) != expected or batch.structure != sample.structure:
            raise ValueError(
                f"a batch holds {list(found)} per image, another one {list(expected)}; all images need features of one "
                "shape and dtype to be stored together"
            )
        yield start, batch.tensors
        start += len(batch) + gap
    if count is not None and not gap and start != count:
        raise ValueError(f"the loader gave {start} images, and its dataset says that it has {count}")


def _fits(count: int, layout: Layout, memory_share: float) -> bool:
    return bool(count * sum(map(bytes_per_row, layout)) <= memory_share * psutil.virtual_memory().total)


def _count_images(loader: DataLoader[Any]) -> int | None:
    """Return the number of a loader's images; None if its dataset is a stream, or returns whole batches."""
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return None
    return len(loader.dataset)  # type: ignore[arg-type]  # torch's Dataset declares no length; a sampled one has it
