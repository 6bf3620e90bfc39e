"""Load a dataset batch by batch, by worker processes where it pays: the same batches whatever their number.

The evaluation transform stops at bytes there, which go to the device from pinned memory and are normalised on it, as
timm's ``PrefetchLoader`` does.
"""

import ctypes
import multiprocessing
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from torch.utils.data._utils.pin_memory import pin_memory

from .images import IGNORED, ImageDataset, read_image
from .transforms import Normalize, split_transform

__all__ = ["DeviceLoader", "can_fork", "default_workers", "map_batches"]

# Below it, 1 to 3 s of decoding, workers start for nothing.
FEWEST_IMAGES = 1000
MOST_WORKERS = 16
PR_SET_PDEATHSIG = 1


def default_workers(count: int, *, processes: int = 1) -> int:
    """Choose how many worker processes load ``count`` images: 0 for few, else one for each core of this machine.

    >>> default_workers(100)
    0

    Where processes do not start by ``fork`` it is 0: there, a script without ``if __name__ == "__main__":`` would run
    again in each worker.
    """
    if count < FEWEST_IMAGES or not can_fork():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores // processes, MOST_WORKERS)


@dataclass
class Sample:
    """One sample as a worker loads it; or what is wrong with it."""

    values: Any = None
    broken: tuple[str, str] | None = None
    error: Exception | None = None


@dataclass
class Batch:
    """Samples put together, ``(inputs..., targets)``, and the images among them that cannot be read."""

    values: Any
    broken: Mapping[str, str]
    error: Exception | None

    def pin_memory(self) -> "Batch":
        """Move what is loaded to pinned memory; the loader calls it where it is asked to."""
        self.values = pin_memory(self.values)  # type: ignore[no-untyped-call]
        return self


class Samples(Dataset[Sample]):
    """A dataset as workers load it: errors are values, and what is drawn for a sample comes from seed and index."""

    def __init__(self, data: Dataset[Any], seed: str | None, views: int = 1) -> None:
        self.data = data
        self.seed = seed
        self.views = views
        self.normalize: Normalize | None = None
        if isinstance(data, ImageDataset):
            self.to_bytes, self.normalize = split_transform(data.transform)

    def __len__(self) -> int:
        return self.views * len(self.data)  # type: ignore[arg-type]  # torch's Dataset declares no length; these have one

    def __getitem__(self, index: int) -> Sample:
        try:
            item = index if self.views == 1 else index % len(self.data)  # type: ignore[arg-type]
            if self.seed is None:
                return self.load(item)
            with seeded(f"{self.seed} {index}"):
                return self.load(item)
        except Exception as error:
            if get_worker_info() is None:
                raise
            # torch would raise it with a worker's traceback as its message.
            kind = type(error) if type(error) is ValueError or isinstance(error, OSError) else RuntimeError
            text = str(error) if isinstance(self.data, ImageDataset) else f"sample {index}: {error}"
            return Sample(error=kind(text if kind is not RuntimeError else f"{text} ({type(error).__name__})"))

    def load(self, index: int) -> Sample:
        """Load a sample; an image that cannot be read becomes a grey one with the target ``IGNORED``."""
        if not isinstance(self.data, ImageDataset):
            return Sample(self.data[index])
        path = self.data.folder.paths[index]
        try:
            image = read_image(path)
        except (ValueError, OSError) as error:
            # Where a whole batch is broken; of ImageNet's mean, next to nothing for a BatchNorm.
            grey = Image.new("RGB", (64, 64), (124, 116, 104))
            return Sample((self.to_bytes(grey), IGNORED), broken=(str(path), str(error)))
        try:
            return Sample((self.to_bytes(image), self.data.folder.targets[index]))
        except Exception as error:
            raise RuntimeError(f"{path}: its transform failed: {type(error).__name__}: {error}") from error


class DeviceLoader(DataLoader[Any]):
    """A loader whose batches come as ``[inputs..., targets]`` on ``device``, normalised.

    An image of an `ImageDataset` that cannot be read keeps its place with the target ``IGNORED``, and the dataset
    remembers it. Any other error of a worker is raised here, and names the sample.

    Args:
        data: A dataset of ``(inputs..., target)``.
        device: Where the batches go.
        batches: Batches of indices; or pass ``batch_size``, for all in order.
        batch_size: Samples in a batch.
        workers: Processes that load; 0 loads in this one.
        seed: What a sample draws comes from it and the sample's index. None leaves the generators alone.
        views: How often the data comes, one view of all samples after the other, each drawn anew.
        compute: What becomes of the values of a batch, in the process that loaded it; they stay on the CPU then.

    >>> data = [(torch.tensor([1.0]), 0), (torch.tensor([2.0]), 1)]
    >>> [targets.tolist() for _, targets in DeviceLoader(data, torch.device("cpu"), batches=[[1, 0], [1]])]
    [[1, 0], [1]]
    """

    def __init__(
        self,
        data: Dataset[Any],
        device: torch.device,
        *,
        batches: Sequence[Sequence[int]] | None = None,
        batch_size: int = 32,
        workers: int = 0,
        seed: str | None = None,
        views: int = 1,
        compute: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        order: Mapping[str, Any] = {"batch_size": batch_size} if batches is None else {"batch_sampler": batches}
        pin_memory = device.type == "cuda" and compute is None
        samples = Samples(data, seed, views)
        put_together = partial(collate, normalize=samples.normalize, compute=compute) if compute else collate
        super().__init__(samples, **order, collate_fn=put_together, pin_memory=pin_memory, **_workers(workers))
        self.device = device
        self.compute = compute

    def over(
        self,
        batches: Sequence[Sequence[int]],
        *,
        workers: int | None = None,
        compute: Callable[[list[Any]], Any] | None = None,
    ) -> "DeviceLoader":
        """Return a loader of these batches of the same data."""
        samples: Any = self.dataset
        number = self.num_workers if workers is None else workers
        return DeviceLoader(
            samples.data,
            self.device,
            batches=batches,
            workers=number,
            seed=samples.seed,
            views=samples.views,
            compute=compute,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # it is typed as torch's own iterator
        samples: Any = self.dataset
        with _forking():
            loaded = super().__iter__()
        for batch in loaded:
            if batch.error is not None:
                raise batch.error
            if batch.broken:
                samples.data.broken.update(batch.broken)
            if self.compute is not None:
                yield batch.values
                continue
            values = send_to_device(batch.values, self.device, non_blocking=True)
            if samples.normalize is not None:
                values[0] = samples.normalize(values[0])
            yield values


class _Mapped(Dataset[Any]):
    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self.function = function
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.function(self.items[index])


def map_batches(
    function: Callable[[Any], Any], items: Sequence[Any], *, batch_size: int, workers: int | None = None
) -> Iterator[list[Any]]:
    """Apply a function to each item, in worker processes where there are some; yields lists of results, in order.

    >>> list(map_batches(len, ["a", "bb", "ccc"], batch_size=2))
    [[1, 2], [3]]
    """
    number = default_workers(len(items)) if workers is None else workers
    loader = DataLoader(_Mapped(function, items), batch_size, collate_fn=list, **_workers(number))
    with _forking():
        loaded = iter(loader)
    yield from loaded


def can_fork() -> bool:
    """Tell whether workers start as copies of this process, with all that it has loaded and built.

    >>> can_fork() or sys.platform in {"darwin", "win32"}
    True
    """
    return "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"


def _workers(number: int) -> dict[str, Any]:
    """Choose how a loader's workers start and end."""
    return {
        "num_workers": number,
        "worker_init_fn": end_with_parent,
        # With a generator of its own a loader draws nothing from torch's when it starts: a resumed run is the same run.
        "generator": torch.Generator(),
        # Forked, a worker is there in milliseconds and needs no `if __name__ == "__main__"` in the script.
        "multiprocessing_context": "fork" if number and can_fork() else None,
    }


@contextmanager
def _forking() -> Iterator[None]:
    """Let workers fork without Python's warning, from 3.12 on, of other threads: they take no lock of these."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
        yield


def collate(
    samples: Sequence[Sample],
    *,
    normalize: Normalize | None = None,
    compute: Callable[[list[Any]], Any] | None = None,
) -> Batch:
    """Put samples together; the first error stands for all. With ``compute``, its result takes the values' place."""
    if error := next((sample.error for sample in samples if sample.error is not None), None):
        return Batch([], {}, error)
    broken = dict(sample.broken for sample in samples if sample.broken is not None)
    rows = [sample.values for sample in samples]
    if broken and (readable := [sample for sample in samples if sample.broken is None]):
        # Another image of the batch has the right size, and changes the statistics of a BatchNorm least.
        stand_in = (readable[0].values[0], IGNORED)
        rows = [stand_in if sample.broken else sample.values for sample in samples]
    values = default_collate(rows)
    if compute is None:
        return Batch(values, broken, None)
    if normalize is not None:
        values[0] = normalize(values[0])
    try:
        return Batch(compute(values), broken, None)
    except Exception as error:
        if get_worker_info() is None:
            raise
        # Errors of other kinds may not survive the way to the main process.
        is_plain = isinstance(error, ValueError) and error.args == (str(error),)
        return Batch([], broken, error if is_plain else RuntimeError(f"{type(error).__name__}: {error}"))


def end_with_parent(worker: int) -> None:
    """Have a worker end at once when its parent is killed, so that it holds no lock of it, and leave Ctrl-C to that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def seeded(text: str) -> Iterator[None]:
    """Seed Python's, numpy's and torch's generators by a text, and give them back as they were.

    >>> with seeded("0 1 2"):
    ...     first = random.random()
    >>> with seeded("0 1 2"):
    ...     first == random.random()
    True
    """
    before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    number = random.Random(text).getrandbits(63)
    try:
        random.seed(number)
        numpy.random.seed(number % 2**32)
        torch.default_generator.manual_seed(number)
        yield
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
        torch.set_rng_state(before[2])
