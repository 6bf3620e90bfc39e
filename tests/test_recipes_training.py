"""Training: on features or on pictures, the same outcome; what is frozen stays; what trains learns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes.training import Hyperparameters, evaluate, fine_tune, fit

CPU = torch.device("cpu")


class Counting(nn.Module):
    """A backbone with statistics and dropout, that counts the pictures it sees in each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.last = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.seen = 0

    def forward(self, pictures: Tensor) -> Tensor:
        self.seen += len(pictures)
        return self.last(self.stem(pictures))


def make_model(head: nn.Module | None = None) -> FineTuneModel:
    torch.manual_seed(1)
    return FineTuneModel(Counting(), head or nn.Linear(16, 3)).freeze_backbone()


def make_pictures(count: int = 24) -> Any:
    generator = torch.Generator().manual_seed(2)
    targets = torch.arange(count) % 3
    pictures = torch.randn(count, 3, 8, 8, generator=generator) + torch.eye(3)[targets][:, :, None, None] * 2
    return TensorDataset(pictures, targets)


def run(model: FineTuneModel, **settings: Any) -> list[Any]:
    hyperparameters = Hyperparameters(**{"epochs": 3, "batch_size": 8, **settings})
    pictures = make_pictures()
    return fine_tune(model, pictures, make_pictures(12), hyperparameters, device=CPU, show_progress=False)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(dict(module.state_dict()))


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def test_a_frozen_backbone_sees_each_picture_once() -> None:
    model = make_model()
    run(model, epochs=5)
    assert model.backbone.seen == 24 + 12


def test_training_on_features_is_training_above_the_frozen_backbone() -> None:
    cached, whole = make_model(), make_model()
    history = run(cached)
    groups: Any = whole.param_groups(1e-3, weight_decay=0.01)
    settings = Hyperparameters(epochs=3, batch_size=8)
    expected = fit(
        whole, torch.optim.AdamW(groups), make_pictures(), make_pictures(12), settings, device=CPU, show_progress=False
    )
    torch.testing.assert_close(cached.classifier.state_dict(), whole.classifier.state_dict())
    assert [result.test_accuracy for result in history] == [result.test_accuracy for result in expected]


def test_each_step_takes_the_gradient_of_its_own_batch() -> None:
    """One batch an epoch, so that the order does not count: plain gradient descent by hand ends at the same weights."""
    torch.manual_seed(3)
    head = nn.Linear(4, 3)
    weights = head.weight.detach().clone().requires_grad_()
    inputs, targets = torch.randn(6, 4), torch.arange(6) % 3
    for _ in range(3):
        loss = nn.functional.cross_entropy(inputs @ weights.T + head.bias.detach(), targets)
        (gradient,) = torch.autograd.grad(loss, weights)
        weights = (weights - 0.5 * gradient).detach().requires_grad_()
    data, settings = TensorDataset(inputs, targets), Hyperparameters(epochs=3, batch_size=6)
    head.bias.requires_grad_(False)
    fit(head, torch.optim.SGD([head.weight], lr=0.5), data, data, settings, device=CPU, show_progress=False)
    torch.testing.assert_close(head.weight, weights)


def test_frozen_means_frozen_and_the_classifier_learns() -> None:
    model = make_model()
    before = tensors(model)
    history = run(model, epochs=40, lr=0.05)
    assert changed(before, model) == {"classifier.weight", "classifier.bias"}
    assert history[-1].train_loss < 0.7 * history[0].train_loss
    assert history[-1].test_accuracy > 0.8
    assert [result.epoch for result in history] == list(range(1, 41))


def test_a_trainable_group_trains_with_its_statistics_and_the_others_stay() -> None:
    model = make_model().freeze_backbone(trainable_groups=1)
    before = tensors(model)
    run(model)
    moved = changed(before, model)
    assert {name for name in moved if name.startswith("backbone.stem")} == set()
    assert {"backbone.last.0.weight", "backbone.last.1.running_mean", "classifier.weight"} <= moved
    assert model.backbone.seen == 3 * (24 + 12)


def test_each_part_has_its_own_learning_rate() -> None:
    slow = make_model().freeze_backbone(trainable_groups=1)
    before = tensors(slow)
    run(slow, backbone_lr=1e-9, weight_decay=0.0)
    distance = {name: float((tensor - before[name]).abs().max()) for name, tensor in slow.state_dict().items()}
    assert distance["backbone.last.0.weight"] < 1e-6 < distance["classifier.weight"]


def test_what_moves_though_frozen_is_found_out() -> None:
    class Drifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, pictures: Tensor) -> Tensor:
            self.weight.data += 1
            return pictures.mean((2, 3)) * self.weight

    model = FineTuneModel(Drifting(), nn.Linear(3, 3)).freeze_backbone()
    with pytest.raises(AssertionError, match=r"backbone\.weight"):
        run(model)


def test_a_random_head_draws_anew_in_every_step_and_not_in_evaluation() -> None:
    class Recording(nn.Dropout):
        outputs: list[tuple[bool, Tensor]]

        def forward(self, features: Tensor) -> Tensor:
            output = super().forward(features)
            self.outputs.append((self.training, output == 0))
            return output

    dropout = Recording(0.5)
    dropout.outputs = []
    run(make_model(nn.Sequential(dropout, nn.Linear(16, 3))), epochs=2, batch_size=24)
    training = [zeros for training, zeros in dropout.outputs if training]
    evaluation = [zeros for training, zeros in dropout.outputs if not training]
    assert len(training) == 2
    assert not torch.equal(*training)
    assert 0.3 < training[0].float().mean() < 0.7
    assert not any(zeros.any() for zeros in evaluation)


@pytest.mark.parametrize("trainable_groups", [0, 1])
def test_the_same_seed_gives_the_same_weights_and_another_does_not(trainable_groups: int) -> None:
    def weights(seed: int) -> Tensor:
        model = make_model().freeze_backbone(trainable_groups=trainable_groups)
        run(model, seed=seed)
        return model.classifier.weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_the_test_pictures_teach_nothing() -> None:
    def weights(test: Any) -> Tensor:
        model = make_model().freeze_backbone(trainable_groups=1)
        fine_tune(model, make_pictures(), test, Hyperparameters(epochs=2), device=CPU, show_progress=False)
        return model.classifier.weight

    assert torch.equal(weights(make_pictures(12)), weights(TensorDataset(torch.ones(2, 3, 8, 8), torch.tensor([0, 1]))))


def test_a_picture_left_alone_in_the_last_batch_breaks_no_batch_norm() -> None:
    head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 3))
    settings = Hyperparameters(epochs=1, batch_size=8)
    history = fine_tune(
        make_model(head), make_pictures(17), make_pictures(3), settings, device=CPU, show_progress=False
    )
    assert len(history) == 1


def test_accuracy_is_the_share_of_right_answers() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [5.0, 4.0]])
    data = TensorDataset(logits, torch.tensor([0, 1, 1, 0]))
    module = nn.Sequential(nn.Identity(), nn.Dropout(0.9))
    assert evaluate(module, data, batch_size=3, device=CPU) == 0.75


def test_progress_is_shown_for_each_epoch(capfd: pytest.CaptureFixture[str]) -> None:
    settings = Hyperparameters(epochs=2, batch_size=8)
    fine_tune(make_model(), make_pictures(), make_pictures(12), settings, device=CPU)
    lines = capfd.readouterr().err.replace("\r", "\n").splitlines()
    for epoch in (1, 2):
        assert any(line.startswith(f"epoch {epoch}/2: 100%") and "test=" in line for line in lines)
