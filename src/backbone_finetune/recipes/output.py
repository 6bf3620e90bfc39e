"""The output folder: what may be written where, and never half a file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

__all__ = ["MODEL_FILE", "check_output_folder", "make_output_folder", "replacing"]

# Written last: where it is, the training is finished.
MODEL_FILE = "model.safetensors"


def check_output_folder(folder: Path, *, overwrite: bool) -> None:
    """Check, and touch nothing, that a run may write into a folder: that it holds no finished model.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as parent:
    ...     check_output_folder(Path(parent, "run"), overwrite=False)
    ...     _ = Path(parent, "model.safetensors").write_text("")
    ...     check_output_folder(Path(parent), overwrite=True)
    ...     check_output_folder(Path(parent), overwrite=False)
    Traceback (most recent call last):
    ...
    FileExistsError: ... already holds a finished model; ...

    Raises:
        FileExistsError: it holds a finished model and ``overwrite`` is false, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; pass a folder with --output")
    if (folder / MODEL_FILE).exists() and not overwrite:
        raise FileExistsError(
            f"{folder} already holds a finished model; pass --overwrite to replace it, or another folder with --output"
        )


def make_output_folder(folder: Path) -> None:
    """Make a folder where there is none, and see that it can be written to: better before the training than after.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as parent:
    ...     make_output_folder(Path(parent, "runs", "first"))
    ...     Path(parent, "runs", "first").is_dir()
    True

    Raises:
        OSError: it can't be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(f"{folder} can't be written to ({error}); pass another folder with --output") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; when the block ends without an error, the file takes the place of ``path``.

    A reader sees the old file or the new one, whole, whenever it looks.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     with replacing(Path(folder, "metrics.json")) as temporary:
    ...         _ = temporary.write_text("{}")
    ...     [path.name for path in Path(folder).iterdir()]
    ['metrics.json']
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
