"""A trained model is written, and its run ends, if something that is measured beside it fails."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import full_memory
import pytest
import torch
import torch.distributed as dist
from full_memory import after_steps
from image_folders import make_folder
from PIL import Image
from steps import after_step
from torch import nn
from torchrun import torchrun

from backbone_finetune import cli
from backbone_finetune.recipes.commands.settings import TrainSettings
from backbone_finetune.recipes.commands.train import train
from backbone_finetune.recipes.models.file import load_trained_model
from backbone_finetune.recipes.training.phases import Phase

EVERYTHING = {"run.json", "model.safetensors", "metrics.json", "predictions.csv", "curves.png", "report.html"}
AFTER_TRAINING = {"test images", "folds", "random backbone", "nearest neighbours", "raw pixels", "backward"}
STEPS = 2  # of the training in these settings


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "images": make_folder(tmp_path / "images"),
        "architecture": "test_resnet",
        "input_size": 32,
        "phases": (Phase(epochs=1, lr=0.01),),
        "batch_size": 8,
        "output": tmp_path / "run",
        "device": "cpu",
        "baselines": True,
        "folds": 2,
    }


def left_out(caplog: pytest.LogCaptureFixture) -> set[str]:
    return {name for line in caplog.messages for name, found, _ in [line.partition(": left out, ")] if found}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_without_memory_after_the_training_ends_with_its_model(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with after_steps(STEPS):
        metrics = train(TrainSettings(**settings))
    assert left_out(caplog) == AFTER_TRAINING
    assert all("the memory is too small" in line for line in caplog.messages if ": left out, " in line)
    assert names_in(settings["output"]) == {"run.json", "model.safetensors", "metrics.json", "curves.png"}
    assert (metrics.test_accuracy, metrics.fold_accuracies, metrics.random_backbone, metrics.raw_pixels) == (None,) * 4
    assert metrics.backward_milliseconds is None
    assert json.loads((settings["output"] / "metrics.json").read_text())["history"]
    assert load_trained_model(settings["output"] / "model.safetensors").class_names == metrics.class_names


def test_a_step_without_memory_is_one_line_with_what_to_pass(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--model test_resnet --input-size 32 --epochs 1 --batch-size 8 --accumulation 2 --lr 0.01"
    with after_step(2, lambda: full_memory.out_of_memory(nn.Conv2d(1, 1, 1), None, torch.zeros(1))):
        status = cli.main(["train", str(settings["images"]), *options.split(), "--output", str(settings["output"])])
    remedy = "pass a larger accumulation (train --accumulation), with the same result, or a smaller batch"
    line = f"backbone-finetune: error: CUDA out of memory; a step of 8 images, accumulation 2: {remedy}"
    assert (status, capsys.readouterr().err.splitlines()[-1]) == (2, line)


def test_a_run_whose_comparisons_diverge_ends_without_them(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def diverge(module: nn.Module, _: Any, output: Any) -> Any:
        return output * torch.nan if isinstance(module, nn.Linear) and module.training else output

    with after_steps(STEPS, diverge):
        train(TrainSettings(**settings))
    assert left_out(caplog) == {"folds", "random backbone", "raw pixels"}
    assert "folds: left out, the training diverged at lr = 0.01" in caplog.text
    assert {"run.json", "model.safetensors", "metrics.json"} <= names_in(settings["output"])


@pytest.mark.long
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")
def test_all_processes_leave_out_what_one_has_no_memory_for(settings: dict[str, Any]) -> None:
    finished = torchrun(full_memory.__file__, str(settings["images"]), str(settings["output"]))
    assert finished.returncode == 0, finished.stderr
    why = ": left out, the memory is too small (process 1: OutOfMemoryError: CUDA out of memory)"
    lines = [line.removesuffix(why) for line in finished.stderr.splitlines() if line.endswith(why)]
    assert sorted(lines) == sorted(AFTER_TRAINING - {"backward"})  # which the main process alone times
    assert names_in(settings["output"]) == {"run.json", "model.safetensors", "metrics.json", "curves.png"}


def test_a_run_without_memory_for_pictures_ends_without_them(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "save", fail)
    train(TrainSettings(**{**settings, "baselines": False, "folds": None}))
    assert left_out(caplog) == {"curves.png", "report.html"}
    assert names_in(settings["output"]) == EVERYTHING - {"curves.png", "report.html"}


@pytest.mark.parametrize("error", [RuntimeError("a fault"), KeyboardInterrupt()], ids=["fault", "Ctrl-C"])
def test_the_model_is_written_if_the_test_fails(settings: dict[str, Any], error: BaseException) -> None:
    def fail(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, nn.Conv2d) and not output.is_meta:
            raise error

    settings |= {"baselines": False, "folds": None}
    with after_steps(STEPS, fail), pytest.raises(type(error)):
        train(TrainSettings(**settings))
    assert names_in(settings["output"]) == {"run.json", "model.safetensors", "metrics.json", ".unfinished"}
    assert json.loads((settings["output"] / "metrics.json").read_text())["history"]
    before = load_trained_model(settings["output"] / "model.safetensors").model.state_dict()
    assert train(TrainSettings(**settings)).test_accuracy is not None
    after = load_trained_model(settings["output"] / "model.safetensors").model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_thresholds_without_memory_are_one_half(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    paths = sorted(settings["images"].rglob("*.png"))
    rows = [f"{path},{path.parent.name},{('train', 'val', 'test')[index % 3]}" for index, path in enumerate(paths)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["path,labels,split", *rows]) + "\n")
    with after_steps(1):
        train(TrainSettings(**{**settings, "images": table, "baselines": False, "folds": None}))
    assert left_out(caplog) == {"validation images", "test images"}
    loaded = load_trained_model(settings["output"] / "model.safetensors")
    assert loaded.objective.thresholds is None


@pytest.mark.parametrize("error", [MemoryError("too many"), IndexError("no class 2")], ids=["memory", "cleanlab"])
def test_a_run_whose_label_check_fails_ends_without_it(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    cleanlab = types.ModuleType("cleanlab.filter")  # need not be installed
    cleanlab.find_label_issues = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cleanlab", types.ModuleType("cleanlab"))
    for name in ("filter", "rank"):
        monkeypatch.setitem(sys.modules, f"cleanlab.{name}", cleanlab)
    metrics = train(TrainSettings(**{**settings, "baselines": False, "folds": None, "check_labels": True}))
    assert (left_out(caplog), metrics.label_issues) == ({"label_issues.csv"}, None)
    assert names_in(settings["output"]) == EVERYTHING
    assert str(error) in caplog.text
