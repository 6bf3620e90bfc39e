"""Each kind of target: its checks, its loss compared with torch's, and its metrics by definition."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from backbone_finetune.recipes.data.images import is_read
from backbone_finetune.recipes.objectives import metrics
from backbone_finetune.recipes.objectives.kinds import MultiLabel, Regression, SingleLabel, SoftLabels
from backbone_finetune.recipes.objectives.objective import Objective

BINARY = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]])
NAN = float("nan")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("objective", "targets", "outputs"),
    [
        (SingleLabel(), torch.tensor([0, 2, -100], dtype=torch.int16), 3),
        (SingleLabel(), torch.tensor([0, 156], dtype=torch.uint8), 200),
        (SoftLabels(), torch.tensor([[0.2, 0.8], [1, 0]]), 2),
        (SoftLabels(), torch.tensor([[0.1] * 10]).half(), 10),
        (MultiLabel(), BINARY, 3),
        (MultiLabel(), BINARY.bool(), None),
        (MultiLabel(), BINARY.double(), 3),
        (MultiLabel(), BINARY[:, :1], 1),
        (Regression(), torch.tensor([1.5, -2e6]), 1),
        (Regression(), torch.tensor([3, 4]), 1),
        (Regression(), draw(5, 2), 2),
    ],
)
def test_targets_of_its_kind_are_accepted(objective: Objective, targets: Tensor, outputs: int | None) -> None:
    objective.check("train", targets, outputs)


@pytest.mark.parametrize(
    ("objective", "targets", "outputs", "message"),
    [
        # Cases of users, each with a remedy.
        (
            SingleLabel(),
            torch.rand(4),
            1,
            "train: the targets are float32 of shape () per image; pass class indices, one whole number per image; "
            "for float targets, pass TrainerConfig(objective=Regression())",
        ),
        (SingleLabel(), BINARY, 3, "for rows of 0 and 1, pass TrainerConfig(objective=MultiLabel())"),
        (SingleLabel(), torch.tensor([0, 3]), 3, "target 3 is outside the 3 classes of the classifier (0 to 2)"),
        (SingleLabel(), torch.tensor([0, -1]), 3, "target -1 is outside the 3 classes"),
        # Similar cases.
        (SingleLabel(), torch.tensor([0, 1]), 1, "the network has 1 output, whose class would always be right; pass"),
        (
            SingleLabel(),
            torch.eye(3),
            3,
            "one whole number per image: targets.argmax(1); or, for labels that may go together, TrainerConfig(objec",
        ),
        (
            SingleLabel(),
            torch.tensor([[0.4, 0.6]]),
            2,
            "rows that sum to 1, pass TrainerConfig(objective=SoftLabels())",
        ),
        (SingleLabel(), torch.rand(4, 1), 1, "for float targets, pass TrainerConfig(objective=Regression())"),
        (SingleLabel(), torch.tensor([[0], [5]]), 9, "one whole number per image: targets.flatten()"),
        (SingleLabel(), torch.tensor([True, False]), 2, "one whole number per image: targets.long()"),
        (SingleLabel((1.0, 2.0)), torch.tensor([0, 1]), 3, "class_weights has 2 entries for 3 classes"),
        (
            SoftLabels(),
            torch.tensor([0, 1]),
            2,
            "int64 of shape () per image; SoftLabels takes a row of one probability",
        ),
        (SoftLabels(), torch.tensor([[0.5, 0.5], [0.5, 0.6]]), 2, "train: target 1 is [0.5, 0.6]; SoftLabels takes"),
        (SoftLabels(), torch.tensor([[1.5, -0.5]]), 2, "target 0 is [1.5, -0.5]"),
        (SoftLabels(), torch.tensor([[NAN, 1.0]]), 2, "target 0 is [nan, 1.0]"),
        (
            SoftLabels(),
            torch.eye(2),
            3,
            "of shape (2,) per image; SoftLabels takes a row of one probability per class, ",
        ),
        (
            MultiLabel(),
            torch.tensor([0, 1]),
            2,
            "of shape () per image; MultiLabel takes a row of 0 and 1, one per label",
        ),
        (MultiLabel(), BINARY, 4, "one per label, and the network has 4 outputs"),
        (MultiLabel(), BINARY * 2, 3, "target 0 is [2, 0, 2]; MultiLabel takes rows of 0 and 1"),
        (MultiLabel(), torch.tensor([[1, NAN]]), 2, "target 0 is [1.0, nan]"),
        (MultiLabel((0.5,)), BINARY, 3, "thresholds has 1 entries for 3 labels"),
        (Regression(), torch.rand(4), 2, "of shape () per image; Regression takes one number per output, and the netw"),
        (Regression(), torch.tensor([1.0, float("inf")]), 1, "target 1 is [inf]; Regression takes finite numbers"),
        (Regression(), torch.tensor([[1.0, NAN]]), 2, "target 0 is [1.0, nan]"),
    ],
)
def test_other_targets_are_refused(objective: Objective, targets: Tensor, outputs: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        objective.check("train", targets, outputs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiLabel(thresholds=(1.5,)), "thresholds.0\n  Input should be less than or equal to 1"),
        (lambda: Regression(std=(0.0,)), "std.0\n  Input should be greater than 0"),
        (lambda: Regression(mean=(NAN,)), "mean.0\n  Input should be a finite number"),
        (lambda: SoftLabels(thresholds=(0.5,)), "Unexpected keyword argument"),  # type: ignore[call-arg]
    ],
)
def test_an_invalid_setting_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_losses_equal_torchs() -> None:
    outputs, classes = draw(3, 3), torch.tensor([2, 0, 1])
    soft = draw(3, 3, seed=1).softmax(1)
    for objective, targets, expected in (
        (SingleLabel(), classes, cross_entropy(outputs, classes)),
        (SingleLabel((1, 2, 3)), classes, cross_entropy(outputs, classes, torch.tensor([1.0, 2.0, 3.0]))),
        (SingleLabel(label_smoothing=0.2), classes, cross_entropy(outputs, classes, label_smoothing=0.2)),
        (SoftLabels(), soft, cross_entropy(outputs, soft)),
        (SoftLabels(), soft.double(), cross_entropy(outputs, soft)),
        (MultiLabel(), BINARY, binary_cross_entropy_with_logits(outputs, BINARY.float())),
        (Regression(), draw(3, 3, seed=2), mse_loss(outputs, draw(3, 3, seed=2))),
        (Regression((1.0,), (2.0,)), draw(3, 3, seed=2), mse_loss(outputs, (draw(3, 3, seed=2) - 1) / 2)),
        (Regression(), draw(3, seed=2), mse_loss(outputs[:, :1], draw(3, 1, seed=2))),
    ):
        used = outputs[:, :1] if targets.ndim == 1 and isinstance(objective, Regression) else outputs
        weights = objective.weights(targets)
        mean = objective.losses(used, targets).sum() / (3 if weights is None else weights.sum())
        torch.testing.assert_close(mean, expected)


def test_unreadable_images_do_not_change_loss_gradient_and_accuracy() -> None:
    rows = torch.tensor([[NAN, NAN], [1.0, 0.0]])
    assert is_read(rows).tolist() == [False, True]
    assert is_read(torch.tensor([156], dtype=torch.uint8)).tolist() == [True]  # -100 in 8 bits
    for objective in (SoftLabels(), MultiLabel(), Regression(), MultiLabel(loss=lambda o, t: (o - t).square().sum(1))):
        outputs = draw(2, 2).requires_grad_()
        loss = objective.losses(outputs, rows).sum()
        torch.testing.assert_close(loss, objective.losses(outputs[1:], rows[1:]).sum())
        loss.backward()
        assert outputs.grad is not None
        assert outputs.grad[0].tolist() == [0, 0]
        assert outputs.grad[1].abs().sum() > 0
        correct = objective.correct(torch.tensor([[9.0, -9.0], [9.0, -9.0]]), rows)
        assert correct.tolist() == [False, objective.has_accuracy]


def test_a_custom_loss_of_values_gets_scaled_targets() -> None:
    seen: list[Any] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets.tolist())
        return mse_loss(outputs, targets, reduction="none").mean(1)

    Regression((100.0,), (50.0,), loss).losses(torch.zeros(2, 1), torch.tensor([100.0, 200.0]))
    assert seen == [[[0.0], [2.0]]]


@pytest.mark.parametrize(
    ("objective", "targets", "seen"),
    [
        (SingleLabel(), torch.tensor([1, 0], dtype=torch.int32), torch.int64),
        (MultiLabel(), torch.tensor([[True, False], [True, True]]), torch.float32),
        (SoftLabels(), torch.tensor([[0.5, 0.5], [1.0, 0.0]]).double(), torch.float32),
    ],
)
def test_a_custom_loss_gets_targets_in_the_dtype_of_torchs_losses(
    objective: Objective, targets: Tensor, seen: torch.dtype
) -> None:
    kinds = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        kinds.append(targets.dtype)
        return outputs.sum(1)

    type(objective)(loss=loss).losses(draw(2, 2), targets)  # type: ignore[call-arg]
    assert kinds == [seen]


def test_average_precision_is_the_mean_of_the_precision_at_each_hit_with_ties_as_one_cut() -> None:
    scores, targets = torch.tensor([0.9, 0.8, 0.7, 0.6])[:, None], torch.tensor([1, 0, 1, 1])[:, None]
    assert metrics.mean_average_precision(scores, targets) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    # Equal scores: the precision is 3/4 for any order of the images.
    for order in ([0, 1, 2, 3], [1, 0, 2, 3], [3, 2, 0, 1]):
        assert metrics.mean_average_precision(torch.full((4, 1), 0.5), targets[order]) == pytest.approx(3 / 4)
    both, none = torch.cat((scores, scores), 1), torch.cat((targets, torch.zeros_like(targets)), 1)
    assert metrics.mean_average_precision(both, none) == metrics.mean_average_precision(scores, targets)
    assert metrics.mean_average_precision(scores, torch.zeros_like(targets)) == 0


def test_auroc_is_the_share_of_pairs_in_the_right_order_and_the_mean_over_labels_with_both() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (60, 3), generator=generator) / 5  # with ties
    targets = torch.randint(2, (60, 3), generator=generator)
    targets[:, 2] = 1
    areas = []
    for column, truth in zip(scores.T[:2], targets.T, strict=False):
        pairs = column[truth == 1][:, None] - column[truth == 0]
        areas.append(float((pairs.sign() + 1).mean() / 2))
        assert metrics.auroc(column, truth) == pytest.approx(areas[-1])
    assert metrics.auroc(scores[:, 2], targets[:, 2]) is None
    assert metrics.auroc(scores[:, 2], 1 - targets[:, 2]) is None
    assert MultiLabel().measure(scores, targets)["mean_auroc"] == pytest.approx(sum(areas) / 2)
    assert "mean_auroc" not in MultiLabel().measure(scores, torch.ones_like(targets))


def test_f1_is_the_mean_over_the_labels_that_occur() -> None:
    chosen = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    targets = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 0]])
    assert metrics.macro_f1(chosen, targets) == pytest.approx((1 / 2 + 0) / 2)
    assert metrics.macro_f1(chosen, torch.zeros_like(targets)) == 0


def test_chosen_thresholds_have_the_best_f1_of_all_thresholds() -> None:
    scores = draw(40, 5).sigmoid().mul(20).round() / 20  # with ties
    targets = (draw(40, 5, seed=1) + 2 * scores > torch.tensor([0.5, 1, 1.5, 2, 99])).long()
    assert targets[:, 4].sum() == 0
    thresholds = metrics.best_thresholds(scores, targets)
    for label, threshold in enumerate(thresholds[:4]):
        column, truth = scores[:, [label]], targets[:, [label]]
        best = max(metrics.macro_f1(column > cut, truth) for cut in torch.linspace(-0.01, 1, 500))
        assert metrics.macro_f1(column > threshold, truth) == pytest.approx(best)
        assert not (column == threshold).any()
    assert thresholds[4] == 0.5
    objective = MultiLabel().choose_thresholds(scores, targets)
    assert objective.thresholds == thresholds
    assert objective.measure(scores, targets)["macro_f1"] > MultiLabel().measure(scores, targets)["macro_f1"]
    assert metrics.best_thresholds(torch.tensor([[0.5], [0.25]]), torch.tensor([[1], [1]])) == (0.125,)


def test_errors_of_values_are_in_their_units() -> None:
    targets = torch.tensor([[1.0, 100.0], [2.0, 200.0], [3.0, 300.0]])
    objective = Regression().scaled_to(targets)
    torch.testing.assert_close(objective.predict(objective.scale(targets)), targets)
    assert objective.measure(targets, targets) == {"r2": 1.0, "mean_absolute_error": 0.0}
    measured = objective.measure(targets + torch.tensor([0.5, 0.0]), targets)
    assert measured == pytest.approx({"r2": (1 - 0.75 / 2 + 1) / 2, "mean_absolute_error": 0.25})
    mean = targets.mean(0).expand(3, 2)
    assert objective.measure(mean, targets)["r2"] == 0
    same = torch.full((3, 1), 7.1, dtype=torch.float64)  # whose mean is another number, by rounding
    assert Regression().measure(same, same)["r2"] == 1
    assert Regression().measure(same + 1, same)["r2"] == 0
    assert Regression().scaled_to(same).std == (1.0,)
    assert Regression().measure(same + 1e-3, same)["r2"] == 0
    assert Regression().scaled_to(same + torch.arange(3)[:, None] * 1e-5).std[0] < 1e-4
    assert Regression().scaled_to(torch.tensor([1.0, NAN, 3.0])) == Regression((2.0,), (1.0,))


def test_predictions_are_probabilities_or_values() -> None:
    outputs = draw(4, 3)
    torch.testing.assert_close(SingleLabel().predict(outputs), outputs.softmax(1))
    torch.testing.assert_close(SoftLabels().predict(outputs), outputs.softmax(1))
    torch.testing.assert_close(MultiLabel().predict(outputs), outputs.sigmoid())
    torch.testing.assert_close(Regression((5.0,), (2.0,)).predict(outputs), outputs * 2 + 5)
    assert MultiLabel((0.1, 0.9)).choose(torch.tensor([[0.2, 0.8], [0.1, 0.95]])).tolist() == [
        [True, False],
        [False, True],
    ]


def test_soft_labels_are_correct_if_the_most_likely_classes_agree() -> None:
    objective, targets = SoftLabels(), torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.7, 0.3]])
    outputs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert objective.correct(outputs, targets).tolist() == [True, False, True]
    assert objective.measure(objective.answer(outputs), targets) == {"accuracy": 2 / 3, "balanced_accuracy": 0.5}
