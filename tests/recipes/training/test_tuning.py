"""The phases of `--tune`: valid for every number of images and layer groups, and what the command trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from image_folders import make_folder
from torch import nn

from backbone_finetune import FineTuneModel, cli
from backbone_finetune.recipes import Augmentation, Phase, TrainSettings, train, tuning_phases


def make_model(groups: int) -> FineTuneModel:
    return FineTuneModel(nn.Sequential(*(nn.Linear(2, 2) for _ in range(groups))), nn.Linear(2, 2))


@pytest.mark.parametrize("groups", [1, 2, 3, 13])
@pytest.mark.parametrize("num_images", [1, 2, 380, 2_000, 10**7])
def test_each_phase_trains_more_at_a_lower_rate(groups: int, num_images: int) -> None:
    model = make_model(groups)
    head, *others = tuning_phases(num_images, model)
    assert head == Phase(epochs=30)
    trainable = [phase.trainable_groups for phase in others]
    assert trainable == sorted(set(trainable))
    assert trainable[-1] == groups
    rates = [phase.backbone_lr for phase in others]
    assert rates == sorted(rates, reverse=True)
    assert all(3 <= phase.epochs <= 10 for phase in others)
    assert {phase.augment for phase in others} == {Augmentation.LIGHT}


def test_more_images_have_fewer_epochs() -> None:
    assert [tuning_phases(count, make_model(3))[-1].epochs for count in (100, 400, 10_000)] == [10, 6, 3]


def test_other_phases_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, output = make_folder(tmp_path / "images"), tmp_path / "run"
    assert cli.main(["train", str(images), "--tune", "--lr", "0.1"]) == 2
    assert "--tune and --lr were both given; --tune chooses the phases" in capsys.readouterr().err
    assert cli.main(["train", str(images), "--tune", "--phases", "phases.toml"]) == 2
    assert "--tune and --phases were both given" in capsys.readouterr().err
    with pytest.raises(ValueError, match="tune and phases were both given"):
        train(TrainSettings(images=images, architecture="test_resnet", tune=True, phases=(Phase(2),), output=output))


@pytest.mark.long
def test_the_command_tunes(tmp_path: Path) -> None:
    images, output = make_folder(tmp_path / "images"), tmp_path / "run"
    options = ["--model", "test_resnet", "--device", "cpu", "--batch-size", "16", "--output", str(output)]
    assert cli.main(["train", str(images), "--tune", *options]) == 0
    model = FineTuneModel.from_timm("test_resnet", num_classes=3)
    phases = json.loads((output / "metrics.json").read_text())["phases"]
    assert tuple(Phase(**phase) for phase in phases) == tuning_phases(12, model)
