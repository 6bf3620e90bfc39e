"""The training loss: torch's with weights and smoothing, or a user's; its mean is that of the whole batch."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes.commands.setup import balanced_weights
from backbone_finetune.recipes.data.images import IGNORED
from backbone_finetune.recipes.objectives.kinds import SingleLabel
from backbone_finetune.recipes.training.config import TrainerConfig
from backbone_finetune.recipes.training.loop import fine_tune
from backbone_finetune.recipes.training.phase_state import prepared_phase
from backbone_finetune.recipes.training.phases import Phase
from backbone_finetune.recipes.training.processes import make_accelerator
from backbone_finetune.recipes.training.progress import EpochResult

ACCELERATOR = make_accelerator(torch.device("cpu"))
WEIGHTS = (0.5, 3.0, 1.25)


def make_model() -> FineTuneModel:
    torch.manual_seed(1)
    return FineTuneModel(nn.Flatten(), nn.Linear(4, 3))


def make_data(targets: list[int] | None = None) -> TensorDataset:
    targets = [0, 0, 0, 0, 1, 1, 2] if targets is None else targets
    inputs = torch.randn(len(targets), 4, generator=torch.Generator().manual_seed(2))
    return TensorDataset(inputs, torch.tensor(targets))


def train(
    model: FineTuneModel, data: TensorDataset | None = None, *, batch_size: int = 7, lr: float = 1e-3, **settings: Any
) -> tuple[list[Tensor], EpochResult]:
    """Train for an epoch; return the gradients of the classifier's weight in each step, and the reported loss."""
    gradients: list[Tensor] = []
    handle = model.classifier.weight.register_hook(lambda gradient: gradients.append(gradient.clone()))
    loss = {name: settings.pop(name) for name in ("class_weights", "label_smoothing", "loss") if name in settings}
    objective = SingleLabel(**loss)
    config = TrainerConfig(
        ACCELERATOR,
        batch_size=batch_size,
        autocast_features=False,
        objective=objective,
        show_progress=False,
        **settings,
    )
    data = make_data() if data is None else data
    (result,) = fine_tune(model, data, make_data(), [Phase(epochs=1, lr=lr)], config)
    handle.remove()
    return gradients, result


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"class_weights": WEIGHTS},
        {"class_weights": torch.tensor(WEIGHTS, dtype=torch.float64)},
        {"label_smoothing": 0.2},
        {"class_weights": WEIGHTS, "label_smoothing": 0.2},
    ],
    ids=["weights", "weights as a tensor", "smoothing", "both"],
)
def test_gradient_and_loss_equal_torchs_on_the_whole_batch(settings: dict[str, Any], accumulation: int) -> None:
    model, (inputs, targets) = make_model(), make_data().tensors
    weights = torch.tensor(WEIGHTS) if "class_weights" in settings else None
    loss = cross_entropy(model(inputs), targets, weights, label_smoothing=settings.get("label_smoothing", 0.0))
    (expected,) = torch.autograd.grad(loss, [model.classifier.weight])
    gradients, result = train(model, accumulation=accumulation, **settings)
    assert len(gradients) == accumulation
    torch.testing.assert_close(torch.stack(gradients).sum(0), expected)
    assert result.train_loss == pytest.approx(loss.item(), rel=1e-5)


def test_the_loss_of_an_epoch_is_the_weighted_mean_over_all_its_batches() -> None:
    model, data = make_model(), make_data([0, 0, 0, 1, 1, 2])
    loss = cross_entropy(model(data.tensors[0]), data.tensors[1], torch.tensor(WEIGHTS))
    _, result = train(
        model, data, batch_size=2, lr=1e-12, class_weights=WEIGHTS
    )  # the weights do not change, up to rounding
    assert result.train_loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("targets", [[0, IGNORED, 1, 2, 2, IGNORED, 1], [IGNORED] * 6 + [0]])
def test_unreadable_images_have_no_weight(targets: list[int]) -> None:
    model, data = make_model(), make_data(targets)
    loss = cross_entropy(model(data.tensors[0]), data.tensors[1], torch.tensor(WEIGHTS))
    (expected,) = torch.autograd.grad(loss, [model.classifier.weight])
    gradients, result = train(model, data, class_weights=WEIGHTS)
    torch.testing.assert_close(gradients[0], expected)
    assert result.train_loss == pytest.approx(loss.item(), rel=1e-5)
    # In batches of one image, most batches have no readable image.
    gradients, _ = train(make_model(), data, batch_size=1, class_weights=WEIGHTS, label_smoothing=0.1)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_custom_loss_is_averaged_over_the_images(accumulation: int) -> None:
    def focal(logits: Tensor, targets: Tensor) -> Tensor:
        losses = cross_entropy(logits, targets, reduction="none")
        return (1 - (-losses).exp()) ** 2 * losses

    model, (inputs, targets) = make_model(), make_data().tensors
    loss = focal(model(inputs), targets).mean()
    (expected,) = torch.autograd.grad(loss, [model.classifier.weight])
    gradients, result = train(model, loss=focal, accumulation=accumulation)
    torch.testing.assert_close(torch.stack(gradients).sum(0), expected)
    assert result.train_loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("as_rows", [True, False])
def test_a_custom_loss_never_gets_unreadable_images(as_rows: bool) -> None:
    seen: list[int] = []

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        seen.extend(targets.tolist())
        return cross_entropy(logits, targets, reduction="none", ignore_index=-1)

    rows = make_data([0, IGNORED, 1, 2, 1, 0])
    data: Any = rows if as_rows else [(image, int(target)) for image, target in zip(*rows.tensors, strict=True)]
    train(make_model(), data, loss=loss, batch_size=2, cache_features=as_rows)
    assert sorted(seen[:5]) == [0, 0, 1, 1, 2]  # then the validation images
    assert IGNORED not in seen


@pytest.mark.parametrize(("targets", "expected"), [([0, 1, 2, 1], True), ([0, 1, IGNORED, 1], False)])
def test_a_phase_on_rows_knows_whether_all_are_readable(targets: list[int], expected: bool) -> None:
    """Without that, a custom loss would wait for the device in each step."""
    config, data = TrainerConfig(ACCELERATOR, show_progress=False), make_data(targets)
    with prepared_phase(make_model(), data, None, phase=Phase(), changed=set(), config=config) as state:
        assert state.all_read == expected


@pytest.mark.parametrize(
    ("loss", "came"),
    [(cross_entropy, "shape ()"), (lambda logits, targets: logits, "shape (7, 3)"), (lambda *_: 1.0, "float")],
)
def test_a_loss_that_is_not_one_number_per_image_raises(loss: Any, came: str) -> None:
    message = f"loss returned {came}: expected one loss per image, shape (7,); torch's losses return that with"
    with pytest.raises(ValueError, match=re.escape(message)):
        train(make_model(), loss=loss)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_weights": [1.0, 2.0]}, "class_weights has 2 entries for 3 classes"),
        ({"class_weights": [1.0, 0.0, 1.0]}, "class_weights.1\n  Input should be greater than 0"),
        ({"class_weights": [1.0, float("nan"), 1.0]}, "class_weights.1\n  Input should be a finite number"),
        ({"class_weights": [[1.0, 1.0, 1.0]]}, "class_weights.0\n  Input should be a valid number"),
        ({"label_smoothing": 1.0}, "label_smoothing\n  Input should be less than 1"),
        (
            {"loss": cross_entropy, "class_weights": WEIGHTS},
            "loss and class_weights or label_smoothing were both given",
        ),
        ({"loss": cross_entropy, "label_smoothing": 0.1}, "loss and class_weights or label_smoothing were both given"),
    ],
)
def test_an_invalid_setting_raises(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        train(make_model(), **settings)


def test_equal_weights_have_no_effect_up_to_rounding() -> None:
    plain, weighted = make_model(), make_model()
    (expected,), result = train(plain)
    (gradient,), weighted_result = train(weighted, class_weights=[2.0, 2.0, 2.0])
    torch.testing.assert_close(gradient, expected)
    assert weighted_result.train_loss == pytest.approx(result.train_loss, rel=1e-5)


def test_balanced_weights_have_the_same_sum_for_each_class() -> None:
    weights = balanced_weights([2, 0, 0, 0, 1, 0, 1])
    assert weights == pytest.approx([7 / 12, 7 / 6, 7 / 3])
