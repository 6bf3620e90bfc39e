"""Phases: files of phases, errors in them, and learning rates in each step."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_folders import make_folder
from torch import nn

from backbone_finetune import cli
from backbone_finetune.recipes.training.config import TrainerConfig
from backbone_finetune.recipes.training.phases import Phase, make_schedule, read_phases
from backbone_finetune.recipes.training.processes import make_accelerator


def write(folder: Path, text: str) -> Path:
    path = folder / "phases.toml"
    path.write_text(text)
    return path


def test_phases_are_read_in_order(tmp_path: Path) -> None:
    text = """
        [[phases]]
        epochs = 20

        [[phases]]
        epochs = 5
        trainable_groups = 1
        lr = 1e-4
        backbone_lr = 2e-5
        layer_decay = 0.75
        weight_decay = 0
        warmup_epochs = 0.5
        cosine = true
    """
    assert read_phases(write(tmp_path, text)) == (
        Phase(epochs=20),
        Phase(5, 1, lr=1e-4, backbone_lr=2e-5, layer_decay=0.75, weight_decay=0, warmup_epochs=0.5, cosine=True),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            r"phases\.toml: phases: field required; pass a TOML file with \[\[phases\]\] tables, each",
        ),
        ("phases = []", r"phases\.toml: phases = \[\]: tuple should have at least 1 item"),
        ("phases = [1]", r"phases\.toml: phases 1 = 1: input should be"),
        ("[phases]\nepochs = 1", r"phases\.toml: phases = \{'epochs': 1\}: input should be a valid tuple"),
        ("epochs = 3\nphases = [{}]", r"phases\.toml: epochs = 3: extra inputs are not permitted"),
        ("[[phases]\n", r"phases\.toml: not TOML \("),
        (
            "[[phases]]\n[[phases]]\nlearning_rate = 1",
            r"phases\.toml: phases 2 learning_rate = 1: unexpected keyword argument; .* some of epochs, "
            "trainable_groups, lr, backbone_lr, layer_decay, weight_decay, warmup_epochs, cosine",
        ),
        (
            "[[phases]]\nepochs = 0",
            "phases 1 epochs = 0: input should be greater than or equal to 1; .* some of epochs",
        ),
        ("[[phases]]\nwarmup_epochs = 99", "phases 1 = .*: warmup_epochs = 99.0: expected a number from 0 to its 30"),
    ],
)
def test_an_invalid_file_raises(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_phases(write(tmp_path, text))


def test_a_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml: there is no such file"):
        read_phases(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"epochs": 0}, r"epochs\n +Input should be greater than or equal to 1"),
        ({"epochs": 2.5}, r"epochs\n +Input should be a valid integer"),
        ({"trainable_groups": -1}, r"trainable_groups\n +Input should be greater than or equal to 0"),
        ({"lr": 0}, r"lr\n +Input should be greater than 0"),
        ({"lr": float("nan")}, r"lr\n +Input should be a finite number"),
        ({"backbone_lr": float("inf")}, r"backbone_lr\n +Input should be a finite number"),
        ({"layer_decay": 1.5}, r"layer_decay\n +Input should be less than or equal to 1"),
        ({"weight_decay": -0.1}, r"weight_decay\n +Input should be greater than or equal to 0"),
        ({"epochs": 2, "warmup_epochs": 3}, "warmup_epochs = 3.0: expected a number from 0 to its 2 epochs"),
        ({"cosine": "maybe"}, r"cosine\n +Input should be a valid boolean"),
        ({"epoch": 3}, r"epoch\n +Unexpected keyword argument"),
    ],
)
def test_an_invalid_entry_raises(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Phase(**entries)


def test_a_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a file; pass a TOML file with \[\[phases\]\] tables"):
        read_phases(tmp_path)


def rates(phase: Phase, steps_per_epoch: int) -> list[list[float]]:
    layer = nn.Linear(2, 2)
    groups = [{"params": [layer.weight], "lr": 1.0}, {"params": [layer.bias], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    schedule = make_schedule(optimizer, phase, steps_per_epoch)
    seen = []
    for step in range(1, phase.epochs * steps_per_epoch + 1):
        schedule.step_update(step)
        seen.append([group["lr"] for group in optimizer.param_groups])
    return seen


def test_rates_rise_and_fall_and_keep_the_ratio_of_groups() -> None:
    seen = rates(Phase(epochs=4, warmup_epochs=0.5, cosine=True), 10)
    first = [rate for rate, _ in seen]
    assert first[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(one > other for one, other in pairwise(first[4:]))
    assert 0 < first[-1] < 0.01
    assert all(small == pytest.approx(rate / 10) for rate, small in seen)


def test_without_cosine_rates_are_constant() -> None:
    assert rates(Phase(epochs=2), 3) == [[1.0, 0.1]] * 6
    assert [rate for rate, _ in rates(Phase(epochs=2, warmup_epochs=1), 2)] == pytest.approx([0.5, 1.0, 1.0, 1.0])


def test_the_command_accepts_a_file_or_options_of_one_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "[[phases]]\n[[phases]]\ntrainable_groups = 1\nepochs = 2\n")
    options = cli.build_parser().parse_args(["train", "--phases", str(path), "--seed", "1"])
    assert cli.choose_phases(options) == (Phase(), Phase(epochs=2, trainable_groups=1))
    assert cli.choose_phases(cli.build_parser().parse_args(["train"])) == (Phase(),)
    images = str(make_folder(tmp_path / "images"))
    assert cli.main(["train", images, "--phases", str(path), "--backbone-lr", "1"]) == 2
    line = (
        f"backbone-finetune: error: --backbone-lr and --phases {path} were both given; write it into the file's phases"
    )
    assert capsys.readouterr().err.strip() == line


def test_numpy_numbers_are_accepted() -> None:
    phase = Phase(epochs=np.int64(3), lr=np.float32(0.5), warmup_epochs=np.float64(0.5))
    assert json.loads(json.dumps(asdict(phase)))["epochs"] == 3
    assert (type(phase.epochs), type(phase.lr), phase.lr) == (int, float, 0.5)
    assert TrainerConfig(make_accelerator(torch.device("cpu")), batch_size=np.int64(4)).batch_size == 4
