"""Training on soft targets, labels and values: results, reported metrics, and errors before the first step."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes.objectives.kinds import MultiLabel, Regression, SingleLabel, SoftLabels
from backbone_finetune.recipes.objectives.objective import Objective
from backbone_finetune.recipes.training.config import TrainerConfig
from backbone_finetune.recipes.training.loop import fine_tune
from backbone_finetune.recipes.training.phases import Phase
from backbone_finetune.recipes.training.processes import make_accelerator
from backbone_finetune.recipes.training.scoring import evaluate

ACCELERATOR = make_accelerator(torch.device("cpu"))
LABELS = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 1]])


class Own(Dataset[Any]):
    """A dataset whose targets are known only when they are loaded, and that may be random."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data: Any = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def make_model(outputs: int = 3, backbone: nn.Module | None = None) -> FineTuneModel:
    torch.manual_seed(1)
    return FineTuneModel(nn.Flatten() if backbone is None else backbone, nn.Linear(6, outputs))


def make_data(targets: Tensor, seed: int = 2) -> TensorDataset:
    return TensorDataset(torch.randn(len(targets), 6, generator=torch.Generator().manual_seed(seed)), targets)


def make_config(objective: Objective, **settings: Any) -> TrainerConfig:
    defaults: dict[str, Any] = {"batch_size": 4, "autocast_features": False, "show_progress": False}
    return TrainerConfig(ACCELERATOR, objective=objective, **{**defaults, **settings})


@pytest.mark.parametrize("kind", ["cached", "uncached", "listed"])
@pytest.mark.parametrize(
    ("objective", "targets", "loss"),
    [
        (SoftLabels(), torch.tensor([[0.2, 0.3, 0.5]] * 4), cross_entropy),
        (MultiLabel(), LABELS, lambda outputs, rows: binary_cross_entropy_with_logits(outputs, rows.float())),
        (Regression((1.0,), (2.0,)), LABELS * 0.5, lambda outputs, rows: mse_loss(outputs, (rows - 1) / 2)),
    ],
    ids=["soft", "labels", "values"],
)
def test_gradient_and_loss_equal_torchs(objective: Objective, targets: Tensor, loss: Any, kind: str) -> None:
    model, data = make_model(), make_data(targets)
    expected = loss(model(data.tensors[0]), targets)
    (wanted,) = torch.autograd.grad(expected, [model.classifier.weight])
    gradients: list[Tensor] = []
    model.classifier.weight.register_hook(lambda gradient: gradients.append(gradient.clone()))
    shown: Any = {"cached": data, "uncached": Own(data), "listed": list(data)}[kind]
    (result,) = fine_tune(model, shown, shown, [Phase(epochs=1, lr=1e-9)], make_config(objective))
    torch.testing.assert_close(gradients[0], wanted)
    assert result.train_loss == pytest.approx(expected.item(), rel=1e-5)
    assert result.validation_loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "targets"),
    [(MultiLabel(), LABELS), (Regression((0.5,), (0.5,)), LABELS * 1.5)],
    ids=["labels", "values"],
)
def test_steps_on_cached_tensors_equal_those_of_the_whole_model(objective: Objective, targets: Tensor) -> None:
    data = TensorDataset(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), targets)
    phases, histories, weights = [Phase(epochs=2, trainable_groups=1, lr=0.01)], [], []
    for cached in (True, False):
        torch.manual_seed(1)
        model = FineTuneModel.from_timm("test_resnet", num_classes=3)
        config = make_config(objective, batch_size=2, cache_features=cached)
        histories.append(fine_tune(model, data, data, phases, config))
        weights.append(model.state_dict())
    assert [result.train_loss for result in histories[0]] == pytest.approx(
        [r.train_loss for r in histories[1]], rel=1e-4
    )
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)


def test_labels_are_learnt_and_their_metrics_reported() -> None:
    def draw(seed: int) -> TensorDataset:
        inputs, noise = make_data(torch.zeros(400, 3), seed).tensors[0].split((3, 3), 1)
        data = torch.cat((inputs, torch.zeros(400, 3)), 1)
        return TensorDataset(data, (inputs + noise > torch.tensor([0.0, 1.0, 2.0])).long())  # rarer and rarer, noisy

    model, validation = make_model(), draw(3)
    config = make_config(MultiLabel(), batch_size=32, monitor=lambda r: r.validation_metrics["mean_average_precision"])
    history = fine_tune(model, draw(2), validation, [Phase(epochs=9)], config)
    assert history[-1].lr != 1e-3  # fits the features
    best = max(history, key=config.monitor)  # type: ignore[arg-type]
    assert best.validation_metrics["mean_average_precision"] > 0.6
    assert best.train_accuracy is not None
    assert 0 <= best.train_accuracy <= 1  # the share of images whose labels are all correct
    assert best.validation_balanced_accuracy is None
    score = evaluate(model, validation, config)
    assert score.metrics["mean_average_precision"] == best.validation_metrics["mean_average_precision"]
    # Thresholds chosen on the validation images are also better on other images.
    chosen = replace(config, objective=MultiLabel().choose_thresholds(score.answers, score.targets))
    plain, better = (evaluate(model, draw(4), each).metrics["macro_f1"] for each in (config, chosen))
    assert better > plain + 0.1


@pytest.mark.parametrize("shape", [(200,), (200, 1), (200, 2)])
def test_values_are_learnt_in_their_units(shape: tuple[int, ...]) -> None:
    def draw(seed: int) -> TensorDataset:
        inputs, _ = make_data(torch.zeros(200), seed).tensors
        outputs = shape[1] if len(shape) > 1 else 1
        return TensorDataset(inputs, (3e5 + 1e5 * inputs[:, :outputs]).reshape(shape))

    train, validation = draw(2), draw(3)
    model = make_model(outputs=shape[1] if len(shape) > 1 else 1)
    config = make_config(Regression().scaled_to(train.tensors[-1]), batch_size=32)
    (*_, last) = fine_tune(model, train, validation, [Phase(epochs=20, lr=0.03)], config)
    assert last.validation_metrics["r2"] > 0.99
    assert last.validation_metrics["mean_absolute_error"] < 1e4
    assert (last.train_accuracy, last.validation_accuracy, last.validation_balanced_accuracy) == (None, None, None)
    model.eval()
    predicted = config.objective.predict(model(validation.tensors[0])).reshape(shape)
    assert (predicted - validation.tensors[1]).abs().mean() < 1e4


def test_soft_targets_teach_probabilities() -> None:
    model, target = make_model(), torch.tensor([0.2, 0.3, 0.5])
    data = make_data(target.expand(16, 3))
    fine_tune(model, data, None, [Phase(epochs=200, lr=0.05)], make_config(SoftLabels(), batch_size=16))
    torch.testing.assert_close(model(data.tensors[0]).softmax(1).mean(0), target, rtol=0, atol=0.02)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("objective", [SoftLabels(), MultiLabel(), Regression()])
def test_a_resumed_run_equals_an_uninterrupted_one(objective: Objective, cached: bool, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(outputs: Tensor, targets: Tensor) -> Tensor:
        steps.append(1)
        if len(steps) == 5:
            raise StopError
        return objective.default_losses(outputs, targets)

    steps: list[int] = []
    tensors = make_data(torch.eye(3).repeat(4, 1))
    data = tensors if cached else Own(tensors)
    phases = [Phase(epochs=3, lr=0.01)]
    stopping = type(objective)(loss=stop)  # type: ignore[call-arg]
    with pytest.raises(StopError):
        fine_tune(make_model(), data, data, phases, make_config(stopping, checkpoints=tmp_path, checkpoint_steps=2))
    resumed, whole = make_model(), make_model()
    history = fine_tune(resumed, data, data, phases, make_config(objective, checkpoints=tmp_path))
    assert history == fine_tune(whole, data, data, phases, make_config(objective))
    assert torch.equal(resumed.classifier.weight, whole.classifier.weight)


class Watched(nn.Flatten):
    """A backbone that counts its passes."""

    passes = 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(images)


@pytest.mark.parametrize(
    ("objective", "targets", "outputs", "message"),
    [
        (SingleLabel(), torch.rand(6), 1, "; for float targets, pass TrainerConfig(objective=Regression())"),
        (SingleLabel(), LABELS, 3, "; for rows of 0 and 1, pass TrainerConfig(objective=MultiLabel())"),
        (SingleLabel(), torch.arange(4), 3, "train: target 3 is outside the 3 classes of the classifier (0 to 2)"),
        (SingleLabel(), torch.zeros(4, dtype=torch.long), 1, "train: the targets are class indices, and the network"),
        (
            SoftLabels(),
            torch.tensor([[0.5, 0.5], [0.5, 0.4]]),
            2,
            "train: target 1 is [0.5, 0.4]; SoftLabels takes",
        ),
        (MultiLabel(), torch.tensor([0, 1]), 2, "train: the targets are int64 of shape () per image; MultiLabel takes"),
        (Regression(), torch.tensor([1.0, float("nan")]), 1, "train: target 1 is [nan]; Regression takes finite"),
        (Regression(), torch.rand(4, 2), 3, "Regression takes one number per output, and the network has 3 outputs"),
    ],
)
@pytest.mark.parametrize(
    "wrapped", [list, lambda data: Subset(data, range(len(data))), lambda data: ConcatDataset([data])]
)
def test_all_targets_are_checked_before_the_first_pass(
    objective: Objective, targets: Tensor, outputs: int, message: str, wrapped: Any
) -> None:
    backbone = Watched()
    model = make_model(outputs, backbone)
    backbone.passes, before = 0, model.classifier.weight.clone()
    for data in (make_data(targets), wrapped(make_data(targets))):
        with pytest.raises(ValueError, match=re.escape(message)):
            fine_tune(model, data, None, [Phase(epochs=1)], make_config(objective))
    assert backbone.passes == 0
    assert torch.equal(model.classifier.weight, before)


@pytest.mark.parametrize(
    ("objective", "targets", "message"),
    [
        (SingleLabel(), [0, 0, 0, 3], "train: target 3 is outside the 3 classes"),
        (SoftLabels(), [[0.5, 0.5, 0.0]] * 3 + [[0.5, 0.4, 0.0]], "[0.5, 0.4, 0.0]; SoftLabels takes rows"),
        (MultiLabel(), [[0, 1, 0]] * 3 + [[0, 2, 0]], "[0, 2, 0]; MultiLabel takes rows of 0 and 1"),
    ],
)
def test_targets_of_a_custom_dataset_are_checked_when_loaded(objective: Objective, targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fine_tune(make_model(), Own(make_data(torch.tensor(targets))), None, [Phase(epochs=1)], make_config(objective))


def test_an_objective_is_an_instance() -> None:
    for wrong in (MultiLabel, "multi-label"):
        with pytest.raises(ValueError, match="Input should be an instance of Objective"):
            make_config(wrong)  # type: ignore[arg-type]
