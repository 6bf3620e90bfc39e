"""Load a dataset in batches, with worker processes if that is faster; batches do not depend on their number.

Workers run the evaluation transform up to bytes, which are sent to the device from pinned memory and normalized there,
like in timm's ``PrefetchLoader``.
"""

import ctypes
import multiprocessing
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from ..sending import can_queue
from .bands import blank
from .images import IGNORED, ImageDataset, is_read, read_image
from .targets import split_row
from .transforms import Normalize, of_one_dtype, split_transform

# With fewer, 1 to 3 s of decoding, starting workers takes longer than it saves.
FEWEST_IMAGES = 1000
MOST_WORKERS = 16
PR_SET_PDEATHSIG = 1

Compute = Callable[[list[Any]], Any]


def default_workers(count: int, *, processes: int = 1, fewest: int = FEWEST_IMAGES) -> int:
    """Return the number of worker processes for ``count`` images: 0 for few, else one per core.

    Without ``fork`` it is 0, because a script without ``if __name__ == "__main__":`` would run
    again in each worker.
    """
    if count < fewest or not can_fork():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores // processes, MOST_WORKERS)


class Batch(NamedTuple):
    """The result of a worker: ``[inputs..., targets]``, the unreadable images among them, or an error."""

    values: Any
    broken: Mapping[str, str] = {}
    error: Exception | None = None


class Batches(Dataset[Any]):
    """A dataset for workers, by batch: errors are values, and random numbers depend on seed and index."""

    def __init__(self, data: Dataset[Any], seed: str | None, views: int, compute: Compute | None) -> None:
        self.data: Any = data
        self.seed, self.views, self.compute = seed, views, compute
        self.normalize: Normalize | None = None
        if isinstance(data, ImageDataset):
            self.to_bytes, self.normalize = split_transform(data.transform)

    def __len__(self) -> int:
        return self.views * len(self.data)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows: list[Any] = []
        broken: dict[str, str] = {}
        place = ""
        try:
            for index in indices:
                place = "" if isinstance(self.data, ImageDataset) else f"sample {index}: "
                with nullcontext() if self.seed is None else seeded(f"{self.seed} {index}"):
                    rows.append(self.load(index % len(self.data), broken))
            place = ""
            with torch.device("cpu"):  # converts targets that are numbers to a tensor
                values = default_collate(_make_alike(rows, broken) if isinstance(self.data, ImageDataset) else rows)
            if self.compute is not None:
                if self.normalize is not None:
                    values[0] = self.normalize(values[0])
                values = self.compute(values)
            return Batch(values, broken)
        except Exception as error:
            if get_worker_info() is None:
                raise
            # torch would put the worker's traceback into the message, and cannot pass every kind of error.
            if isinstance(error, OSError) or type(error).__init__ is ValueError.__init__:
                return Batch([], broken, type(error)(f"{place}{error}"))
            return Batch([], broken, RuntimeError(f"{place}{error} ({type(error).__name__})"))

    def load(self, index: int, broken: dict[str, str]) -> Any:
        """Load a sample; an unreadable image becomes a grey one with a special target; see `is_read`."""
        if not isinstance(self.data, ImageDataset):
            return self.data[index]
        path, target = self.data.folder.paths[index], self.data.target(index)
        try:
            image = read_image(path, self.data.channels)
        except (ValueError, OSError) as error:
            image = blank(self.data.channels)  # for a batch whose images are all broken
            target = IGNORED if isinstance(target, int) else torch.full_like(target, torch.nan)
            broken[str(path)] = str(error)
        try:
            with torch.device("cpu"):  # a worker has no other device
                return self.to_bytes(image), target
        except Exception as error:
            raise RuntimeError(f"{path}: its transform failed: {type(error).__name__}: {error}") from error


def _make_alike(rows: Sequence[Any], broken: Mapping[str, str]) -> list[Any]:
    """Return rows whose images have one dtype and, where some are broken, one size."""
    images, targets = map(list, zip(*rows, strict=True))
    if broken:
        # Another image of the batch has the right size and the least effect on BatchNorm statistics.
        read = is_read(default_collate(targets)).tolist()
        whole = images[read.index(True)] if any(read) else images[0]
        images = [image if is_one else whole for image, is_one in zip(images, read, strict=True)]
    return list(zip(of_one_dtype(images), targets, strict=True))


class DeviceLoader(DataLoader[Any]):
    """A loader of batches ``[inputs..., targets]`` on ``device``, normalized.

    An unreadable image of an `ImageDataset` keeps its position with a special target (`is_read`), and
    the dataset records it. Any other error of a worker is raised here, and names the sample.
    """

    def __init__(
        self,
        data: Dataset[Any],  # of ``(inputs..., target)``
        device: torch.device,
        *,
        batches: Sequence[Sequence[int]] | None = None,  # of indices; by default all in order, ``batch_size`` in each
        batch_size: int = 32,
        workers: int = 0,  # 0 loads in this process
        seed: str | None = None,  # random numbers of a sample depend on it and the index; None does not seed
        views: int = 1,  # number of passes over the data, each with other random numbers
        compute: Compute | None = None,  # called on a batch in the process that loaded it; results stay on the CPU
        check: Callable[[Tensor], None] | None = None,  # raises for invalid targets; not called with ``compute``
    ) -> None:
        order: Mapping[str, Any] = {"batch_size": batch_size} if batches is None else {"batch_sampler": batches}
        pin_memory = device.type == "cuda" and compute is None
        self.samples = Batches(data, seed, views, compute)
        super().__init__(self.samples, **order, collate_fn=_keep, pin_memory=pin_memory, **_workers(workers))
        self.device, self.check = device, check

    @property
    def batches(self) -> list[list[int]]:
        """The batches of indices."""
        return list(self.batch_sampler or ())

    def over(self, batches: Sequence[Sequence[int]], **changes: Any) -> "DeviceLoader":
        """Return a loader of these batches of the same data, with ``workers`` or ``compute`` changed."""
        same = {"workers": self.num_workers, "seed": self.samples.seed, "views": self.samples.views}
        return DeviceLoader(self.samples.data, self.device, batches=batches, **{**same, **changes})

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # it is typed as torch's own iterator
        for batch in _start(self):
            if batch.error is not None:
                raise batch.error
            if batch.broken:
                self.samples.data.broken.update(batch.broken)
            values = batch.values
            if self.samples.compute is None:
                if self.check is not None:
                    self.check(split_row(values)[1])  # on the CPU: reading from the device would wait for it
                values = send_to_device(values, self.device, non_blocking=can_queue(self.device))
                if self.samples.normalize is not None:
                    values[0] = self.samples.normalize(values[0])
            yield values


def map_batches(
    function: Callable[[Any], Any], items: Sequence[Any], *, batch_size: int, workers: int | None = None
) -> Iterator[list[Any]]:
    """Apply a function to each item, in worker processes if there are any; yield lists of results in order."""
    number = default_workers(len(items)) if workers is None else workers
    given: Any = items  # a loader needs only a sequence
    yield from _start(DataLoader(given, batch_size, collate_fn=partial(_apply, function), **_workers(number)))


def _keep(batch: Any) -> Any:
    return batch


def _apply(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    return [function(item) for item in items]


def can_fork() -> bool:
    """Return whether workers start as copies of this process."""
    return "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"


def _workers(number: int) -> dict[str, Any]:
    """Choose how a loader's workers start and end."""
    return {
        "num_workers": number,
        "worker_init_fn": end_with_parent,
        # With a separate generator a loader draws nothing from torch's when it starts, so a resumed run is the same.
        "generator": torch.Generator(),
        # With fork, a worker starts in milliseconds and needs no `if __name__ == "__main__"` in the script.
        "multiprocessing_context": "fork" if number and can_fork() else None,
    }


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start a loader without the warning of Python 3.12 about other threads, whose locks forked workers do not use."""
    # torch draws a seed at the start, with a CPU generator, which would fail with another default device.
    with warnings.catch_warnings(), torch.device("cpu"):
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
        return DataLoader.__iter__(loader)


def end_with_parent(worker: int) -> None:
    """Make a worker exit when its parent is killed, so that it keeps no lock, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def seeded(text: str) -> Iterator[None]:
    """Seed Python's, numpy's and torch's generators with a text in the block, and restore them after it."""
    python, arrays = random.getstate(), numpy.random.get_state()
    number = random.Random(text).getrandbits(63)
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(number)
            numpy.random.seed(number % 2**32)
            torch.default_generator.manual_seed(number)
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
