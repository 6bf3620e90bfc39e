"""Trackers of accelerate: settings and epochs are logged once each, and a tracker that fails does not end a run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from image_folders import make_folder
from torch import nn
from torch.utils.data import TensorDataset

from backbone_finetune import FineTuneModel
from backbone_finetune.cli import main
from backbone_finetune.recipes import Phase, TrainerConfig, cross_validate, fine_tune

PHASES = [Phase(epochs=2, lr=0.1), Phase(epochs=1, trainable_groups=1, lr=0.01)]
DATA = TensorDataset(torch.eye(2).repeat(6, 1), torch.arange(2).repeat(6))


class Notebook(GeneralTracker):
    """A tracker that writes down what it is told."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.fails_at = fails_at
        self.settings: list[dict[str, Any]] = []
        self.steps: dict[int | None, dict[str, Any]] = {}
        self.calls = 0

    @property
    def tracker(self) -> Notebook:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.calls += 1
        if step == self.fails_at:
            raise ConnectionError("no answer")
        self.steps[step] = values


def make_model() -> FineTuneModel:
    torch.manual_seed(0)
    return FineTuneModel(nn.Linear(2, 3), nn.Linear(3, 2))


def test_epochs_are_logged_to_the_trackers_of_the_accelerator() -> None:
    notebook = Notebook()
    accelerator = Accelerator(cpu=True, log_with=notebook)
    history = fine_tune(make_model(), DATA, DATA, PHASES, TrainerConfig(accelerator, batch_size=4, show_progress=False))
    assert list(notebook.steps) == [1, 2, 3]
    for result, values in zip(history, notebook.steps.values(), strict=True):
        assert values["train/loss"] == result.train_loss
        assert values["validation/loss"] == result.validation_loss
        assert values["validation/accuracy"] == result.validation_accuracy
        assert (values["lr"], values["phase"]) == (result.lr, result.phase)
    (settings,) = notebook.settings
    assert (settings["batch_size"], settings["phases/2/trainable_groups"]) == (4, 1)
    cross_validate(make_model(), DATA, PHASES, TrainerConfig(accelerator, show_progress=False), folds=2)
    assert notebook.calls == 3  # folds are other trainings


def test_a_tracker_that_fails_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    config = TrainerConfig(Accelerator(cpu=True, log_with=(notebook := Notebook(fails_at=2))), show_progress=False)
    with caplog.at_level(logging.WARNING, "backbone_finetune"):
        assert len(fine_tune(make_model(), DATA, None, PHASES, config)) == 3
    assert list(notebook.steps) == [1, 3]
    assert "notebook: the figures of epoch 2 are not logged: ConnectionError: no answer" in caplog.text


def test_a_resumed_run_continues_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook, other = Notebook(fails_at=0), Notebook()

    def run(tracker: Notebook) -> None:
        accelerator = Accelerator(cpu=True, log_with=tracker)
        config = TrainerConfig(accelerator, checkpoints=tmp_path / "checkpoints", show_progress=False)
        fine_tune(make_model(), DATA, None, PHASES, config)

    def stop(values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        Notebook.log(notebook, values, step)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(notebook, "log", stop)
    with pytest.raises(KeyboardInterrupt):
        run(notebook)
    run(other)
    assert [*notebook.steps] == [1, 2]
    assert [*other.steps] == [3]


def test_a_tracker_that_is_not_installed_is_named_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    folder, output = str(make_folder(tmp_path / "images")), tmp_path / "run"
    assert main(["train", folder, "--log-with", "tensorboard", "--output", str(output)]) == 2
    assert "tensorboard is not installed; run: pip install 'backbone-finetune[tensorboard]'" in capsys.readouterr().err
    assert not output.exists()
