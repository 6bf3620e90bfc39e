"""Standardized features: rates do not depend on their scale, and the trained classifier takes them as they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from steps import StoppedError, after_step
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import Phase, SingleLabel, TrainerConfig, evaluate, fine_tune, fit_heads
from backbone_finetune.recipes.data.images import IGNORED
from backbone_finetune.recipes.heads.standardize import Standardization

ACCELERATOR = Accelerator(cpu=True)
SCALES = torch.tensor([1e-3, 1.0, 50.0, 1.0, 1.0, 1.0])


def make_data(*, seed: int = 0, scales: Tensor = SCALES) -> TensorDataset:
    """Return features of three classes, on scales that differ, of which the last is constant."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(3).repeat(10)
    features = torch.eye(3, 6)[targets] + 0.3 * torch.randn(30, 6, generator=generator) + 2
    features[:, 5] = 7
    return TensorDataset(features * scales, targets)


def make_model(head: nn.Module | None = None) -> FineTuneModel:
    torch.manual_seed(0)
    return FineTuneModel(nn.Identity(), nn.Linear(6, 3) if head is None else head)


def train(model: FineTuneModel, data: Any, validation: Any = None, *phases: Phase, **settings: Any) -> Any:
    config = TrainerConfig(ACCELERATOR, batch_size=8, show_progress=False, **settings)
    return fine_tune(model, data, validation, phases or [Phase(epochs=4, lr=0.05, standardize=True)], config)


def standardize(features: Tensor) -> Tensor:
    constant = features.std(0) == 0
    return (features - features.mean(0)) / features.std(0, unbiased=False).masked_fill(constant, 1)


@pytest.mark.parametrize("head", [lambda: nn.Linear(6, 3), lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))])
def test_it_is_training_on_standardized_features(head: Any) -> None:
    data = make_data()
    inputs = standardize(data.tensors[0])
    model, other = make_model(head()), make_model(None)
    other.classifier = copy.deepcopy(model.classifier)
    Standardization.measure(data).enter(other.classifier)  # the same function to start from
    train(model, data)
    train(other, TensorDataset(inputs, data.tensors[1]), None, Phase(epochs=4, lr=0.05))
    torch.testing.assert_close(model(data.tensors[0]), other(inputs), rtol=1e-3, atol=1e-3)


def test_the_scale_of_a_feature_does_not_count() -> None:
    models = [make_model(), make_model()]
    for model, scales in zip(models, (SCALES, torch.ones(6)), strict=True):
        model.classifier.weight.data.zero_()  # type: ignore[union-attr, operator]
        train(model, make_data(scales=scales), None, Phase(epochs=4, standardize=True))
    first, second = (
        model(make_data(seed=1, scales=scales).tensors[0]) for model, scales in zip(models, (SCALES, 1), strict=True)
    )
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


def test_a_feature_that_is_constant_has_no_say() -> None:
    model, data = make_model(), make_data()
    train(model, data)
    features = data.tensors[0].clone()
    features[:, 5] = 1e6
    assert torch.equal(model(features), model(data.tensors[0]))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_validation_and_the_best_epoch_are_those_of_the_model() -> None:
    model, data, validation = make_model(), make_data(), make_data(seed=1)
    history = train(model, data, validation, monitor=lambda result: -result.validation_loss)
    best = min(history, key=lambda result: result.validation_loss)
    score = evaluate(model, validation, TrainerConfig(ACCELERATOR, show_progress=False))
    assert score.loss == pytest.approx(best.validation_loss, rel=1e-4)


@pytest.mark.parametrize("after", [2, 3, 4])  # of 3 epochs of the first phase
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, after: int) -> None:
    phases = [Phase(epochs=3, lr=0.05, standardize=True), Phase(epochs=3, lr=0.05, standardize=True)]
    whole, killed = make_model(), make_model()
    train(whole, make_data(), None, *phases)
    steps = -(-len(make_data()) // TrainerConfig.batch_size)  # of an epoch
    with after_step(after * steps + 1), pytest.raises(StoppedError):
        train(killed, make_data(), None, *phases, checkpoints=tmp_path)
    resumed = make_model()
    train(resumed, make_data(), None, *phases, checkpoints=tmp_path)
    assert all(map(torch.equal, resumed.parameters(), whole.parameters()))


def test_an_error_leaves_a_classifier_of_features() -> None:
    model, before = make_model(), make_model()

    def fail(logits: Tensor, targets: Tensor) -> Tensor:
        raise StoppedError

    with pytest.raises(StoppedError):
        train(model, make_data(), objective=SingleLabel(loss=fail))
    features = make_data().tensors[0]
    torch.testing.assert_close(model(features), before(features), rtol=1e-4, atol=1e-3)


def test_heads_of_a_grid_are_folded() -> None:
    data, validation = make_data(), make_data(seed=1)
    folded, other = nn.Linear(6, 3), nn.Linear(6, 3)
    other.load_state_dict(folded.state_dict())
    settings: dict[str, Any] = {"epochs": 5, "batch_size": 8, "show_progress": False}
    results = fit_heads(folded, data, validation, learning_rates=[0.05, 1e-6], standardize=True, **settings)
    standardization = Standardization.measure(data)
    standardization.enter(other)
    scaled = [standardization.apply(each) for each in (data, validation)]
    expected = fit_heads(other, *scaled, learning_rates=[0.05, 1e-6], **settings)
    assert results == expected
    torch.testing.assert_close(folded(validation.tensors[0]), other(scaled[1].tensors[0]), rtol=1e-4, atol=1e-4)


def test_unreadable_images_do_not_count() -> None:
    features, targets = make_data().tensors
    more, ignored = torch.full((1, 6), 1e9), torch.tensor([IGNORED])
    broken = TensorDataset(torch.cat([features, more]), torch.cat([targets, ignored]))
    assert all(map(torch.equal, Standardization.measure(broken), Standardization.measure(make_data())))


@pytest.mark.parametrize(
    ("head", "settings", "message"),
    [
        (nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), {}, "begins with BatchNorm1d"),
        (nn.Linear(6, 3, bias=False), {}, "folded into a Linear with bias"),
        (nn.Linear(6, 3), {"cache_features": False}, "are not cached; leave it out"),
    ],
)
def test_what_cannot_be_folded_is_refused(head: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(make_model(head), make_data(), **settings)


def test_features_that_change_are_refused() -> None:
    with pytest.raises(ValueError, match="standardize was given with trainable_groups = 1; it is for a frozen"):
        Phase(standardize=True, trainable_groups=1)
