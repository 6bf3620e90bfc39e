"""What a run trains on what: the size of its images is one that the network takes, or nothing is begun."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backbone_finetune.recipes.commands import setup as task_module
from backbone_finetune.recipes.commands.setup import TrainSettings, make_task
from backbone_finetune.recipes.commands.train import train
from backbone_finetune.recipes.training.processes import make_accelerator


@pytest.mark.parametrize(
    ("architecture", "size"),
    [("halonet26t", (3, 256, 256)), ("bat_resnext26ts", (3, 256, 256)), ("test_resnet", (3, 96, 96))],
)
def test_a_network_gets_clipart_of_a_size_that_it_takes(
    architecture: str, size: tuple[int, int, int], tmp_path: Path
) -> None:
    settings = TrainSettings(architecture=architecture, output=tmp_path / "run")
    task = make_task(settings, make_accelerator(torch.device("cpu"), mixed_precision=None))
    assert task.data_config["input_size"] == size
    image, _ = task.train[0]
    with torch.no_grad():
        assert task.model.eval()(image[None]).shape == (1, 10)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_takes_no_size_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_module, "find_size_problem", lambda model, size: f"not {size[1]}")
    settings = TrainSettings(architecture="test_resnet", output=tmp_path / "run")
    with pytest.raises(ValueError, match=r"test_resnet takes no image of 3 x 160 x 160, .*\(not 160\); choose another"):
        train(settings)
    assert list(tmp_path.iterdir()) == []
