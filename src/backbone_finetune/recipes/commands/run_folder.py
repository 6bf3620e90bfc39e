"""The output folder: what may be written where, and never half a file."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from ..files import digest_file, replacing
from .folder_lock import LOCK_FILE, holding

__all__ = [
    "CURVES_FILE",
    "METRICS_FILE",
    "MODEL_FILE",
    "RUN_FILE",
    "UNFINISHED",
    "check_output_folder",
    "claim_output_folder",
    "clear",
    "find_others",
    "make_output_folder",
    "remove_leftover",
]

# Written last: where it is, the training is finished.
MODEL_FILE = "model.safetensors"
# Written first: what run it is.
RUN_FILE = "run.json"
METRICS_FILE, CURVES_FILE = "metrics.json", "curves.png"
FILES = (RUN_FILE, METRICS_FILE, CURVES_FILE, MODEL_FILE)
# What each is written as, by `replacing` and by `save_checkpoint`, before it takes its place.
TEMPORARY = re.compile(rf"\.({'|'.join(map(re.escape, FILES))})\.\d+")
# Checkpoints and features of a run that is under way, and its lock; gone when it is finished.
UNFINISHED = "unfinished"
# In there, the digest of the finished model that it will replace.
REPLACED = "replaces"
DAMAGED = {RUN_FILE: "not readable"}
# All that may be in there: what stands before run.json is written, and what comes after it. Folders end in a slash.
FIRST = re.compile(rf"{LOCK_FILE}|{REPLACED}|\.{REPLACED}\.\d+")
LATER = re.compile(
    r"checkpoints/(step-\d+\.safetensors|\.step-\d+\.safetensors\.\d+|\.tmp[A-Za-z0-9]{6})?"  # the last is safetensors'
    r"|(features-(train|test)(-\d+-of-\d+)?|\.features-(train|test)(-\d+-of-\d+)?\.(new|old)\.[^/]+\.\d+)/"
    r"(manifest\.json|slot-\d+\.bin)?"
)

# What file managers put into any folder, and NFS in the place of a file that is still open.
OF_THE_SYSTEM = re.compile(r"\.DS_Store|Thumbs\.db|desktop\.ini|\.nfs[0-9a-f]+")


def check_output_folder(folder: Path, *, overwrite: bool) -> None:
    """Check, and touch nothing, that a run may write into a folder: that it loses nobody's files there.

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
        FileExistsError: it is a file, or holds in ``unfinished`` what no run writes there; or ``overwrite`` is false,
            and it holds a finished model, or, where no run was begun, anything by a name that a run writes.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        kind = "a file" if folder.exists() else "a link that leads nowhere"
        raise FileExistsError(f"{folder} is {kind}; pass a folder with --output")
    if others := find_others(folder):
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise FileExistsError(
            f"{folder} holds what no run writes there and none deletes ({', '.join(others[:3])}{more}); move it away, "
            "or pass another folder with --output"
        )
    if overwrite:
        return
    names = [name for name in FILES if os.path.lexists(folder / name)]
    if any(not FIRST.fullmatch(name) for _, name in walk(folder / UNFINISHED)):
        names.append(f"{UNFINISHED}/")
    if names not in ([], [MODEL_FILE]) and not is_begun(folder):
        raise FileExistsError(
            f"{folder} holds {', '.join(names)}, and no run was begun there (no {RUN_FILE} of one); pass another "
            "folder with --output, or --overwrite to replace them"
        )
    if MODEL_FILE in names:
        raise FileExistsError(
            f"{folder} already holds a finished model; pass --overwrite to replace it, or another folder with --output"
        )


def find_others(folder: Path) -> list[str]:
    """Name what is in the way of a run in a folder, and not a run's: in ``unfinished``, or a folder named as a file.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as run:
    ...     Path(run, "unfinished", "checkpoints").mkdir(parents=True)
    ...     _ = Path(run, "unfinished", "thesis.txt").write_text("chapter one")
    ...     find_others(Path(run))
    ['unfinished/thesis.txt']
    """
    others = [f"{name}/" for name in FILES if (folder / name).is_dir()]
    unfinished = folder / UNFINISHED
    if unfinished.is_symlink() or unfinished.is_file():
        return [*others, UNFINISHED]
    return others + sorted(f"{UNFINISHED}/{name}" for path, name in walk(unfinished) if not is_ours(path, name))


def walk(unfinished: Path) -> Iterator[tuple[Path, str]]:
    """Give what is in the folder of an unfinished run, innermost first, by its name in there; not the system's own."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # gone meanwhile, as another run may work there
            raise error

    for parent, folders, files in os.walk(unfinished, topdown=False, onerror=refuse):
        for names, end in ((files, ""), (folders, "/")):
            for name in (name for name in names if not OF_THE_SYSTEM.fullmatch(name)):
                path = Path(parent, name)
                yield path, path.relative_to(unfinished).as_posix() + end


def is_ours(path: Path, name: str) -> bool:
    """Say whether something in the folder of an unfinished run, as `walk` names it, is of a kind that runs write."""
    return not path.is_symlink() and (FIRST.fullmatch(name) or LATER.fullmatch(name)) is not None


def is_begun(folder: Path) -> bool:
    """Say whether the ``run.json`` in a folder is that of a run, or may have been, damaged as it is."""
    if not (folder / RUN_FILE).is_file():
        return False
    record = read_record(folder / RUN_FILE)
    return isinstance(record, dict) and (
        record == DAMAGED or all(isinstance(record.get(part), dict) for part in ("arguments", "versions"))
    )


def remove_leftover(folder: Path) -> None:
    """Remove what a run has left that was killed when its model was written, and nothing else was left to do."""
    unfinished = folder / UNFINISHED
    if not (unfinished.is_dir() and (folder / MODEL_FILE).exists() and is_begun(folder)) or find_others(folder):
        return
    with holding(unfinished, name=str(folder)):
        if not replaces_model(folder):
            clear(unfinished)


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


def claim_output_folder(folder: Path, record: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Take a folder for the run that ``record`` describes: returns whether this very run was begun there before.

    The record becomes ``run.json``. An unfinished run of the same record is gone on with; another is in the way. The
    caller holds ``unfinished`` in it (`folder_lock.holding`).

    >>> from tempfile import TemporaryDirectory
    >>> first, second = ({"arguments": {"seed": seed}, "versions": {}} for seed in (0, 1))
    >>> with TemporaryDirectory() as parent:
    ...     print(*(claim_output_folder(Path(parent, "run"), first, overwrite=False) for _ in range(2)))
    ...     claim_output_folder(Path(parent, "run"), second, overwrite=False)
    Traceback (most recent call last):
    ...
    FileExistsError: ... holds an unfinished run of other arguments (seed: 0 there, 1 here); ...

    Raises:
        FileExistsError: an unfinished run of other arguments, and ``overwrite`` is false; or as `check_output_folder`.
        OSError: the folder can't be made or written to.
    """
    make_output_folder(folder)
    check_output_folder(folder, overwrite=overwrite)
    begun, goes_on = folder / RUN_FILE, False
    if begun.exists() and (not (folder / MODEL_FILE).exists() or replaces_model(folder)):
        differences = find_differences(read_record(begun), json.loads(json.dumps(record, allow_nan=False)))
        goes_on = not differences
        if differences and not overwrite:
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise FileExistsError(
                f"{folder} holds an unfinished run of other arguments ({'; '.join(differences[:3])}{more}); give the "
                "same ones to go on with it, --overwrite to replace it, or another folder with --output"
            )
    remove_temporaries(folder)
    if goes_on:
        return True
    clear(folder / UNFINISHED)
    # First what is replaced: a model that is another one than this is the run's own, and the run is finished.
    if (folder / MODEL_FILE).exists():
        with replacing(folder / UNFINISHED / REPLACED) as temporary:
            temporary.write_text(digest_file(folder / MODEL_FILE))
    with replacing(begun) as temporary:
        temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    return False


def remove_temporaries(folder: Path) -> None:
    """Remove what a run that was killed had begun to write, perhaps as large as the model: none writes there now."""
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink()


def replaces_model(folder: Path) -> bool:
    """Say whether an unfinished run is there that began when the model was there which is there now."""
    replaced = folder / UNFINISHED / REPLACED
    return replaced.exists() and replaced.read_text() == digest_file(folder / MODEL_FILE)


def clear(unfinished: Path) -> None:
    """Empty the folder of an unfinished run, but for its lock and what no run writes there; make it if there is none.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     for name in ("lock", "replaces", "thesis.txt"):
    ...         _ = Path(folder, name).write_text("")
    ...     clear(Path(folder))
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['lock', 'thesis.txt']
    """
    unfinished.mkdir(parents=True, exist_ok=True)
    for path, name in walk(unfinished):
        if name == LOCK_FILE or not is_ours(path, name):
            continue
        if not name.endswith("/"):
            path.unlink()
        elif not any(path.iterdir()):
            path.rmdir()


def read_record(path: Path) -> Any:
    """Read a ``run.json``; one that is damaged is like no other."""
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError):
        return DAMAGED


def find_differences(there: Any, here: Any, place: str = "") -> list[str]:
    """Name what differs between two records.

    >>> find_differences({"phases": [{"lr": 0.1}], "seed": 0}, {"phases": [{"lr": 0.2}], "seed": 0})
    ['phases 1 lr: 0.1 there, 0.2 here']
    """
    if isinstance(there, dict) and isinstance(here, dict):
        pairs = [(key, there.get(key), here.get(key)) for key in {**there, **here}]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(str(number), *pair) for number, pair in enumerate(zip(there, here, strict=True), start=1)]
    else:
        return [] if there == here else [f"{place}: {shorten(there)} there, {shorten(here)} here"]
    inside = "" if place in {"", "arguments"} else f"{place} "
    return [line for key, one, other in pairs for line in find_differences(one, other, f"{inside}{key}")]


def shorten(value: object) -> str:
    """Write a value in few words.

    >>> shorten(None), shorten("0123456789abcdef0123456789abcdef0123456789")
    ('none', '"0123456789abcdef0123456789abcdef0123...')
    """
    text = "none" if value is None else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
