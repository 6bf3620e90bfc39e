"""Features that two processes compute together: one copy on disk and in memory, and errors raised on both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gathering_worker
import pytest
import torch.distributed as dist
from torchrun import torchrun

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo"),
]

FILES = ["backbone-features-0.bin", "backbone-features-1.bin", "backbone-features.json", "backbone-features.lock"]
MEBIBYTES = gathering_worker.COUNT * gathering_worker.WIDTH * 4 / 2**20


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("shared")
    finished = torchrun(str(Path(gathering_worker.__file__)), str(folder))
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


def test_features_in_memory_have_one_copy(told: list[dict[str, Any]]) -> None:
    for process in told:
        assert process["in memory"]["whole"]
        assert process["in memory"]["grown"] < MEBIBYTES * 1.25


def test_each_process_computes_its_part_once_and_gets_all_features(told: list[dict[str, Any]], worked: Any) -> None:
    for process in told:
        # Eight images are computed first: they give the layout of the store, or check a stored one.
        assert [process[name]["seen"] - 8 for name in ("few", "built", "kept")] in ([17, 513, 0], [16, 512, 0])
        assert [process[name]["count"] for name in ("few", "built", "kept")] == [33, 1025, 1025]
        assert process["kept"]["whole"]
        assert process["afterwards"] == {**process["afterwards"], "seen": 8, "whole": True}
    assert sum(process["built"]["seen"] - 8 for process in told) == 1025
    assert (worked[0] / "all" / FILES[0]).stat().st_size == MEBIBYTES * 2**20
    assert sorted(path.name for path in (worked[0] / "all").iterdir()) == FILES


def test_a_process_without_access_to_the_folder_computes_all_features(told: list[dict[str, Any]], worked: Any) -> None:
    assert all(process["apart"]["whole"] for process in told)
    assert [process["apart"]["seen"] for process in told] == [8 + 99, 8 + 99]
    assert (
        f"not all processes see {worked[0] / 'of machine 0'}; each process computes all features for itself"
        in worked[1]
    )


def test_an_error_of_one_process_is_raised_on_all(told: list[dict[str, Any]]) -> None:
    for process in told:
        assert process["broken"] == process["broken in memory"] == "ValueError: image 501 is broken"
    assert told[0]["of another kind"] == "RuntimeError: process 1: KeyError: 'image 500 is broken'"
    assert told[1]["of another kind"] == "KeyError: 'image 500 is broken'"


def test_if_one_disk_is_full_each_process_computes_all_features(told: list[dict[str, Any]], worked: Any) -> None:
    for process in told:
        assert process["main full"]["whole"]
        assert process["other full"]["whole"]
    message = "broken cannot hold the features (the disk is full); each process computes all features for itself"
    assert worked[1].count(message) == 2
