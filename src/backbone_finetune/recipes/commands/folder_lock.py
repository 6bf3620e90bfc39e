"""One process at a time in an output folder: a lock that vanishes with the process that holds it, however it ends."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import psutil

if sys.platform != "win32":
    import fcntl

__all__ = ["LOCK_FILE", "holding", "refuse_if_held"]

LOCK_FILE = "lock"


@contextmanager
def holding(folder: Path, *, name: str) -> Iterator[None]:
    """Make a folder, if it is not there, and hold it alone for the length of the block; ``name`` is for messages.

    A folder that is empty but for the lock when the block ends is removed.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as parent, holding(Path(parent, "unfinished"), name="run"):
    ...     refuse_if_held(Path(parent, "unfinished"), name="run")
    Traceback (most recent call last):
    ...
    FileExistsError: another process (pid ...) is training in run; wait for it or stop it

    Raises:
        FileExistsError: another process holds it.
        OSError: the folder can't be made or written to.
    """
    file = open_and_lock(folder, name)
    try:
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()} {socket.gethostname()}\n".encode())
        file.flush()
        yield
    finally:
        release(file, folder)


def refuse_if_held(folder: Path, *, name: str) -> None:
    """Raise FileExistsError if another process holds a folder; touch nothing. See `holding` for an example."""
    try:
        file = open(folder / LOCK_FILE, "rb")  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        return
    with file:
        if not lock(file, shared=True):
            raise FileExistsError(say_who(file, name))


def open_and_lock(folder: Path, name: str) -> BinaryIO:
    """Open the file of the lock in a folder, and lock it; raises as `holding` does."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = open(folder / LOCK_FILE, "a+b")  # noqa: SIM115 (closed by release)
        except FileNotFoundError:
            continue  # whoever held it has just removed the folder
        if not lock(file, shared=False):
            with file:
                raise FileExistsError(say_who(file, name))
        if is_in_place(file, folder / LOCK_FILE):
            return file
        file.close()  # the lock of one who has just removed it; the next is a new file


def lock(file: BinaryIO, *, shared: bool) -> bool:
    """Lock an open file, until it is closed or its process is gone: returns whether that was possible.

    Where the system has no such locks, nor the file system, the process that the file names holds it while it lives.
    """
    if sys.platform != "win32":
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a network's file system without locks
            return not names_a_living_process(file)
        return True
    return not names_a_living_process(file)


def names_a_living_process(file: BinaryIO) -> bool:
    """Say whether a lock's file names a process that may be alive: of another machine one can't know."""
    owner = read_owner(file)
    if owner is None:
        return False
    process, host = owner
    return host != socket.gethostname() or (process != os.getpid() and psutil.pid_exists(process))


def read_owner(file: BinaryIO) -> tuple[int, str] | None:
    """Read which process a lock's file names, and on which machine; None before it has."""
    file.seek(0)
    process, _, host = file.read(300).decode(errors="replace").strip().partition(" ")
    return (int(process), host) if process.isdecimal() else None


def say_who(file: BinaryIO, name: str) -> str:
    """Say who holds a lock, and what to do."""
    process, host = read_owner(file) or ("unknown", socket.gethostname())
    where = "" if host == socket.gethostname() else f" on {host}"
    return f"another process (pid {process}{where}) is training in {name}; wait for it or stop it"


def is_in_place(file: BinaryIO, path: Path) -> bool:
    """Say whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def release(file: BinaryIO, folder: Path) -> None:
    """Give a lock back, and remove its folder when nothing else is in it: while it is still locked, where one can."""
    is_ours = is_in_place(file, folder / LOCK_FILE)
    if sys.platform == "win32":  # where no open file can be removed
        file.close()
    if is_ours and [path.name for path in folder.iterdir()] == [LOCK_FILE]:
        (folder / LOCK_FILE).unlink()
        folder.rmdir()
    file.close()
