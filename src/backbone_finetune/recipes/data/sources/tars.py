"""Tar files of images: which files a path stands for, and an index with which each member is read at random."""

import glob
import logging
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from backbone_finetune.names import shortened

from ...text import printable
from .folders import File, walk
from .names import is_hidden, kind_of, warn_of_left_out, warn_of_others
from .packed import PackedPath
from .rows import PARTS, TRAIN

logger = logging.getLogger(__name__)

BLOCK = 512
ARCHIVES = tuple(suffix for _, suffixes, _ in shutil.get_unpack_formats() for suffix in suffixes if suffix != ".tar")


def list_shards(path: Path) -> list[Path]:
    """Return the tar files that a path stands for; none if it is no tar file, pattern, or folder of tar files.

    A pattern is ``train-{0000..0003}.tar`` or ``train-*.tar``. In a folder they may be in folders train, val and test.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is compressed.
    """
    if path.is_dir():
        folders = _visible_folders(path)
        if any(each.name.lower() not in PARTS or _visible_folders(each) for each in folders):
            return []  # class folders
        return sorted(shard for each in folders or [path] for shard in each.glob("*.tar") if shard.is_file())
    if path.name.lower().endswith(ARCHIVES) and path.is_file():
        command = "unzip" if path.suffix.lower() == ".zip" else "tar -xf"
        raise ValueError(f"{path}: compressed; unpack it ({command} {path}) and pass the folder, or a .tar of it")
    if path.suffix.lower() != ".tar":
        return []
    patterns = [] if path.is_file() else expand_braces(str(path))
    shards = [Path(name) for pattern in patterns for name in sorted(glob.glob(pattern)) or [pattern]] or [path]
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise FileNotFoundError(f"{missing[0]}: there is no such tar file")
    return shards


def _visible_folders(path: Path) -> list[Path]:
    return [each for each in path.iterdir() if each.is_dir() and not is_hidden(each.name)]


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern stands for, as in a shell.

    >>> expand_braces("train-{008..010}.tar")
    ['train-008.tar', 'train-009.tar', 'train-010.tar']
    """
    if (found := re.search(r"\{(\d+)\.\.(\d+)\}", pattern)) is None:
        return [pattern]
    first, last = found.groups()
    before, after = pattern[: found.start()], expand_braces(pattern[found.end() :])
    return [f"{before}{number:0{len(first)}}{rest}" for number in range(int(first), int(last) + 1) for rest in after]


def read_shards(root: Path, shards: Sequence[Path]) -> list[File]:
    """List what is in tar files and not hidden, in folders: their own, and around these the part of the tar file.

    Of several tar files, one without a part is the folder of its files that are in none.

    Raises:
        ValueError: one is no tar file, or is compressed.
    """
    parts, files, left_out = _find_parts(root, shards), list[File](), Counter[str]()
    if root.is_dir():
        beside = (file.path for file in walk(root) if file.path is not None and file.path not in shards)
        left_out.update(f"{kind_of(path)} beside the tar files" for path in beside)
    for shard, part in parts.items():
        outer, alone = () if part is None else (part,), (shard.stem,) if len(parts) > 1 and part is None else ()
        for file in _list_files(shard, left_out):
            files.append(file._replace(folders=outer + (file.folders or alone)))
    warn_of_left_out(root, left_out)
    return files


def _find_parts(root: Path, shards: Sequence[Path]) -> dict[Path, str | None]:
    """Return the part of the tar files in a folder: of a folder train, or a name with this word, and so on."""
    parts: dict[Path, str | None] = dict.fromkeys(shards)
    if not root.is_dir():
        return parts
    for shard in shards:
        words = [*shard.relative_to(root).parts[:-1], *re.split(r"[^A-Za-z]+", shard.stem)]
        parts[shard] = next((PARTS[word.lower()] for word in words if word.lower() in PARTS), None)
    named = {part for part in parts.values() if part is not None}
    if TRAIN not in named:
        if len(named) > 1:
            raise ValueError(f"{root}: its tar files are named {shortened(sorted(named))}, and none train; add it")
        return dict.fromkeys(shards)
    if others := [shard.name for shard, part in parts.items() if part is None]:
        warn_of_others(root, shortened(others))
    return {shard: part for shard, part in parts.items() if part is not None}


def _list_files(shard: Path, left_out: Counter[str]) -> list[File]:
    """List the files and folders in a tar file that are not hidden, and count what is neither."""
    files: dict[tuple[str, ...], File] = {}
    length = end = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                parts = PurePosixPath(info.name.lstrip("/")).parts
                if not parts or any(map(is_hidden, parts)):
                    continue
                if info.isdir():
                    files[parts] = File(parts, tar=shard)
                elif info.isreg() and not info.issparse():
                    size = max(0, min(info.size, length - info.offset_data))  # less if the tar file is truncated
                    read = partial(_read_range, shard, info.offset_data, size)
                    path = PackedPath(shard.joinpath(*parts)).holding(read)
                    files[parts] = File(parts[:-1], path, shard)  # of two with one name the last, as unpacked
                else:
                    left_out["links or special files"] += 1
            end = archive.offset
    except (tarfile.TarError, ValueError) as error:  # ValueError for a size that no file has
        if not files:
            raise ValueError(f"{shard}: not a tar file without compression ({error}); unpack it") from error
        logger.warning("%s: truncated (%s); what is before that is used", printable(shard), error)
    if any(_read_range(shard, end, BLOCK)):  # tarfile takes a damaged header for the end
        logger.warning("%s: damaged at byte %d; what is before that is used", printable(shard), end)
    return list(files.values())


def _read_range(path: Path, start: int, count: int) -> bytes:
    """Return some bytes of a file."""
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(count)
