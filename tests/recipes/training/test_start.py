"""A linear classifier on a frozen backbone starts from zero in a first phase without a learning rate."""

import copy
import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from steps import StoppedError, after_step
from torch import Tensor, nn
from torch.utils._pytree import tree_structure
from torch.utils.data import TensorDataset

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes.data.images import IGNORED
from backbone_finetune.recipes.features.dataset import Features
from backbone_finetune.recipes.objectives.kinds import MultiLabel
from backbone_finetune.recipes.training.config import TrainerConfig
from backbone_finetune.recipes.training.loop import fine_tune
from backbone_finetune.recipes.training.phase_data import PhaseData
from backbone_finetune.recipes.training.phases import Phase
from backbone_finetune.recipes.training.start import start_classifier

ACCELERATOR = Accelerator(cpu=True)


class Doubled(nn.Linear):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features) * 2


def make_data(per_class: int, *, seed: int = 0) -> TensorDataset:
    """Return points around three centres."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(3).repeat(per_class)
    return TensorDataset(torch.eye(3)[targets] + torch.randn(3 * per_class, 3, generator=generator), targets)


def make_model(head: nn.Module | None = None) -> FineTuneModel:
    torch.manual_seed(0)
    return FineTuneModel(nn.Linear(3, 8), nn.Linear(8, 3) if head is None else head)


def train(model: FineTuneModel, data: Any, *phases: Phase, validation: Any = None, **settings: Any) -> Any:
    config = TrainerConfig(
        ACCELERATOR, **{"batch_size": 8, "show_progress": False, "autocast_features": False, **settings}
    )
    return fine_tune(model, data, validation, phases or [Phase(epochs=3)], config)


def assert_same(ours: FineTuneModel, theirs: FineTuneModel) -> None:
    for one, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cached", [True, False])
def test_training_goes_on_from_zero(cached: bool) -> None:
    started, model = make_model(), make_model()
    (*_, last) = train(model, make_data(10), cache_features=cached)
    features = model.backbone(make_data(10).tensors[0])
    expected = float(0.3 / (1 + features.abs().sum(1).mean()))
    assert last.lr == pytest.approx(expected, rel=0.05)
    assert last.weight_decay == 0.01
    nn.init.zeros_(started.classifier.weight)  # type: ignore[arg-type]
    nn.init.zeros_(started.classifier.bias)  # type: ignore[arg-type]
    train(started, make_data(10), Phase(epochs=3, lr=last.lr), cache_features=cached)
    assert_same(model, started)


def test_features_of_any_size_give_the_same_predictions() -> None:
    data, models = make_data(10), []
    for factor in (1.0, 1 / 32):
        torch.manual_seed(0)
        models.append(FineTuneModel(nn.Linear(3, 1000), nn.Linear(1000, 3)))
        for parameter in models[-1].backbone.parameters():
            parameter.data *= factor
        train(models[-1], data, Phase(epochs=20))
    one, other = (model.eval()(data.tensors[0]).softmax(-1) for model in models)
    torch.testing.assert_close(one, other, rtol=0, atol=0.05)
    assert one.max() > 0.8


@pytest.mark.parametrize(
    ("features", "expected"),
    [([[1.0, -2.0], [0.0, 0.0]], 0.075), ([[0.0, 0.0], [9.0, 9.0]], 0.3), ([[torch.inf, 0.0], [1.0, 1.0]], 1e-3)],
)
def test_the_rate_fits_the_images_that_can_be_read(features: list[list[float]], expected: float) -> None:
    rows = Features([torch.tensor(features), torch.tensor([0, IGNORED])], tree_structure(0))
    data, config = PhaseData(rows, None, nn.Linear(2, 2), on_features=True), TrainerConfig(ACCELERATOR)
    assert start_classifier(nn.Linear(2, 2), data, Phase(), config)[0] == expected


def test_the_log_says_that_a_classifier_starts_from_zero(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "backbone_finetune")
    (*_, last) = train(make_model(), make_data(10), show_progress=True)
    (message,) = [message for message in caplog.messages if "starts from zero" in message]
    assert message.startswith(f"the classifier starts from zero, at lr {last.lr:g}; with a rate given")


class Noisy(nn.Linear):
    """A backbone that draws in eval mode, so that its features are not cached."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(inputs, 0.5))


def test_measuring_features_does_not_change_what_the_training_draws() -> None:
    models = []
    for phase in (Phase(epochs=3), Phase(epochs=3, lr=1e-3)):
        model = make_model()
        model.backbone = Noisy(3, 8)
        for parameter in model.backbone.parameters():
            nn.init.ones_(parameter)
        drawn: list[Tensor] = []
        model.backbone.register_forward_hook(lambda _module, _inputs, output, drawn=drawn: drawn.append(output))
        torch.manual_seed(1)
        train(model, make_data(10), phase, cache_features=False)
        models.append(drawn[-3:])
    for one, other in zip(*models, strict=True):
        assert torch.equal(one, other)


def test_a_given_weight_decay_is_kept() -> None:
    (*_, last) = train(make_model(), make_data(10), Phase(epochs=1, weight_decay=0.5))
    assert last.weight_decay == 0.5


@pytest.mark.parametrize("head", [Doubled(8, 3), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))])
def test_other_classifiers_keep_their_weights(head: nn.Module) -> None:
    model = make_model(head)
    given = copy.deepcopy(model)
    (*_, last) = train(model, make_data(10))
    assert (last.lr, last.weight_decay) == (1e-3, 0.01)
    train(given, make_data(10), Phase(epochs=3, lr=1e-3))
    assert_same(model, given)


def test_labels_start_from_zero_too() -> None:
    inputs, targets = make_data(10).tensors
    (first, *_) = train(make_model(), TensorDataset(inputs, torch.eye(3)[targets]), objective=MultiLabel())
    assert first.lr != 1e-3
    assert first.train_loss < 3 * math.log(2)  # that of outputs of 0


def test_phases_that_train_layers_keep_their_weights() -> None:
    model, given = make_model(), make_model()
    assert train(model, make_data(10), Phase(epochs=1, trainable_groups=1))[0].lr == 1e-3
    train(given, make_data(10), Phase(epochs=1, trainable_groups=1, lr=1e-3))
    assert_same(model, given)


def test_a_later_phase_goes_on_with_the_classifier() -> None:
    model, given = make_model(), make_model()
    history = train(model, make_data(10), Phase(epochs=2), Phase(epochs=1))
    rates = [result.lr for result in history]
    assert rates[0] == rates[1] != 1e-3 == rates[2]
    train(given, make_data(10), Phase(epochs=2), Phase(epochs=1, lr=1e-3))
    assert_same(model, given)


@pytest.mark.parametrize("stopped", [1, 3, 6])  # in the first step, later in the first epoch, and in the second
def test_a_resumed_run_does_not_start_again(tmp_path: Any, stopped: int) -> None:
    model, resumed, whole = make_model(), make_model(), make_model()
    with after_step(stopped), pytest.raises(StoppedError):
        train(model, make_data(10), checkpoints=tmp_path, checkpoint_steps=1)
    history = train(resumed, make_data(10), checkpoints=tmp_path)
    assert history == train(whole, make_data(10))
    assert_same(resumed, whole)


def test_validation_images_are_not_fitted() -> None:
    models = []
    for validation in (make_data(10, seed=1), make_data(10, seed=2), None):
        models.append(make_model())
        train(models[-1], make_data(10), validation=validation)
    assert_same(models[0], models[1])
    assert_same(models[0], models[2])
