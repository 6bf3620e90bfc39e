"""The output folder of a run, and the record that identifies the run.

During a run, all of its files are in ``.unfinished/``: its record, checkpoints and features. Results
are moved into the folder when they are complete, and ``.unfinished/`` is removed at the end. Existing files in the
folder are not deleted or replaced unless ``overwrite`` is given; then the results and ``.unfinished/`` are.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from backbone_finetune.files import replacing, sync_file, sync_folder
from backbone_finetune.names import shortened

from ...files import check_output
from ...text import one_line

RUN_FILE, MODEL_FILE, METRICS_FILE, CURVES_FILE = "run.json", "model.safetensors", "metrics.json", "curves.png"
REPORT_FILE, PREDICTIONS_FILE, LABELS_FILE = "report.html", "predictions.csv", "label_issues.csv"
RESULTS = (RUN_FILE, MODEL_FILE, METRICS_FILE, CURVES_FILE, REPORT_FILE, PREDICTIONS_FILE, LABELS_FILE)
UNFINISHED, LOCK_FILE = ".unfinished", "lock"


def check_output_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise OSError unless a run may write into a folder; change nothing."""
    check_output(folder)
    unfinished = folder / UNFINISHED
    if overwrite or (unfinished / RUN_FILE).is_file():
        return
    names = [name for name in RESULTS if os.path.lexists(folder / name)]
    # A run writes its lock and a temporary file before its record is there.
    if unfinished.exists() and any(
        path.name != LOCK_FILE and not path.name.startswith(f".{RUN_FILE}.") for path in unfinished.iterdir()
    ):
        names.append(UNFINISHED)
    if names:
        replaced = "it" if len(names) == 1 else "them"
        raise FileExistsError(
            f"{folder} already holds {', '.join(names)}; pass --overwrite to replace {replaced}, or another folder "
            "with --output"
        )


@contextmanager
def open_run(folder: Path, record: Mapping[str, Any], *, overwrite: bool) -> Iterator[None]:
    """Start the run that ``record`` describes in a folder, or resume it, and lock the folder for the block.

    ``.unfinished/`` is removed after the block if ``finish_run`` was called in it. Raises FileExistsError if another
    process is training, or if an unfinished run has another record and ``overwrite`` is False.
    """
    check_output_folder(folder, overwrite=overwrite)
    unfinished = folder / UNFINISHED
    unfinished.mkdir(parents=True, exist_ok=True)
    lock = FileLock(unfinished / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FileExistsError(f"another process is training in {folder}; wait for it or stop it") from error
    try:
        _start_or_resume(folder, record, overwrite=overwrite)
        yield
    finally:
        is_finished = not (unfinished / RUN_FILE).exists()
        lock.release()  # before its file is removed: Windows cannot remove an open file
        if is_finished:
            shutil.rmtree(unfinished)


def _start_or_resume(folder: Path, record: Mapping[str, Any], *, overwrite: bool) -> None:
    unfinished = folder / UNFINISHED
    here = json.loads(json.dumps(record, allow_nan=False))
    if (unfinished / RUN_FILE).exists():
        try:
            there = json.loads((unfinished / RUN_FILE).read_bytes())
        except ValueError:
            there = None
        differences = find_differences(there, here)
        if not differences:
            return
        if not overwrite:
            raise FileExistsError(
                f"{folder} holds an unfinished run with other arguments ({shortened(differences, separator='; ')}); "
                "pass the same ones to resume it, --overwrite to replace it, or another folder with --output"
            )
    for path in unfinished.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()
    with replacing(unfinished / RUN_FILE) as temporary:
        temporary.write_text(json.dumps(here, indent=2) + "\n")


@contextmanager
def publishing(folder: Path, name: str) -> Iterator[Path]:
    """Yield a path in ``.unfinished/`` to write to; when the block ends without an error, move it to ``folder / name``.

    If the process is killed while writing, the existing file is kept.
    """
    temporary = folder / UNFINISHED / f"new-{name}"
    yield temporary
    sync_file(temporary)
    os.replace(temporary, folder / name)
    sync_folder(folder)


def finish_run(folder: Path, written: Collection[str]) -> None:
    """Mark a run as finished, with nothing to resume; remove results that it did not write, of the run it replaced."""
    for name in set(RESULTS) - set(written):
        (folder / name).unlink(missing_ok=True)
    (folder / UNFINISHED / RUN_FILE).unlink()


def find_differences(there: Any, here: Any, place: str = "") -> list[str]:
    """List the differences between two records: ``["phases 1 lr: 0.1 there, 0.2 here"]``."""
    if isinstance(there, dict) and isinstance(here, dict):
        pairs = [(key, there.get(key), here.get(key)) for key in {**there, **here}]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(str(number), *pair) for number, pair in enumerate(zip(there, here, strict=True), start=1)]
    else:
        one, other = ("none" if value is None else one_line(json.dumps(value), most=40) for value in (there, here))
        return [] if there == here else [f"{place}: {one} there, {other} here"]
    inside = "" if place in {"", "arguments"} else f"{place} "
    return [line for key, one, other in pairs for line in find_differences(one, other, f"{inside}{key}")]
