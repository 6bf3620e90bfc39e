"""Classes of unequal size: class weights in training, and balanced accuracy in the output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from image_folders import COLOURS, make_image
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset, default_collate

from backbone_finetune import FineTuneModel
from backbone_finetune.cli import main
from backbone_finetune.recipes.commands.settings import TrainSettings
from backbone_finetune.recipes.commands.setup import balanced_weights, make_task
from backbone_finetune.recipes.commands.train import train
from backbone_finetune.recipes.objectives.kinds import SingleLabel
from backbone_finetune.recipes.rng import seed_everything
from backbone_finetune.recipes.training.config import TrainerConfig
from backbone_finetune.recipes.training.loop import fine_tune
from backbone_finetune.recipes.training.phases import Phase
from backbone_finetune.recipes.training.processes import make_accelerator
from backbone_finetune.recipes.training.scoring import evaluate

COUNTS = {"blue": 9, "green": 4, "red": 2}
SMALL = ["--model", "test_resnet", "--input-size", "32", "--epochs", "1", "--device", "cpu", "--mixed-precision", "no"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for part in ("train", "val"):
        for name, count in COUNTS.items():
            for index in range(count):
                make_image(tmp_path / "images" / part / name / f"{index}.png", COLOURS[name], seed=index)
    return tmp_path / "images"


def test_the_loss_is_weighted_by_the_training_images_of_each_class(images: Path, tmp_path: Path) -> None:
    """One step, so that the loss is that of the initial model."""
    settings: dict[str, Any] = {"images": images, "architecture": "test_resnet", "phases": (Phase(epochs=1, lr=1e-3),)}
    settings |= {"input_size": 32, "batch_size": 15, "device": "cpu", "mixed_precision": "no"}
    seed_everything(0)
    task = make_task(TrainSettings(**settings), make_accelerator(torch.device("cpu"), mixed_precision="no"))
    inputs, targets = default_collate([task.train[index] for index in range(15)])
    with torch.no_grad():
        logits = task.model.eval()(inputs)
    weights = torch.tensor([15 / (3 * count) for count in COUNTS.values()])
    for given, expected in (
        ({}, cross_entropy(logits, targets)),
        ({"class_weights": "balanced"}, cross_entropy(logits, targets, weights)),
        ({"label_smoothing": 0.3}, cross_entropy(logits, targets, label_smoothing=0.3)),
    ):
        metrics = train(TrainSettings(**settings, **given, output=tmp_path / "-".join(["run", *given])))
        assert metrics.history[0].train_loss == pytest.approx(expected.item(), rel=1e-4)


def test_the_command_records_class_weights_and_repeats_the_run(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--class-weights", "balanced", "--label-smoothing", "0.1"]
    assert main(["train", str(images), *SMALL, *given, "--output", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["arguments"]["class_weights"], record["arguments"]["label_smoothing"]) == ("balanced", 0.1)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    share = metrics["test_balanced_accuracy"]
    assert share != metrics["test_accuracy"]
    assert f"balanced         {share:.3f}".replace(" 0.", " .") + "  mean recall of the classes\n" in printed

    again = ["train", "--run", str(tmp_path / "run" / "run.json"), "--output", str(tmp_path / "again")]
    assert main([*again, "--class-weights", "balanced"]) == 2
    assert "--class-weights and --run" in capsys.readouterr().err
    assert main(again) == 0
    repeated = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert repeated["history"] == metrics["history"]

    evaluated = ["evaluate", str(tmp_path / "run" / "model.safetensors"), str(images), "--device", "cpu"]
    assert main([*evaluated, "--output", str(tmp_path / "evaluation")]) == 0
    assert f"balanced accuracy {share:.3f}, the mean recall" in capsys.readouterr().out
    evaluation = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert evaluation["balanced_accuracy"] == pytest.approx(share)


def test_balanced_class_weights_raise_the_recall_of_a_rare_class() -> None:
    """20 of 400 images are of the rare class, and the classes overlap."""
    generator = torch.Generator().manual_seed(0)
    targets = (torch.arange(400) % 20 == 0).long()
    images = TensorDataset(torch.randn(400, 2, generator=generator) + 1.5 * targets[:, None], targets)
    recalls, balanced = [], []
    for weights in (None, balanced_weights(targets.tolist())):
        torch.manual_seed(0)
        model = FineTuneModel(torch.nn.Identity(), torch.nn.Linear(2, 2))
        accelerator = make_accelerator(torch.device("cpu"), mixed_precision="no")
        config = TrainerConfig(accelerator, objective=SingleLabel(weights), show_progress=False)
        fine_tune(model, images, None, [Phase(epochs=5, lr=0.05)], config)
        score = evaluate(model, images, config)
        recalls.append(float((score.answers[targets == 1] == 1).double().mean()))
        balanced.append(score.balanced_accuracy)
    assert recalls[0] < 0.4
    assert recalls[1] > 0.8
    assert balanced[1] > balanced[0] + 0.1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--class-weights", "mine"], "argument --class-weights: invalid choice: 'mine'"),
        (["--label-smoothing", "1"], "label_smoothing"),
        (["--regression", "x,"], "'x,' has an empty name; pass columns between commas, such as age,height"),
        (["--input-size", "96x"], "'96x' is no size; pass 96, or 96x128 for height x width"),
    ],
)
def test_an_invalid_setting_raises(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: Any = main(["train", *given])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    assert message in capsys.readouterr().err
