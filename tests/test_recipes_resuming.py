"""Stop and go on: killed at any moment, a run ends as if nothing had happened; damaged checkpoints are passed over."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

WORKER = Path(__file__).with_name("training_worker.py")
SIGKILLED = -9


def run_and_kill(folder: Path, kind: str, *, kills: int, seed: int = 0) -> list[int]:
    command = [sys.executable, "-W", "error", str(WORKER), str(folder), kind, str(kills), str(seed)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    codes: list[int] = json.loads(finished.stdout.splitlines()[-1])
    return codes


def assert_same_outcome(one: Path, other: Path) -> None:
    with safe_open(one, framework="pt") as opened, safe_open(other, framework="pt") as reopened:
        assert opened.metadata() == reopened.metadata()
        assert set(opened.keys()) == set(reopened.keys())
        for name in opened.keys():  # noqa: SIM118
            assert torch.equal(opened.get_tensor(name), reopened.get_tensor(name)), name


def assert_undisturbed(folder: Path, codes: list[int], *, kills: int) -> None:
    logs = "\n".join(path.read_text()[-3000:] for path in folder.glob("*/log.txt"))
    assert codes[0] == codes[-1] == 0, logs
    assert set(codes[1:-1]) <= {SIGKILLED, 0}, logs
    assert codes.count(SIGKILLED) >= kills // 2
    for finished in (folder / "disturbed", *folder.glob("finished-*")):
        assert_same_outcome(folder / "quiet" / "weights.safetensors", finished / "weights.safetensors")
        # What was written down as finished never goes back.
        told = [int(line) for line in (finished / "epochs.txt").read_text().split()]
        assert told == sorted(told)
        resumed = re.findall(r"resuming at epoch (\d+), step (\d+)", (finished / "log.txt").read_text())
        assert resumed == sorted(resumed)


@pytest.mark.parametrize("kind", ["cached", "shaken"])
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(tmp_path: Path, kind: str) -> None:
    assert_undisturbed(tmp_path, run_and_kill(tmp_path, kind, kills=5), kills=5)


def test_a_command_that_was_killed_goes_on_when_it_is_given_again(tmp_path: Path) -> None:
    assert_undisturbed(tmp_path, run_and_kill(tmp_path, "command", kills=3), kills=3)
    assert {path.name for path in (tmp_path / "disturbed" / "run").iterdir()} == {
        "curves.png",
        "metrics.json",
        "model.safetensors",
        "run.json",
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cached", "shaken", "command"])
def test_killed_at_many_random_moments(tmp_path: Path, kind: str) -> None:
    assert_undisturbed(tmp_path, run_and_kill(tmp_path, kind, kills=20, seed=1), kills=20)
