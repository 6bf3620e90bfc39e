"""Stop and go on: killed at any moment, a run ends as if nothing had happened; damaged checkpoints are passed over."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import psutil
import pytest
import torch
from image_folders import make_folder
from safetensors import safe_open

from backbone_finetune import cli
from backbone_finetune.recipes.commands import train as run_module
from backbone_finetune.recipes.commands.folder_lock import LOCK_FILE, holding, refuse_if_held
from backbone_finetune.recipes.commands.run_folder import (
    MODEL_FILE,
    RUN_FILE,
    UNFINISHED,
    claim_output_folder,
    remove_leftover,
)
from backbone_finetune.recipes.rng import preserve_rng_state, random_state, restore_random_state
from backbone_finetune.recipes.training.checkpoints import (
    Checkpoint,
    EpochResult,
    Progress,
    newest_checkpoint,
    write_checkpoint,
)
from backbone_finetune.recipes.training.resuming import capture, resume

WORKER = Path(__file__).with_name("training_worker.py")
SIGKILLED = -9


def run_and_kill(folder: Path, *, kills: int, seed: int) -> dict[str, list[int]]:
    """Train and kill in processes of their own: the exit codes, by what was trained."""
    command = [sys.executable, "-W", "error", str(WORKER), str(folder), str(kills), str(seed)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
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
        # What was written down as finished is not done again, and every process but the first says where it goes on.
        told = [tuple(map(int, line.split())) for line in (run / "epochs.txt").read_text().splitlines()]
        assert all(one < other for one, other in pairwise(told)), told
        resumed = [
            (int(epoch), int(step))
            for epoch, step in re.findall(r"resuming at epoch (\d+), step (\d+)", (run / "log.txt").read_text())
        ]
        assert resumed == sorted(resumed)
    assert not list(folder.glob("*/run/unfinished"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="its processes are forked, so as to import torch once")
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    kinds = run_and_kill(tmp_path, kills=5, seed=0)
    assert sum(codes.count(SIGKILLED) for codes in kinds.values()) >= 8
    logs = [log.read_text() for log in tmp_path.glob("command/*/log.txt")]
    assert any(re.search("resuming at epoch|its training was finished", log) for log in logs)
    for kind, codes in kinds.items():
        assert_undisturbed(tmp_path / kind, codes)


@pytest.mark.slow
def test_killed_at_many_random_moments(tmp_path: Path) -> None:
    for kind, codes in run_and_kill(tmp_path, kills=20, seed=1).items():
        assert_undisturbed(tmp_path / kind, codes)


def checkpoint(steps: int) -> Checkpoint:
    progress = Progress(phase=1, epoch=1, step=2, steps=steps, history=[EpochResult(1, 0.5, 0.5, 0.5)])
    tensors = {"classifier.weight": torch.full((8,), float(steps))}
    return Checkpoint(progress, tensors, {"classifier.weight.exp_avg": torch.ones(8)}, [{"torch": "00"}], {})


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
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
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
    assert capsys.readouterr().err.startswith(f"checkpoint {newer.name} is damaged (")
    damage(older)
    assert newest_checkpoint(tmp_path) is None
    assert sorted(tmp_path.iterdir()) == [older, newer]


RECORD = {"arguments": {"seed": 0, "phases": [{"epochs": 1}]}, "versions": {"torch": "2.9"}}
OTHER = {"arguments": {"seed": 0, "phases": [{"epochs": 2}]}, "versions": {"torch": "2.9"}}


def test_an_unfinished_run_is_gone_on_with_only_by_the_same_arguments(tmp_path: Path) -> None:
    assert not claim_output_folder(tmp_path, RECORD, overwrite=False)
    (tmp_path / UNFINISHED / "checkpoints").mkdir()
    assert claim_output_folder(tmp_path, RECORD, overwrite=False)
    with pytest.raises(
        FileExistsError,
        match=r"holds an unfinished run of other arguments \(phases 1 epochs: 1 there, 2 here\); give the same ones to "
        "go on with it, --overwrite to replace it, or another folder with --output",
    ):
        claim_output_folder(tmp_path, OTHER, overwrite=False)
    assert (tmp_path / UNFINISHED / "checkpoints").is_dir()
    assert not claim_output_folder(tmp_path, OTHER, overwrite=True)
    assert not (tmp_path / UNFINISHED / "checkpoints").exists()
    assert json.loads((tmp_path / RUN_FILE).read_text()) == OTHER


def test_a_run_that_replaces_a_finished_one_can_be_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / MODEL_FILE).write_text("the first model")
    (tmp_path / RUN_FILE).write_text(json.dumps(RECORD))
    with pytest.raises(FileExistsError, match="already holds a finished model"):
        claim_output_folder(tmp_path, RECORD, overwrite=False)
    # The same arguments, but that run is finished: it begins anew.
    assert not claim_output_folder(tmp_path, RECORD, overwrite=True)
    assert claim_output_folder(tmp_path, RECORD, overwrite=True)
    assert (tmp_path / MODEL_FILE).read_text() == "the first model"


def test_what_a_run_left_that_was_killed_at_its_very_end_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class KilledError(Exception):
        """In the place of SIGKILL."""

    def die(folder: Path) -> None:
        raise KilledError

    command = ["train", str(make_folder(tmp_path / "images")), "--model", "test_resnet", "--epochs", "1"]
    command += ["--output", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "clear", die)
        with pytest.raises(KilledError):
            cli.main(command)
    assert (tmp_path / "run" / UNFINISHED / "checkpoints").is_dir()
    assert cli.main(command) == 2
    assert "already holds a finished model" in capsys.readouterr().err
    assert not (tmp_path / "run" / UNFINISHED).exists()


def test_what_a_run_needs_that_will_replace_a_model_stays(tmp_path: Path) -> None:
    (tmp_path / MODEL_FILE).write_text("the first model")
    claim_output_folder(tmp_path, RECORD, overwrite=True)
    (tmp_path / UNFINISHED / "checkpoints").mkdir()
    remove_leftover(tmp_path)
    assert (tmp_path / UNFINISHED / "checkpoints").is_dir()


def test_a_damaged_record_is_another_run(tmp_path: Path) -> None:
    claim_output_folder(tmp_path, RECORD, overwrite=False)
    (tmp_path / RUN_FILE).write_text("{")
    with pytest.raises(FileExistsError, match=r"run\.json: \"not readable\" there, none here"):
        claim_output_folder(tmp_path, RECORD, overwrite=False)


class Scaler:
    """What is asked of torch's GradScaler, which the CPU has no use for."""

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
    resume(saved, optimizer, accelerator(scaler))
    assert scaler.scale == 1024.0
    resume(saved, optimizer, accelerator(None))  # on the CPU, which has none


def test_every_random_generator_is_restored() -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(), float(numpy.random.randn()), float(torch.rand(1))

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


def test_ctrl_c_leaves_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(make_folder(tmp_path / "images")), "--model", "test_resnet", "--epochs", "2"]
    command += ["--output", str(tmp_path / "run"), "--baselines"]

    def interrupt(*arguments: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "random_backbone_accuracy", interrupt)
        assert cli.main(command) == 130
    error = capfd.readouterr().err
    assert f"stopped; {tmp_path / 'run'} keeps what is done: the same command goes on" in error
    assert cli.main([*command, "--epochs", "3"]) == 2
    assert "(phases 1 epochs: 2 there, 3 here)" in capfd.readouterr().err
    assert cli.main(command) == 0
    printed = capfd.readouterr()
    assert "its training was finished; going on with the rest" in printed.out
    assert "resuming at" not in printed.out
    assert "epoch 1/2" not in printed.err
    assert (tmp_path / "run" / MODEL_FILE).exists()


def test_two_runs_do_not_work_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", str(make_folder(tmp_path / "images")), "--model", "test_resnet"]
    command += ["--output", str(tmp_path / "run"), "--overwrite"]
    with holding(tmp_path / "run" / UNFINISHED, name="run"):
        (tmp_path / "run" / UNFINISHED / "checkpoints").mkdir()
        assert cli.main(command) == 2
        assert capsys.readouterr().err == (
            f"backbone-finetune: error: another process (pid {os.getpid()}) is training in {tmp_path / 'run'}; "
            "wait for it or stop it\n"
        )
        with pytest.raises(FileExistsError, match=r"another process \(pid \d+\) is training in run; wait for it"):
            holding(tmp_path / "run" / UNFINISHED, name="run").__enter__()
        assert (tmp_path / "run" / UNFINISHED / "checkpoints").is_dir()
    (tmp_path / "run" / UNFINISHED / "checkpoints").rmdir()
    with holding(tmp_path / "run" / UNFINISHED, name="run"):
        pass
    assert not (tmp_path / "run" / UNFINISHED).exists()


def test_a_run_holds_its_folder_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["train", str(make_folder(tmp_path / "images")), "--model", "test_resnet", "--epochs", "1", "--baselines"]

    def look(*arguments: object, **keywords: object) -> None:
        refuse_if_held(tmp_path / "run" / UNFINISHED, name="run")

    monkeypatch.setattr(run_module, "random_backbone_accuracy", look)
    assert cli.main([*command, "--output", str(tmp_path / "run")]) == 2
    look()


def test_without_locks_of_the_system_the_process_that_is_named_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", fail)
    with subprocess.Popen([sys.executable, "--version"], stdout=subprocess.DEVNULL) as ended:
        pass
    for process, host, holds in (
        (ended.pid, socket.gethostname(), False),
        (os.getppid(), socket.gethostname(), True),
        (ended.pid, "elsewhere", True),
    ):
        (tmp_path / LOCK_FILE).write_text(f"{process} {host}\n")
        where = "" if host == socket.gethostname() else " on elsewhere"
        with pytest.raises(FileExistsError, match=rf"pid {process}{where}\)") if holds else nullcontext():
            refuse_if_held(tmp_path, name="run")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch is built without gloo")
def test_workers_that_outlive_their_launcher_keep_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["train", str(make_folder(tmp_path / "images")), "--model", "test_resnet", "--epochs", "1000000"]
    command += ["--output", str(run)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
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
        assert cli.main(command) == 2
        line = capsys.readouterr().err
        found = re.search(r"another process \(pid (\d+)\) is training in", line)
        assert found is not None, line
        assert int(found[1]) in {worker.pid for worker in workers if worker.is_running()}
    finally:
        for worker in workers:
            worker.kill()
    psutil.wait_procs(workers, timeout=30)
    refuse_if_held(run / UNFINISHED, name="run")  # nothing stale is left of them


def wait_for(condition: Callable[[], object], log: Path) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)
