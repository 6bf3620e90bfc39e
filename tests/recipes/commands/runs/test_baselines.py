"""Baselines of the accuracy, and the time of a backward pass."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import timm
import torch
from image_folders import make_folder
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes.commands.runs.baselines import (
    chance_accuracy,
    measure_backward,
    pixel_model,
    random_model,
)
from backbone_finetune.recipes.commands.settings import TrainSettings
from backbone_finetune.recipes.commands.train import train
from backbone_finetune.recipes.training.config import TrainerConfig
from backbone_finetune.recipes.training.loop import fine_tune
from backbone_finetune.recipes.training.phases import Phase
from backbone_finetune.recipes.training.processes import make_accelerator
from backbone_finetune.recipes.training.scoring import evaluate

CONFIG = TrainerConfig(make_accelerator(torch.device("cpu")), show_progress=False)


def make_images(count: int = 12) -> Any:
    targets = torch.arange(count) % 3
    noise = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return TensorDataset(noise + torch.eye(3)[targets][:, :, None, None], targets)


def test_chance_predicts_the_most_common_training_class() -> None:
    assert chance_accuracy([0, 1, 1], [0, 0, 0, 1]) == 0.25


def test_raw_pixels_are_enough_to_classify_colours() -> None:
    model = pixel_model(3)
    fine_tune(model, make_images(30), None, [Phase(epochs=10)], CONFIG)
    assert evaluate(model, make_images(), CONFIG).accuracy > 0.9


def test_the_random_backbone_is_random_and_stays_frozen() -> None:
    like = FineTuneModel.from_timm("test_resnet", num_classes=3)
    torch.manual_seed(5)
    initial = timm.create_model("test_resnet").state_dict()
    torch.manual_seed(5)
    model = random_model(like, "test_resnet", 3)
    fine_tune(model, make_images(), None, [Phase(epochs=1)], CONFIG)
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    assert all(torch.equal(tensor, initial[name]) for name, tensor in model.backbone.state_dict().items())


def test_baselines_train_a_classifier_alone_whatever_the_model_trains(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images", per_class=6)
    phases = (Phase(epochs=2, lr=0.01, trainable_groups=2),)
    settings = TrainSettings(
        images=images, architecture="test_resnet", input_size=32, phases=phases, baselines=True, output=tmp_path / "run"
    )
    assert train(settings).raw_pixels == 1  # pixels have no layer groups to train


class SlowForward(nn.Module):
    """A backbone whose forward takes 200 ms, its backward 20 ms where its weight trains, else none."""

    class Pause(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, inputs: Tensor) -> Tensor:
            time.sleep(0.2)
            return inputs.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            time.sleep(0.02)
            return gradients[0]

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.Pause.apply(self.layer(inputs))
        return output


def test_only_the_backward_pass_is_timed() -> None:
    model = FineTuneModel(SlowForward(), nn.Linear(8, 2)).freeze_backbone()
    times = measure_backward(model, torch.randn(6, 4), torch.zeros(6, dtype=torch.long))
    assert times is not None
    # A sleep has a minimum duration, and the forward's is far longer than a backward pass.
    assert times.unfrozen >= 20
    assert times.frozen < 200
    assert times.classifier_alone < 200
    assert times.batch_size == 6


def test_timing_does_not_change_the_model_and_the_random_state() -> None:
    model = FineTuneModel(SlowForward(), nn.Linear(8, 2)).freeze_backbone().eval()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    measure_backward(model, torch.randn(6, 4, generator=torch.Generator()), torch.zeros(6, dtype=torch.long))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == [False] * 4 + [True] * 2
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
