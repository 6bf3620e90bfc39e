"""The data of a run: the image size is one that the network supports, and common layouts of folders work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from image_folders import make_folder
from safetensors.torch import load_file

from backbone_finetune.cli import main
from backbone_finetune.recipes.commands.setup import TrainSettings, make_task
from backbone_finetune.recipes.training.processes import make_accelerator


@pytest.mark.parametrize(
    ("architecture", "size"),
    [("halonet26t", (3, 256, 256)), ("bat_resnext26ts", (3, 256, 256)), ("test_resnet", (3, 96, 96))],
)
def test_clipart_has_a_size_that_the_network_supports(
    architecture: str, size: tuple[int, int, int], tmp_path: Path
) -> None:
    settings = TrainSettings(architecture=architecture, output=tmp_path / "run")
    task = make_task(settings, make_accelerator(torch.device("cpu"), mixed_precision=None))
    assert task.data_config["input_size"] == size
    image, _ = task.train[0]
    with torch.no_grad():
        assert task.model.eval()(image[None]).shape == (1, 10)
    assert list(tmp_path.iterdir()) == []


def test_train_and_val_folders_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "data" / "train", per_class=4)
    make_folder(tmp_path / "data" / "val", per_class=2)
    small = ["--model", "test_resnet", "--epochs", "1", "--device", "cpu"]
    assert main(["train", str(tmp_path / "data"), *small, "--output", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    assert f"train: {tmp_path}/data/train; test: {tmp_path}/data/val (validation)\n" in printed.out
    assert "images by class, train + test: blue 4 + 2, green 4 + 2, red 4 + 2\n" in printed.out
    assert "6 of 6 test images are training images, byte for byte" in printed.err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["class_names"], metrics["test_images"]) == (["blue", "green", "red"], 6)


def test_a_run_with_a_table_and_a_separate_test_set_is_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "other", per_class=1)
    images = sorted(make_folder(tmp_path / "data", per_class=4).rglob("*.png"))
    table = tmp_path / "images.csv"
    rows = (f"{path.relative_to(tmp_path)},{path.parent.name}" for path in images)
    table.write_text("\n".join(["path,label", *rows]))
    given = [str(table), "--test", str(tmp_path / "other"), "--output", str(tmp_path / "run")]
    assert main(["train", *given, "--model", "test_resnet", "--epochs", "1", "--device", "cpu"]) == 0
    assert "12 to train, 3 to test\n" in capsys.readouterr().out
    again = ["train", "--run", str(tmp_path / "run" / "run.json"), "--output", str(tmp_path / "again")]
    assert main([*again, "--validation", str(tmp_path / "other")]) == 2
    assert "--validation and --run" in capsys.readouterr().err
    assert main(again) == 0
    assert "this run differs" not in capsys.readouterr().err
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
