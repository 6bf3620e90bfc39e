"""Resuming: a run that is killed at any moment has the same result; damaged checkpoints are skipped."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import psutil
import pytest
import torch
from image_folders import make_folder
from raising_hooks import is_pixel_baseline, raising
from safetensors import safe_open
from safetensors.torch import save_file
from torchrun import ENVIRONMENT, LAUNCH

from backbone_finetune import cli
from backbone_finetune.recipes.commands.runs.run_folder import MODEL_FILE, UNFINISHED, open_run
from backbone_finetune.recipes.rng import preserve_rng_state, random_state, restore_random_state
from backbone_finetune.recipes.training.checkpoints import (
    Checkpoint,
    _digest_all,
    capture,
    newest_checkpoint,
    resume,
    write_checkpoint,
)
from backbone_finetune.recipes.training.progress import EpochResult, Progress

WORKER = Path(__file__).parents[2] / "helpers" / "training_worker.py"
SIGKILLED = -9


def run_and_kill(folder: Path, *, kills: int, seed: int) -> dict[str, list[int]]:
    """Train and kill in separate processes; return the exit codes by kind of training."""
    command = [sys.executable, "-W", "error", str(WORKER), str(folder), str(kills), str(seed)]
    environment = {**os.environ, **ENVIRONMENT}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    codes: dict[str, list[int]] = json.loads(finished.stdout.splitlines()[-1])
    return codes


def assert_same_outcome(one: Path, other: Path) -> None:
    with safe_open(one, framework="pt") as opened, safe_open(other, framework="pt") as reopened:
        assert opened.metadata() == reopened.metadata()
        assert set(opened.keys()) == set(reopened.keys())
        for name in opened.keys():  # noqa: SIM118
            assert torch.equal(opened.get_tensor(name), reopened.get_tensor(name)), name


def assert_undisturbed(folder: Path, codes: list[int]) -> None:
    logs = "\n".join(path.read_text()[-3000:] for path in folder.glob("*/log.txt"))
    assert codes[0] == codes[-1] == 0, logs
    assert set(codes[1:-1]) <= {SIGKILLED, 0}, logs
    assert SIGKILLED in codes
    for run in (folder / "disturbed", *folder.glob("finished-*")):
        assert_same_outcome(folder / "quiet" / "weights.safetensors", run / "weights.safetensors")
        # Finished epochs are not repeated, and every process after the first logs where it resumes.
        told = [tuple(map(int, line.split())) for line in (run / "epochs.txt").read_text().splitlines()]
        assert all(one < other for one, other in pairwise(told)), told
        resumed = [
            (int(epoch), int(step))
            for epoch, step in re.findall(r"resuming at epoch (\d+), step (\d+)", (run / "log.txt").read_text())
        ]
        assert resumed == sorted(resumed)
    assert not list(folder.glob("*/run/.unfinished"))


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="its processes are forked, so as to import torch once")
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path: Path) -> None:
    kinds = run_and_kill(tmp_path, kills=5, seed=0)
    assert sum(codes.count(SIGKILLED) for codes in kinds.values()) >= 8
    logs = [log.read_text() for log in tmp_path.glob("command/*/log.txt")]
    assert any(re.search("resuming at epoch|the training was finished before", log) for log in logs)
    for kind, codes in kinds.items():
        assert_undisturbed(tmp_path / kind, codes)


@pytest.mark.slow
def test_a_run_killed_at_many_random_moments(tmp_path: Path) -> None:
    for kind, codes in run_and_kill(tmp_path, kills=20, seed=1).items():
        assert_undisturbed(tmp_path / kind, codes)


def checkpoint(steps: int) -> Checkpoint:
    progress = Progress(phase=1, epoch=1, step=2, steps=steps, history=[EpochResult(1, 0.5, 0.5, 1e-3, 0.01)])
    tensors = {"classifier.weight": torch.full((8,), float(steps))}
    return Checkpoint(progress, tensors, {}, {"classifier.weight": {"exp_avg": torch.ones(8)}}, [{"torch": "00"}], {})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit_of_a_tensor(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def rewrite_history(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.9"))


def pickle_instead(path: Path) -> None:
    torch.save({"progress": 1}, path)


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit_of_a_tensor, rewrite_history, pickle_instead])
def test_a_damaged_checkpoint_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    for steps in (10, 20, 30):
        write_checkpoint(tmp_path, checkpoint(steps))
    (tmp_path / ".step-000000040.safetensors.123").write_bytes(b"of a process that was killed")
    older, newer = sorted(tmp_path.glob("step-*"))
    assert newest_checkpoint(tmp_path).model["classifier.weight"][0] == 30
    damage(newer)
    found = newest_checkpoint(tmp_path)
    assert found.progress == checkpoint(20).progress
    assert torch.equal(found.model["classifier.weight"], torch.full((8,), 20.0))
    assert caplog.messages[0].startswith(f"checkpoint {newer.name} is damaged (")
    damage(older)
    assert newest_checkpoint(tmp_path) is None
    assert sorted(tmp_path.iterdir()) == [older, newer]


def test_a_checkpoint_of_another_version_is_kept(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, checkpoint(10))
    (path,) = tmp_path.iterdir()
    with safe_open(path, framework="pt") as opened:
        state = json.loads(opened.metadata()["state"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    text = json.dumps({**state, "progress": {**state["progress"], "cached": True}})
    save_file(tensors, path, metadata={"state": text, "digest": _digest_all(text, tensors)})
    with pytest.raises(ValueError, match=r"step-0+10\S+ was written by another version .*'cached'.*remove the folder"):
        newest_checkpoint(tmp_path)
    assert path.exists()


class Scaler:
    """The attributes of torch's GradScaler that are used; the CPU has none."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale = state["scale"]


def test_the_scale_of_the_loss_is_restored(tmp_path: Path) -> None:
    def accelerator(scaler: Scaler | None) -> Any:
        return SimpleNamespace(scaler=scaler, num_processes=1, process_index=0, is_main_process=True)

    layer, scaler = torch.nn.Linear(2, 1), Scaler(1.0)
    write_checkpoint(tmp_path, capture(Progress(), layer, set(), None, accelerator=accelerator(Scaler(1024.0))))
    saved = newest_checkpoint(tmp_path)
    assert saved is not None
    optimizer = torch.optim.SGD(layer.parameters())
    resume(saved, layer, optimizer, accelerator(scaler))
    assert scaler.scale == 1024.0
    resume(saved, layer, optimizer, accelerator(None))  # the CPU has none


def test_every_random_generator_is_restored() -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(0, 1), float(numpy.random.randn()), float(torch.rand(1))

    draw()
    state = json.loads(json.dumps(random_state()))
    expected = draw()
    assert draw() != expected
    restore_random_state(state)
    assert draw() == expected
    with preserve_rng_state():
        draw()
    outside = draw()
    restore_random_state(state)
    draw()
    assert draw() == outside


def test_a_run_that_is_interrupted_resumes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["train", str(make_folder(tmp_path / "images")), "--model", "test_resnet", "--epochs", "2"]
    command += ["--output", str(tmp_path / "run"), "--baselines"]
    with raising(KeyboardInterrupt(), is_pixel_baseline):
        assert cli.main(command) == 130
    error = capfd.readouterr().err
    assert f"stopped; the same command resumes this run, which {tmp_path / 'run'} keeps" in error
    assert cli.main([*command, "--epochs", "3"]) == 2
    assert "(phases 1 epochs: 2 there, 3 here)" in capfd.readouterr().err
    assert cli.main(command) == 0
    printed = capfd.readouterr()
    assert "the training was finished before" in printed.out
    assert "resuming at" not in printed.out
    assert "epoch 1/2" not in printed.err
    assert (tmp_path / "run" / MODEL_FILE).exists()


@pytest.mark.long
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch is built without gloo")
def test_workers_that_outlive_their_launcher_keep_the_lock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = ["train", str(make_folder(tmp_path / "images")), "--model", "test_resnet", "--epochs", "1000000"]
    command += ["--output", str(run)]
    launcher, environment = [sys.executable, *LAUNCH, "2"], {**os.environ, **ENVIRONMENT}
    log = tmp_path / "log.txt"
    with (
        log.open("w") as printed,
        subprocess.Popen(
            [*launcher, "-m", "backbone_finetune.cli", *command], env=environment, stdout=printed, stderr=printed
        ) as process,
    ):
        try:
            wait_for(lambda: list(run.glob(f"{UNFINISHED}/checkpoints/step-*")), log)
            workers = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.kill()
    try:
        assert any(worker.is_running() for worker in workers)
        assert cli.main([*command, "--overwrite"]) == 2
        assert f"another process is training in {run}; wait for it or stop it" in capsys.readouterr().err
    finally:
        for worker in workers:
            worker.kill()
    psutil.wait_procs(workers, timeout=30)
    with open_run(run, {}, overwrite=True):  # the lock was released with them
        pass


def wait_for(condition: Callable[[], object], log: Path) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)
