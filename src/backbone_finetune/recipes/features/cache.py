"""Features on disk between runs: the key that must match to use them again, and rows of tensors in a folder."""

import errno
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy
import timm
import torch
from filelock import FileLock, Timeout
from pydantic import TypeAdapter
from torch import Tensor, nn

from backbone_finetune import __version__
from backbone_finetune.eval_caches import clear_caches
from backbone_finetune.files import replacing
from backbone_finetune.verification import digest

from ..data.images import is_read, spread_rows
from .frozen_pass import Front

logger = logging.getLogger(__name__)

# Files with these names are replaced; other files in the folder are not changed.
MANIFEST, LOCK_FILE, SLOT = "backbone-features.json", "backbone-features.lock", "backbone-features-{}.bin"
KEPT = "kept tensors"  # of each image
_FORMAT = "backbone-finetune features 4"
_KEY = TypeAdapter(dict[str, str])

Layout = tuple[tuple[torch.dtype, tuple[int, ...]], ...]  # of each slot, per image


class UnwritableStoreError(OSError):
    """Features cannot be written to a folder: the disk is full or read-only; the message names the folder."""


@dataclass(frozen=True)
class FeatureCache:
    """The folder of features between runs, and the identity of their images.

    Args:
        folder: The folder of the features of one dataset.
        data_fingerprint: Identifies the images and targets. ``data_fingerprint(dataset)`` computes one; any name
            works too, as long as it changes with them.
        memory_share: Features that take more than this share of the machine's memory stay on disk, memory-mapped.

    >>> FeatureCache("cache/train", data_fingerprint="images of 2024, 224 pixels").memory_share
    0.25
    """

    folder: str | os.PathLike[str]
    data_fingerprint: str
    memory_share: float = 0.25

    def key(self, front: Front, autocast_dtype: torch.dtype | None) -> dict[str, str]:
        """Return the key: everything that the features depend on."""
        packages = {name: version(name) for name in ("torchvision", "pillow")}
        versions = {"backbone-finetune": __version__, "torch": torch.__version__, "timm": timm.__version__, **packages}
        return {
            KEPT: front.description,
            "frozen modules": backbone_fingerprint(front.backbone, front.trained),
            "images": self.data_fingerprint,
            "precision": str(autocast_dtype),
            "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        }


def backbone_fingerprint(backbone: nn.Module, trained: Set[str] = frozenset()) -> str:
    """Return a digest of a backbone: its tensors that are not in ``trained``, and the path and class of each module."""
    clear_caches(backbone)  # e.g. levit's caches in eval mode, which are computed from the parameters
    modules = [[path, type(part).__module__, type(part).__qualname__] for path, part in backbone.named_modules()]
    named = [*backbone.named_parameters(remove_duplicate=False), *backbone.named_buffers(remove_duplicate=False)]
    content = json.dumps([modules, [[name, digest(tensor)] for name, tensor in named if name not in trained]])
    return hashlib.sha256(content.encode()).hexdigest()


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Lock a folder of features in the block; wait for another process that has the lock."""
    with _writing_to(folder):
        folder.resolve().mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_FILE)
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            logger.info("features in %s: waiting for another process that computes them", folder)
            held = lock.acquire()
    with held:
        yield


class RowStore:
    """``count`` rows of tensors in a folder: a file per tensor (a slot), and a manifest of their key."""

    def __init__(self, folder: Path, *, count: int, layout: Layout, key: Mapping[str, str]) -> None:
        self.folder, self.count, self.layout = folder, count, layout
        self.key = {"format": _FORMAT, "image count": str(count), **key}
        self.slots = [folder / SLOT.format(index) for index in range(len(layout))]

    def find_problem(self, sample: Sequence[Tensor], *, autocast: bool) -> str | None:
        """Return why stored features cannot be used; None if they can, "" if there are none.

        Other tensors than these, which another phase of a training has stored, are none of them.
        ``sample`` has the rows of ``spread_rows`` as computed now, under ``autocast`` or not.
        """
        if not self._stored():
            return ""
        try:
            made = _KEY.validate_json((self.folder / MANIFEST).read_bytes())
            if KEPT in self.key and made.get(KEPT) != self.key[KEPT]:
                return ""
            if changed := [f"other {name}" for name, value in self.key.items() if made.get(name) != value]:
                return f"stored for {' and '.join(changed)}"
            stored = [slot[spread_rows(self.count)] for slot in self.read(in_memory=False)]
        except (OSError, ValueError, RuntimeError):
            return "incomplete or damaged"
        if not _agree(stored, sample, autocast=autocast):
            return f"{len(sample[-1])} images give other features now than those stored"
        return None

    def allocate(self) -> None:
        """Remove existing features, and create files of the full size."""
        with _writing_to(self.folder):
            for path in self._stored():  # removed, not truncated: another process may have mapped them
                path.unlink()
            needed = self.count * sum(map(bytes_per_row, self.layout))
            if (free := shutil.disk_usage(self.folder).free) < needed:
                raise OSError(errno.ENOSPC, f"the features take {needed:,} bytes, and {free:,} are free")
            for path, slot in zip(self.slots, self.layout, strict=True):
                path.touch()
                os.truncate(path, self.count * bytes_per_row(slot))

    def fill(self, parts: Iterable[tuple[int, Sequence[Tensor]]]) -> None:
        """Write tensors (B, ...) to the rows from ``start``, and flush them to disk."""
        # To files, not to a memory map: on a full disk, a write raises an error, but a memory map ends the process.
        with ExitStack() as opened:
            with _writing_to(self.folder):
                files = [opened.enter_context(open(path, "r+b", 0)) for path in self.slots]
            for start, rows in parts:
                with _writing_to(self.folder):
                    for file, slot, tensor in zip(files, self.layout, rows, strict=True):
                        file.seek(start * bytes_per_row(slot))
                        octets = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
                        while len(octets):  # a write may be partial
                            octets = octets[file.write(octets) :]
            with _writing_to(self.folder):
                for file in files:
                    os.fsync(file.fileno())

    def commit(self) -> None:
        """Write the manifest, which makes the features valid."""
        with _writing_to(self.folder), replacing(self.folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(self.key, indent=1))

    def read(self, *, in_memory: bool) -> list[Tensor]:
        """Return the slots, each (N, ...), in memory or memory-mapped.

        Writing to these tensors does not change the files.
        """
        slots = []
        for path, (dtype, shape) in zip(self.slots, self.layout, strict=True):
            is_mapped = not in_memory and path.stat().st_size  # an empty file cannot be mapped
            load = partial(numpy.memmap, mode="c") if is_mapped else numpy.fromfile
            slots.append(torch.from_numpy(load(path, numpy.uint8)).view(dtype).view(self.count, *shape))
        return slots

    def _stored(self) -> list[Path]:
        return [path for path in (self.folder / MANIFEST, *self.folder.glob(SLOT.format("*"))) if path.exists()]


def layout_of(rows: Sequence[Tensor]) -> Layout:
    """Return the dtype and shape per image of each tensor."""
    return tuple((tensor.dtype, tuple(tensor.shape[1:])) for tensor in rows)


def bytes_per_row(slot: tuple[torch.dtype, tuple[int, ...]]) -> int:
    """Return the bytes of one image in a slot."""
    return int(slot[0].itemsize * math.prod(slot[1]))


def _agree(stored: Sequence[Tensor], computed: Sequence[Tensor], *, autocast: bool) -> bool:
    """Return whether stored rows equal computed ones, to 1e-3 of the largest value of a slot, under bf16 5e-2."""
    # An unreadable image is replaced by another of its batch, which may be another one now.
    seen = is_read(stored[-1]) | is_read(computed[-1])
    stored, computed = ([tensor[seen] for tensor in rows] for rows in (stored, computed))
    for one, other in zip(stored, computed, strict=True):
        if not one.is_floating_point() or not one.numel():
            if not torch.equal(one, other):
                return False
            continue
        tolerance = 5e-2 if autocast or one.element_size() < 4 else 1e-3
        largest = float(other.double().nan_to_num(0, 0, 0).abs().max())
        if not torch.allclose(one.double(), other.double(), rtol=0, atol=tolerance * largest, equal_nan=True):
            return False
    return True


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """Distinguish errors of this folder from those of a dataset, which may also read from disk."""
    try:
        yield
    except OSError as error:
        raise UnwritableStoreError(f"{folder} cannot hold the features ({error.strerror or error})") from error
