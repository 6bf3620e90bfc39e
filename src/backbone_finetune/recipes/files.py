"""Files: output folders, digests, and CSV."""

import csv
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NO_FILE = "no file"


def check_file(path: Path, wanted: str) -> None:
    """Raise FileNotFoundError if there is nothing, and ValueError if it is no file; ``wanted`` says what to pass."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file; {wanted}")
    if not path.is_file():
        raise ValueError(f"{path}: not a file; {wanted}")


def check_output(folder: Path) -> None:
    """Raise OSError unless files can be written into a folder, which need not exist; change nothing."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        kind = "a file" if nearest.exists() else "a broken link"
        raise FileExistsError(f"{nearest} is {kind}; pass a folder with --output")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{nearest} is not writable; pass another folder with --output")


@contextmanager
def csv_writer(path: Path) -> Iterator[Any]:
    r"""Write a CSV file in UTF-8, in which bytes of a name that are not valid text are escaped, ``\udcff`` for 255."""
    with path.open("w", -1, "utf-8", "backslashreplace", newline="") as file:
        yield csv.writer(file)


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; the file is read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def digest_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the SHA-256 of each file, which is read once; "no file" for a pipe or a broken link, which would block."""
    files = list(dict.fromkeys(paths))

    def digest(path: Path) -> str:
        return digest_file(path) if path.is_file() else NO_FILE

    with ThreadPoolExecutor() as threads:
        return dict(zip(files, threads.map(digest, files), strict=True))
