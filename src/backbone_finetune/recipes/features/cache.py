"""Tensors per image on disk: a raw file per slot and a manifest, in a folder that is whole or not there."""

import hashlib
import json
import math
import os
import shutil
import socket
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import torch
from torch import Tensor

from ..files import digest_file, sync_folder

__all__ = [
    "UnusableStoreError",
    "build_store",
    "map_store",
    "open_store",
    "refuse_other_files",
    "remove_store",
    "write_store",
]

MANIFEST = "manifest.json"
FORMAT = "backbone-finetune features 1"


class UnusableStoreError(ValueError):
    """There is a store, but not one to trust; the message says why.

    >>> raise UnusableStoreError("slot-0.bin is truncated")
    Traceback (most recent call last):
    ...
    backbone_finetune.recipes.features.cache.UnusableStoreError: slot-0.bin is truncated
    """


class SlotWriter:
    """Append batches of one slot to a raw file, and digest them on the way.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder, open(f"{folder}/slot-0.bin", "wb") as file:
    ...     slot = SlotWriter(file, torch.zeros(2, 3))
    ...     slot.append(torch.zeros(2, 3))
    ...     slot.describe()["bytes"]
    24
    """

    def __init__(self, file: BinaryIO, example: Tensor) -> None:
        self.file = file
        self.dtype = example.dtype
        self.shape = example.shape[1:]
        self.digest = hashlib.sha256()
        self.bytes = 0

    def append(self, batch: Tensor) -> None:
        """Write ``batch``, (B, ...), behind what is there."""
        octets = batch.contiguous().reshape(-1).view(torch.uint8).numpy().data
        self.file.write(octets)
        self.digest.update(octets)
        self.bytes += octets.nbytes

    def describe(self) -> dict[str, Any]:
        """Give the slot's entry in the manifest."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
            "bytes": self.bytes,
            "sha256": self.digest.hexdigest(),
        }


def write_store(folder: Path, batches: Iterable[tuple[Tensor, ...]], fingerprints: Mapping[str, str]) -> None:
    """Write batches, each a tuple of (B, ...) tensors, into an empty folder; the manifest comes last.

    Only one batch is in memory at a time, and the number of batches need not be known. See `build_store` for an
    example.
    """
    slots: list[SlotWriter] = []
    count = 0
    with ExitStack() as files:
        for batch in batches:
            if not slots:
                slots = [
                    SlotWriter(files.enter_context(open(slot_path(folder, index), "wb")), tensor)
                    for index, tensor in enumerate(batch)
                ]
            for slot, tensor in zip(slots, batch, strict=True):
                slot.append(tensor)
            count += len(batch[0])
        for slot in slots:
            slot.file.flush()
            os.fsync(slot.file.fileno())
    content = {
        "format": FORMAT,
        "count": count,
        "slots": [slot.describe() for slot in slots],
        "fingerprints": dict(fingerprints),
    }
    with open(folder / MANIFEST, "w") as file:
        json.dump({"content": content, "sha256": digest_content(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def build_store(
    folder: Path, batches: Iterable[tuple[Tensor, ...]], fingerprints: Mapping[str, str]
) -> tuple[Tensor, ...]:
    """Write a store under a temporary name beside ``folder``, move it into place, over an older one, and map it.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as parent:
    ...     folder = Path(parent, "train")
    ...     _ = build_store(folder, [(torch.ones(2, 3), torch.tensor([0, 1]))], {"data": "a"})
    ...     features, targets = open_store(folder, {"data": "a"}, count=2)
    >>> tuple(features.shape), targets
    ((2, 3), tensor([0, 1]))

    Raises:
        FileExistsError: the folder holds other files than a store's.
    """
    refuse_other_files(folder)
    folder = folder.resolve()  # what a link points to is replaced, and not the link
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    temporary = temporary_name(folder, os.getpid())
    temporary.mkdir()
    try:
        write_store(temporary, batches, fingerprints)
        mapped = map_store(temporary)  # before another process can put its own in the same place
        move_into_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder.parent)
    return mapped


def open_store(folder: Path, fingerprints: Mapping[str, str], *, count: int | None) -> tuple[Tensor, ...]:
    """Map a store into memory, after every bit of it was checked; see `build_store` for an example.

    ``count`` is how many images it should hold, where that is known.

    Raises:
        FileNotFoundError: there is no store.
        UnusableStoreError: it is truncated or garbled, or its fingerprints or its count are other ones.
    """
    if not (folder / MANIFEST).exists() and (not folder.exists() or not any(folder.iterdir())):
        raise FileNotFoundError(f"{folder}: there are no features yet")
    content = read_manifest(folder)
    made_of = content["fingerprints"]
    changed = [name for name in fingerprints if made_of.get(name) != fingerprints[name]]
    if changed:
        raise UnusableStoreError(f"made with {' and '.join(f'other {name}' for name in changed)}")
    if count is not None and content["count"] != count:
        raise UnusableStoreError(f"made of {content['count']} images, not {count}")
    for index, slot in enumerate(content["slots"]):
        path = slot_path(folder, index)
        size = path.stat().st_size if path.is_file() else 0
        if size != slot["bytes"]:
            raise UnusableStoreError(f"{path.name} has {size} bytes, not {slot['bytes']}")
        if digest_file(path) != slot["sha256"]:
            raise UnusableStoreError(f"{path.name} is garbled")
    return map_store(folder)


def map_store(folder: Path) -> tuple[Tensor, ...]:
    """Map the slots of a whole store, unchecked: (N, ...) each. What is written to them stays out of the files.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_store(Path(folder), [(torch.ones(2, 3),), (torch.zeros(1, 3),)], {})
    ...     map_store(Path(folder))[0].sum(1)
    tensor([3., 3., 0.])
    """
    content = read_manifest(folder)
    tensors = []
    for index, slot in enumerate(content["slots"]):
        dtype, shape = getattr(torch, slot["dtype"]), (content["count"], *slot["shape"])
        if size := math.prod(shape):
            flat = torch.from_file(str(slot_path(folder, index)), shared=False, size=size, dtype=dtype)
        else:  # nothing can't be mapped
            flat = torch.empty(0, dtype=dtype)
        tensors.append(flat.view(shape))
    return tuple(tensors)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the content of a manifest that carries its own digest, so that it is what `write_store` wrote."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        content: dict[str, Any] = manifest["content"]
        whole = manifest["sha256"] == digest_content(content) and content["format"] == FORMAT
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UnusableStoreError(f"{MANIFEST} is missing or unreadable") from error
    if not whole:
        raise UnusableStoreError(f"{MANIFEST} is garbled, or of another version")
    return content


def slot_path(folder: Path, index: int) -> Path:
    """Name the raw file of a slot.

    >>> slot_path(Path("train"), 0).name
    'slot-0.bin'
    """
    return folder / f"slot-{index}.bin"


def digest_content(content: object) -> str:
    """Digest what a manifest says."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def refuse_other_files(folder: Path) -> None:
    """See that a folder, if there is one, holds nothing but a store, which may be replaced.

    >>> refuse_other_files(Path(__file__).parent)
    Traceback (most recent call last):
    ...
    FileExistsError: ... holds other files than cached features (...); pass a folder of its own for the cache

    Raises:
        FileExistsError: it holds other files, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; pass a folder of its own for the cache")
    if not folder.exists():
        return
    others = sorted(
        path.name
        for path in folder.iterdir()
        if not (path.is_file() and (path.name == MANIFEST or (path.name.startswith("slot-") and path.suffix == ".bin")))
    )
    if others:
        raise FileExistsError(
            f"{folder} holds other files than cached features ({', '.join(others[:3])}); "
            "pass a folder of its own for the cache"
        )


def remove_store(folder: Path) -> None:
    """Remove a store, if there is one, and nothing else.

    Raises:
        FileExistsError: the folder holds other files.
    """
    refuse_other_files(folder)
    for path in folder.iterdir() if folder.exists() else ():
        path.unlink(missing_ok=True)


def move_into_place(built: Path, folder: Path) -> None:
    """Rename a folder to where another store may be, which goes; other processes may do the same meanwhile."""
    while True:
        try:
            os.rename(built, folder)
        except OSError:
            if not folder.is_dir():
                raise
        else:
            return
        aside = temporary_name(folder, os.getpid(), "old")
        try:
            os.rename(folder, aside)
        except FileNotFoundError:
            continue  # another process moved it aside first
        shutil.rmtree(aside)


def temporary_name(folder: Path, process: int, kind: str = "new") -> Path:
    """Name the folder of one process beside a store."""
    return folder.with_name(f".{folder.name}.{kind}.{socket.gethostname()}.{process}")


def remove_leftovers(folder: Path) -> None:
    """Remove what processes of this machine that were killed have left beside a store: each as large as the store."""
    for kind in ("new", "old"):
        prefix = temporary_name(folder, 0, kind).name.removesuffix("0")
        for path in folder.parent.iterdir():
            process = path.name.removeprefix(prefix)
            if not (path.name.startswith(prefix) and process.isdecimal()):
                continue
            if int(process) == os.getpid() or not psutil.pid_exists(int(process)):
                shutil.rmtree(path, ignore_errors=True)
