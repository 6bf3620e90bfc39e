"""What the front of a model gives for all images, in memory or on disk, by one process or several together."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from .cache import FeatureCache
from .dataset import Features
from .frozen_pass import FrozenPass, Rows, UncacheableError, checked_rows
from .store import RowStore, UnwritableStoreError, agree, bytes_per_row, layout_of

__all__ = ["compute_rows", "count_images"]

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
    """Run over all images once, or take what is stored of them; the rows are in the order of the dataset.

    The caller has set the front to eval. Several processes, which need a ``DeviceLoader``, write into one folder that
    all must see: the cache's, or a temporary one. Where one does not see it, or its disk is full, each computes all
    rows for itself. An error of one process is raised on all of them.
    """
    count, alone = count_images(loader), is_alone(accelerator)
    batches = run.over(loader, title)
    if count is None or (cache is None and alone):
        first, batches = _look_ahead(batches)
        if count is None:
            rows = [tensors for _, tensors in _checked(batches, first)]
            return Features([torch.cat(parts) for parts in zip(*rows, strict=True)], first.structure)
        if _fits(_bytes_of(count, first), memory_share):
            tensors = [
                torch.empty(count, *tensor.shape[1:], dtype=tensor.dtype, device="cpu") for tensor in first.tensors
            ]

            def copy(start: int, part: Sequence[Tensor]) -> None:
                for tensor, values in zip(tensors, part, strict=True):
                    tensor[start : start + len(values)] = values

            _write_all(copy, batches, first, count)
            return Features(tensors, first.structure)
    try:
        return _share_store(
            run,
            loader,
            batches,
            count=count,
            cache=cache,
            memory_share=memory_share,
            accelerator=accelerator,
            title=title,
        )
    except UnwritableStoreError as error:
        if cache is None and alone:
            raise UncacheableError(f"the features are too large for memory, and {error}") from error
        if accelerator is None or accelerator.is_main_process:
            instead = "going on without this cache" if alone else "each process computes all features for itself"
            logger.warning("%s; %s", error, instead)
    return compute_rows(run, loader, title=title)


def _share_store(
    run: FrozenPass,
    loader: DataLoader[Any],
    batches: Iterator[Rows],
    *,
    count: int,
    cache: FeatureCache | None,
    memory_share: float,
    accelerator: Accelerator | None,
    title: str | None,
) -> Features:
    """Read rows from a store, or compute them into it, each process its own batches."""
    first: Rows | None = None
    start = step = 0
    with ExitStack() as held:
        folder = cache.folder if cache else run_on_main(accelerator, lambda: held.enter_context(_temporary_folder()))
        store = RowStore(folder, count=count, key=None if cache is None else cache.key(run.front, run.dtype))
        if isinstance(loader, DeviceLoader) and accelerator is not None and not is_alone(accelerator):
            with together(accelerator):
                first = run.sample(loader)
            parts = loader.batches
            process, others = accelerator.process_index, accelerator.num_processes - 1
            batches = run.over(loader.over(parts[process :: others + 1]), title)
            start, step = process * len(parts[0]), others * len(parts[0])

        def open_store() -> tuple[bool, str]:
            """Say whether what is stored is usable, and name a file that only this very folder has."""
            nonlocal first, batches
            store.check_folder()
            held.enter_context(store.lock())
            problem = store.find_problem()
            if problem is None:
                first = first or run.sample(loader)
                problem = _compare(store, first, autocast=run.dtype is not None)
            if problem:
                logger.info("features in %s: %s; computing them again", store.folder, problem)
            if problem is not None:
                if first is None:
                    first, batches = _look_ahead(batches)
                store.allocate(layout_of(first.tensors))
            token = store.folder / f"shared-{uuid4()}"
            if not is_alone(accelerator):
                token.touch()
                held.callback(token.unlink, missing_ok=True)
            return problem is None, token.name

        usable, token = run_on_main(accelerator, open_store)
        assert first is not None
        store.layout = layout_of(first.tensors)
        if not is_alone(accelerator) and not all(gather_object([(store.folder / token).exists()])):
            raise UnwritableStoreError(f"not all processes see {run_on_main(accelerator, lambda: store.folder)}")
        if not usable:
            with together(accelerator), store.writing() as write:
                _write_all(write, batches, first, count, start=start, step=step)
            run_on_main(accelerator, store.commit)
        with together(accelerator):
            # The files of a temporary folder go now, and what is mapped of them with the last tensor.
            share = memory_share / (1 if accelerator is None else accelerator.num_processes)
            return Features(store.read(in_memory=_fits(_bytes_of(count, first), share)), first.structure)


def _look_ahead(batches: Iterator[Rows]) -> tuple[Rows, Iterator[Rows]]:
    """Take the first batch, and put it back."""
    first = next(batches, None)
    if first is None:
        raise ValueError("the loader has no images")
    return first, chain([first], batches)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="features-", ignore_cleanup_errors=True) as folder:
        logger.info("features: on disk in %s (TMPDIR names another place)", folder)
        yield Path(folder)


def _compare(store: RowStore, sample: Rows, *, autocast: bool) -> str | None:
    """Say that stored rows are others than a sample that was computed now, None where they agree."""
    rows = checked_rows(store.count)
    if agree([slot[rows] for slot in store.read(in_memory=False)], sample.tensors, autocast=autocast):
        return None
    return f"{len(rows)} images give other features now than those stored"


def _write_all(
    write: Callable[[int, Sequence[Tensor]], None],
    batches: Iterable[Rows],
    sample: Rows,
    count: int,
    *,
    start: int = 0,
    step: int = 0,
) -> None:
    """Write batches from row ``start`` on, ``step`` rows between them."""
    seen = 0
    for size, tensors in _checked(batches, sample):
        seen += size
        if start + size <= count:
            write(start, tensors)
        start += size + step
    if not step and seen != count:
        raise ValueError(f"the loader gave {seen} images, and its dataset says that it has {count}")


def _checked(batches: Iterable[Rows], first: Rows) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yield the size and the tensors of each batch, all of the dtypes and shapes per image of the first one."""
    expected = layout_of(first.tensors)
    for tensors, structure in batches:
        if (found := layout_of(tensors)) != expected or structure != first.structure:
            raise ValueError(
                f"a batch holds {list(found)} per image, the first one {list(expected)}; all images need features of "
                "one shape and dtype to be stored together"
            )
        yield len(tensors[-1]), tensors


def _bytes_of(count: int, rows: Rows) -> int:
    return count * sum(map(bytes_per_row, layout_of(rows.tensors)))


def _fits(size: int, memory_share: float) -> bool:
    return bool(size <= memory_share * psutil.virtual_memory().total)


def count_images(loader: DataLoader[Any]) -> int | None:
    """Count a loader's images, None where its dataset is a stream, or gives whole batches."""
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return None
    return len(loader.dataset)  # type: ignore[arg-type]  # torch's Dataset declares no length; a sampled one has it
