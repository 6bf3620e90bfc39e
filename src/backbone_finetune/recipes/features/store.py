"""Rows of tensors in a folder: a file per tensor, and a manifest that is written last and names what made them."""

import errno
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel
from torch import Tensor

from ..data.images import IGNORED
from ..files import replacing

__all__ = ["MANIFEST", "RowStore", "UnwritableStoreError", "agree", "bytes_per_row", "layout_of"]

logger = logging.getLogger(__name__)

MANIFEST, LOCK_FILE = "manifest.json", "lock"
_OWN_FILES = re.compile(r"manifest\.json|\.manifest\.json\.\d+|slot-\d+\.bin|lock|shared-[0-9a-f-]{36}")
_FORMAT = "backbone-finetune features 3"

Layout = tuple[tuple[torch.dtype, tuple[int, ...]], ...]  # of each slot, per image


class UnwritableStoreError(OSError):
    """Features cannot be written to a folder: the disk is full or read-only; the message names the folder."""


class _Slot(BaseModel):
    dtype: str
    shape: tuple[int, ...]


class _Manifest(BaseModel):
    format: str
    count: int
    slots: tuple[_Slot, ...]
    key: dict[str, str]


class RowStore:
    """``count`` rows of tensors in a folder, a file per tensor (a slot). Without a ``key`` they are temporary."""

    def __init__(self, folder: str | os.PathLike[str], *, count: int, key: Mapping[str, str] | None = None) -> None:
        self.folder, self.count, self.key = Path(folder), count, key
        self.layout: Layout = ()

    def check_folder(self) -> None:
        """Raise FileExistsError unless the folder, if it is there, holds nothing but features, which are replaced."""
        instead = "pass a folder of its own for the cache"
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"{self.folder} is a file; {instead}")
        if others := sorted({path.name for path in self.folder.glob("*")} - {path.name for path in self._own_files()}):
            raise FileExistsError(
                f"{self.folder} holds other files than cached features ({', '.join(others[:3])}); {instead}"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from reading or writing in the block; waits for one that does."""
        with self._writing():
            self.folder.resolve().mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / LOCK_FILE)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.info("features in %s: waiting for another process that computes them", self.folder)
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def find_problem(self) -> str | None:
        """Say why stored features cannot be used, None where they can be, "" where there are none."""
        if not any(path.suffix == ".bin" or path.name == MANIFEST for path in self._own_files()):
            return ""
        try:
            manifest = _Manifest.model_validate_json((self.folder / MANIFEST).read_bytes())
            if manifest.format != _FORMAT:
                raise ValueError(manifest.format)
            self.layout = tuple((getattr(torch, slot.dtype), slot.shape) for slot in manifest.slots)
        except (OSError, ValueError, AttributeError):  # pydantic's ValidationError is a ValueError
            return f"{MANIFEST} is missing, unreadable or of another version"
        if changed := [name for name, value in (self.key or {}).items() if manifest.key.get(name) != value]:
            return f"made with {' and '.join(f'other {name}' for name in changed)}"
        if manifest.count != self.count:
            return f"made of {manifest.count} images, not {self.count}"
        for index, slot in enumerate(self.layout):
            path, size = self._slot(index), self.count * bytes_per_row(slot)
            found = path.stat().st_size if path.is_file() else 0
            if found != size:
                return f"{path.name} has {found} bytes, not {size}"
        return None

    def allocate(self, layout: Layout) -> None:
        """Remove the features that are there, and create files for those to come at their whole size."""
        self.layout = layout
        with self._writing():
            self.folder.resolve().mkdir(parents=True, exist_ok=True)
            for path in sorted(self._own_files()):  # removed, not truncated: another process may have mapped them
                if path.name != LOCK_FILE:
                    path.unlink()
            needed = self.count * sum(bytes_per_row(slot) for slot in layout)
            if (free := shutil.disk_usage(self.folder).free) < needed:
                raise OSError(errno.ENOSPC, f"the features take {needed:,} bytes, and {free:,} are free")
            for index, slot in enumerate(layout):
                with open(self._slot(index), "wb") as file:
                    file.truncate(self.count * bytes_per_row(slot))

    @contextmanager
    def writing(self) -> Iterator[Callable[[int, Sequence[Tensor]], None]]:
        """Yield ``write(start, rows)``, which writes tensors of (B, ...) as the rows from ``start`` on."""
        # To files, not to a memory map: on a full disk a write raises an error, where the map would end the process.
        with ExitStack() as opened:
            with self._writing():
                files = [opened.enter_context(open(self._slot(i), "r+b", 0)) for i in range(len(self.layout))]

            def write(start: int, rows: Sequence[Tensor]) -> None:
                with self._writing():
                    for file, slot, tensor in zip(files, self.layout, rows, strict=True):
                        file.seek(start * bytes_per_row(slot))
                        octets = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
                        while len(octets):  # a write may take a part only
                            octets = octets[file.write(octets) :]

            yield write
            with self._writing():
                for file in files:
                    os.fsync(file.fileno())

    def commit(self) -> None:
        """Write the manifest, without which there are no features."""
        slots = tuple(_Slot(dtype=str(dtype).removeprefix("torch."), shape=shape) for dtype, shape in self.layout)
        manifest = _Manifest(format=_FORMAT, count=self.count, slots=slots, key=dict(self.key or {}))
        with self._writing(), replacing(self.folder / MANIFEST) as temporary:
            temporary.write_text(manifest.model_dump_json(indent=1))

    def read(self, *, in_memory: bool) -> list[Tensor]:
        """Return the slots, (N, ...) each: in memory, where no file can change under them, or mapped.

        What is written to these tensors does not reach the files.
        """
        slots = []
        for index, (dtype, shape) in enumerate(self.layout):
            size = math.prod((self.count, *shape))
            if in_memory or not size:  # an empty file cannot be mapped
                flat = torch.empty(size, dtype=dtype, device="cpu")
                with open(self._slot(index), "rb") as file:  # not a copy of the map, which would be in memory as well
                    file.readinto(flat.view(torch.uint8).numpy().data)
            else:
                flat = torch.from_file(str(self._slot(index)), shared=False, size=size, dtype=dtype)
            slots.append(flat.view(self.count, *shape))
        return slots

    def _own_files(self) -> list[Path]:
        return [path for path in self.folder.glob("*") if _OWN_FILES.fullmatch(path.name) and path.is_file()]

    def _slot(self, index: int) -> Path:
        return self.folder / f"slot-{index}.bin"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Tell errors of this folder from those of a dataset, which may read from the disk as well."""
        try:
            yield
        except OSError as error:
            raise UnwritableStoreError(f"{self.folder} cannot hold the features ({error.strerror or error})") from error


def layout_of(rows: Sequence[Tensor]) -> Layout:
    """Name the dtype and shape per image of each tensor."""
    return tuple((tensor.dtype, tuple(tensor.shape[1:])) for tensor in rows)


def agree(stored: Sequence[Tensor], computed: Sequence[Tensor], *, autocast: bool) -> bool:
    """Tell whether stored rows are those computed now: to 1e-3 of the largest value of a slot, under bf16 to 5e-2."""
    if layout_of(stored) != layout_of(computed):
        return False
    if computed[-1].ndim == 1:
        # In the place of an image that cannot be read is another of its batch, which is another one now.
        seen = (stored[-1] != IGNORED) | (computed[-1] != IGNORED)
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


def bytes_per_row(slot: tuple[torch.dtype, tuple[int, ...]]) -> int:
    """Count the bytes of one image in a slot."""
    return int(slot[0].itemsize * math.prod(slot[1]))
