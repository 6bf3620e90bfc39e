"""Learning rates of a frozen phase are chosen on data that the model does not train on, if there is any."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes.objectives.kinds import SingleLabel
from backbone_finetune.recipes.training.loop import TrainerConfig, fine_tune
from backbone_finetune.recipes.training.phases import Phase

ACCELERATOR = Accelerator(cpu=True)


class Doubled(nn.Linear):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features) * 2


def make_data(per_class: int, *, seed: int = 0, noise: float = 1.0) -> TensorDataset:
    """Return points around three centres."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(3).repeat(per_class)
    return TensorDataset(torch.eye(3)[targets] + noise * torch.randn(3 * per_class, 3, generator=generator), targets)


def make_model(head: nn.Module | None = None) -> FineTuneModel:
    torch.manual_seed(0)
    return FineTuneModel(nn.Linear(3, 8), nn.Linear(8, 3) if head is None else head)


def train(model: FineTuneModel, data: Any, validation: Any = None, **settings: Any) -> Any:
    phase = Phase(**{"epochs": 3, **{name: settings.pop(name) for name in ("lr", "weight_decay") if name in settings}})
    objective = SingleLabel(loss=settings.pop("loss", None))
    config = TrainerConfig(ACCELERATOR, batch_size=8, objective=objective, show_progress=False, **settings)
    return fine_tune(model, data, validation, [phase], config)


def test_rates_are_chosen_and_used_on_all_images() -> None:
    chosen, given = make_model(), make_model()
    (*_, last) = train(chosen, make_data(10))
    assert (last.lr, last.weight_decay) != (1e-3, 0.01)
    train(given, make_data(10), lr=last.lr, weight_decay=last.weight_decay)
    assert torch.equal(chosen.classifier.weight, given.classifier.weight)


def test_rates_of_a_head_with_running_statistics_are_chosen() -> None:
    (*_, last) = train(make_model(nn.Sequential(nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3))), make_data(40))
    assert (last.lr, last.weight_decay) != (1e-3, 0.01)


@pytest.mark.parametrize("seed", range(4))
def test_the_default_rates_are_kept_unless_others_are_clearly_better(seed: int) -> None:
    """The targets are random, so of 32 losses on twelve images the lowest is so by chance."""
    data = make_data(20, seed=seed)
    targets = data.tensors[1][torch.randperm(60, generator=torch.Generator().manual_seed(seed))]
    (*_, last) = train(make_model(), TensorDataset(data.tensors[0], targets))
    assert (last.lr, last.weight_decay) == (1e-3, 0.01)


def test_rates_are_chosen_on_held_out_training_images() -> None:
    """The targets are random, so on the trained images the largest rate would be best."""
    data = make_data(20, noise=0.0)
    inputs = data.tensors[0] + torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
    shuffled = data.tensors[1][torch.randperm(60, generator=torch.Generator().manual_seed(2))]
    (*_, last) = train(make_model(), TensorDataset(inputs, shuffled))
    assert last.lr < 0.1


def test_with_a_monitor_rates_are_chosen_on_validation_data() -> None:
    opposite = TensorDataset(make_data(10, seed=1).tensors[0], (make_data(10).tensors[1] + 1) % 3)
    chosen = []
    for validation in (opposite, make_data(10, seed=1, noise=0.1)):
        (*_, last) = train(make_model(), make_data(10, noise=0.1), validation, monitor=lambda result: result.epoch)
        chosen.append((last.lr, last.weight_decay))
    assert chosen[0][0] * (1 - chosen[0][1] / 2) < chosen[1][0]  # wrong targets there favour the smallest rate
    assert chosen[1][0] >= 1e-2


@pytest.mark.parametrize(
    ("settings", "per_class", "head"),
    [
        ({"lr": 0.02}, 10, None),
        ({"cache_features": False}, 10, None),
        ({}, 4, None),  # too few images to hold some out
        ({}, 10, Doubled(8, 3)),  # a layer of one's own may do what vmap does not support
    ],
)
def test_rates_are_fixed_if_they_cannot_be_chosen(
    settings: dict[str, Any], per_class: int, head: nn.Module | None
) -> None:
    (*_, last) = train(make_model(head), make_data(per_class), **settings)
    assert (last.lr, last.weight_decay) == (settings.get("lr", 1e-3), 0.01)


def test_a_given_weight_decay_is_kept() -> None:
    (*_, last) = train(make_model(), make_data(10), weight_decay=0.5)
    assert last.weight_decay == 0.5


def test_rates_are_chosen_by_a_custom_loss() -> None:
    """The custom loss is also computed for the 32 heads."""
    seen = []

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        seen.append(tuple(logits.shape))
        return logits.square().sum(-1)

    train(make_model(), make_data(10), loss=loss)
    assert (8 * 32, 3) in seen


@pytest.mark.parametrize("stopped", [3, 6])  # in the first epoch, and in the second
def test_a_resumed_run_keeps_its_rates(tmp_path: Any, stopped: int) -> None:
    class StopError(Exception):
        pass

    def stop(logits: Tensor, targets: Tensor) -> Tensor:
        if logits.shape[0] <= 8:
            steps.append(1)
        if len(steps) == stopped:
            raise StopError
        return nn.functional.cross_entropy(logits, targets, reduction="none")

    steps: list[int] = []
    model = make_model()
    with pytest.raises(StopError):
        train(model, make_data(10), loss=stop, checkpoints=tmp_path, checkpoint_steps=1)
    asked: list[int] = []

    def watch(logits: Tensor, targets: Tensor) -> Tensor:
        asked.append(logits.shape[0])
        return nn.functional.cross_entropy(logits, targets, reduction="none")

    resumed, whole = make_model(), make_model()
    history = train(resumed, make_data(10), loss=watch, checkpoints=tmp_path)
    assert max(asked) <= 8  # no grid of heads
    assert history == train(whole, make_data(10), loss=watch)
    assert torch.equal(resumed.classifier.weight, whole.classifier.weight)


def test_without_a_monitor_nothing_is_chosen_on_validation_data() -> None:
    weights = []
    for validation in (make_data(10, seed=1), make_data(10, seed=2), None):
        model = make_model()
        train(model, make_data(10), validation)
        weights.append(model.classifier.weight)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
