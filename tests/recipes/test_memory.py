"""Freed memory is kept for the next batch."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch

from backbone_finetune.recipes import keep_freed_memory

MEBIBYTES = 48  # above the 32 MiB up to which glibc may keep a freed block by itself
COMMAND_LINE = """
import atexit, gc, sys
from backbone_finetune import cli
from test_memory import count_page_faults
atexit.register(lambda: print(count_page_faults(), gc.get_freeze_count()))
sys.exit(cli.run())
"""


def count_page_faults() -> int:
    """Return the page faults of ten blocks, each freed before the next one, after some that make room."""
    for _ in range(3):
        allocate()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        allocate()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def allocate() -> None:
    torch.zeros(MEBIBYTES * 2**18).add_(1)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_used_again() -> None:
    assert keep_freed_memory()
    assert count_page_faults() < 100  # of 12,288 pages in each of the ten


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_the_process_of_the_command_line_keeps_its_memory() -> None:
    command = [sys.executable, "-c", COMMAND_LINE, "inspect", "test_resnet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=__file__.rpartition("/")[0])
    page_faults, frozen_objects = map(int, done.stdout.splitlines()[-1].split())
    assert page_faults < 100
    assert frozen_objects > 10_000
