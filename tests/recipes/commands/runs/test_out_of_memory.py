"""A trained model is written, and its run ends, if something that is measured beside it fails."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from image_folders import make_folder

from backbone_finetune.recipes.commands.reporting import plots
from backbone_finetune.recipes.commands.runs import comparisons, held_out, results
from backbone_finetune.recipes.commands.settings import TrainSettings
from backbone_finetune.recipes.commands.train import train
from backbone_finetune.recipes.models.file import load_trained_model
from backbone_finetune.recipes.training.epoch import DivergedError
from backbone_finetune.recipes.training.phases import Phase

BESIDE = {
    "test images": (held_out, "evaluate"),
    "folds": (comparisons, "cross_validate"),
    "random backbone": (comparisons, "random_model"),
    "raw pixels": (comparisons, "pixel_model"),
    "backward": (comparisons, "measure_backward"),
    "curves.png": (plots, "draw_curves"),
    "report.html": (results, "report_run"),
}


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


def failing(error: BaseException) -> Any:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise error

    return fail


def left_out(caplog: pytest.LogCaptureFixture) -> set[str]:
    return {name for line in caplog.messages for name, found, _ in [line.partition(": left out, ")] if found}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), DivergedError("diverged")], ids=["memory", "diverged"]
)
def test_a_run_that_can_do_no_more_than_the_training_ends_with_its_model(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    names = {*BESIDE} - {"report.html"}
    for name in names:
        monkeypatch.setattr(*BESIDE[name], failing(error))
    metrics = train(TrainSettings(**settings))
    assert left_out(caplog) == names
    assert names_in(settings["output"]) == {"run.json", "model.safetensors", "metrics.json"}
    assert (metrics.test_accuracy, metrics.fold_accuracies, metrics.random_backbone, metrics.raw_pixels) == (None,) * 4
    assert metrics.backward_milliseconds is None
    assert json.loads((settings["output"] / "metrics.json").read_text())["history"]
    assert load_trained_model(settings["output"] / "model.safetensors").class_names == metrics.class_names


def test_a_run_without_memory_for_the_report_ends_without_it(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(*BESIDE["report.html"], failing(MemoryError()))
    train(TrainSettings(**{**settings, "baselines": False, "folds": None}))
    assert left_out(caplog) == {"report.html"}
    assert names_in(settings["output"]) == {
        "run.json",
        "model.safetensors",
        "metrics.json",
        "curves.png",
        "predictions.csv",
    }


@pytest.mark.parametrize("error", [RuntimeError("a fault"), KeyboardInterrupt()], ids=["fault", "Ctrl-C"])
def test_the_model_is_written_if_the_test_fails(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    settings |= {"baselines": False, "folds": None}
    with monkeypatch.context() as changed:
        changed.setattr(held_out, "evaluate", failing(error))
        with pytest.raises(type(error)):
            train(TrainSettings(**settings))
    assert names_in(settings["output"]) == {"run.json", "model.safetensors", "metrics.json", ".unfinished"}
    assert json.loads((settings["output"] / "metrics.json").read_text())["history"]
    before = load_trained_model(settings["output"] / "model.safetensors").model.state_dict()
    assert train(TrainSettings(**settings)).test_accuracy is not None
    after = load_trained_model(settings["output"] / "model.safetensors").model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_thresholds_without_memory_are_one_half(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    paths = sorted(settings["images"].rglob("*.png"))
    rows = [f"{path},{path.parent.name},{('train', 'val', 'test')[index % 3]}" for index, path in enumerate(paths)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["path,labels,split", *rows]) + "\n")
    monkeypatch.setattr(held_out, "evaluate", failing(torch.OutOfMemoryError("CUDA out of memory")))
    train(TrainSettings(**{**settings, "images": table, "baselines": False, "folds": None}))
    assert left_out(caplog) == {"validation images", "test images"}
    loaded = load_trained_model(settings["output"] / "model.safetensors")
    assert loaded.objective.thresholds is None


@pytest.mark.parametrize("error", [MemoryError("too many"), IndexError("no class 2")], ids=["memory", "cleanlab"])
def test_a_run_whose_label_check_fails_ends_without_it(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    cleanlab = types.ModuleType("cleanlab.filter")  # need not be installed
    cleanlab.find_label_issues = failing(error)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cleanlab", types.ModuleType("cleanlab"))
    for name in ("filter", "rank"):
        monkeypatch.setitem(sys.modules, f"cleanlab.{name}", cleanlab)
    metrics = train(TrainSettings(**{**settings, "baselines": False, "folds": None, "check_labels": True}))
    assert (left_out(caplog), metrics.label_issues) == ({"label_issues.csv"}, None)
    everything = {"run.json", "model.safetensors", "metrics.json", "curves.png", "report.html", "predictions.csv"}
    assert names_in(settings["output"]) == everything
    assert str(error) in caplog.text
