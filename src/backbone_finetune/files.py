"""Atomic writes of files, and syncing to disk."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; if the block ends without an error, the file replaces ``path``.

    A reader always sees a complete file, the old one or the new one. A symbolic link is followed: its target is
    replaced. A pipe or a terminal cannot be replaced and is written to directly.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # from the umask; safetensors' own files are readable by their owner only
        yield temporary
        temporary.chmod(mode)
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Flush a file to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, on systems that can open a folder."""
    if os.name == "posix":
        sync_file(folder)
