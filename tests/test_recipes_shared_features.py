"""Features that two processes compute together: on disk once, in memory never twice, and no error for one alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gathering_worker
import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")

MEBIBYTES = gathering_worker.COUNT * gathering_worker.WIDTH * 4 / 2**20


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("shared")
    command = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run(
        [*command, str(Path(gathering_worker.__file__)), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return folder, finished.stderr


@pytest.fixture(scope="module")
def told(worked: tuple[Path, str]) -> list[dict[str, Any]]:
    return [json.loads((worked[0] / f"told-{process}.json").read_text()) for process in (0, 1)]


def test_features_on_disk_stay_out_of_memory(told: list[dict[str, Any]]) -> None:
    assert MEBIBYTES > 64
    for process in told:
        assert process["built"]["whole"]
        assert process["built"]["grown"] < MEBIBYTES / 4
        assert process["kept"]["grown"] < MEBIBYTES / 4


def test_features_in_memory_are_there_once(told: list[dict[str, Any]]) -> None:
    for process in told:
        assert process["in memory"]["whole"]
        assert process["in memory"]["grown"] < MEBIBYTES * 1.25


def test_each_process_computes_its_part_once_and_has_all_of_them(told: list[dict[str, Any]], worked: Any) -> None:
    for process in told:
        assert [process[name]["seen"] for name in ("few", "built", "kept")] == [17, 513, 0]
        assert [process[name]["count"] for name in ("few", "built", "kept")] == [33, 1025, 1025]
        assert process["kept"]["whole"]
        assert process["afterwards"] == {**process["afterwards"], "seen": 0, "whole": True}
    assert (worked[0] / "all" / "slot-0.bin").stat().st_size == MEBIBYTES * 2**20
    assert not list(worked[0].glob("*-of-2"))


def test_a_process_that_does_not_see_the_folder_gets_a_copy(told: list[dict[str, Any]], worked: Any) -> None:
    assert all(process["copied"]["whole"] for process in told)
    assert sorted(path.name for path in worked[0].glob("of machine *")) == ["of machine 0"]
    assert "1 of 2 processes do not see what the main process has there" in worked[1]


def test_an_error_of_one_process_is_raised_on_all(told: list[dict[str, Any]], worked: Any) -> None:
    for process in told:
        assert process["broken"] == process["broken in memory"] == "ValueError: image 501 is broken"
        assert process["unwritten"] == process["uncopied"] == "OSError: the disk is full"
        assert process["refused"].startswith("FileExistsError: ")
    assert told[0]["of another kind"] == "KeyError: 'image 500 is broken'"
    assert told[1]["of another kind"] == "RuntimeError: process 0: KeyError: 'image 500 is broken'"
    # What the main process had written before another one could not take its copy is whole, and stays.
    assert [path.name for path in worked[0].glob("*broken*")] == ["broken, of machine 0"]
