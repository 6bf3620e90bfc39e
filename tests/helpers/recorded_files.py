"""Record calls of fsync and rename, in their order, and the files that are opened."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def record_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record every fsync, with the name of the file or folder, and every rename; each is also executed."""
    events: list[str] = []

    def sync(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        do_sync(descriptor)

    def move(source: Any, target: Any) -> None:
        events.append(f"move {Path(source).name} {Path(target).name}")
        do_move(source, target)

    do_sync, do_move = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", move)
    monkeypatch.setattr(os, "replace", move)
    return events


_lists: list[list[str]] = []  # of the blocks that run


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        for names in _lists:
            names.append(str(arguments[0]))


sys.addaudithook(_note)  # which cannot be removed


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Record the names of the files that Python opens in the block, in any thread."""
    names: list[str] = []
    _lists.append(names)
    try:
        yield names
    finally:
        _lists.remove(names)
