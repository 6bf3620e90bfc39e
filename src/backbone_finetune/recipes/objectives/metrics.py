"""Metrics of predictions for N images: accuracy, average precision, AUROC, F1 and thresholds, errors, R squared.

They are computed on the CPU, in double precision.
"""

import torch
from torch import Tensor

ROUNDING = 1e-7  # relative, of float32: values that differ by less are equal


def accuracies(answers: Tensor, targets: Tensor) -> dict[str, float]:
    """Compute the share of correct answers ``(N,)``, and the mean of this share over the targets' classes.

    >>> accuracies(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]))
    {'accuracy': 0.75, 'balanced_accuracy': 0.5}
    """
    right = (answers == targets).double()
    _, classes = torch.unique(targets, return_inverse=True)
    recalls = torch.bincount(classes, right) / torch.bincount(classes)
    return {"accuracy": float(right.mean()), "balanced_accuracy": float(recalls.mean())}


def mean_average_precision(scores: Tensor, targets: Tensor) -> float:
    """Compute the mean average precision of scores ``(N, K)`` over the labels that occur in 0/1 targets; 0 for none.

    It is the area under the precision-recall curve in steps, as scikit-learn's ``average_precision_score``.

    >>> round(mean_average_precision(torch.tensor([[0.9], [0.8], [0.7]]), torch.tensor([[1], [0], [1]])), 4)
    0.8333
    """
    precisions = [
        float((hits.diff(prepend=hits.new_zeros(1)) * hits / numbers).sum() / hits[-1])
        for hits, numbers, _ in map(_cut, scores.T, targets.T)
        if hits[-1] > 0
    ]
    return sum(precisions) / max(len(precisions), 1)


def auroc(scores: Tensor, targets: Tensor) -> float | None:
    """Compute the probability that an image with 1 in ``targets`` (N,) scores above one with 0, equal scores as half.

    It is the area under the ROC curve, as scikit-learn's ``roc_auc_score``; None without images of both.

    >>> auroc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1]))
    0.875
    """
    hits, numbers, _ = _cut(scores, targets)
    misses = numbers - hits
    if not (hits[-1] and misses[-1]):
        return None
    hits, misses = (torch.cat((counts.new_zeros(1), counts)) for counts in (hits, misses))
    return float(torch.trapezoid(hits, misses) / (hits[-1] * misses[-1]))


def macro_f1(chosen: Tensor, targets: Tensor) -> float:
    """Compute the mean F1 of chosen labels ``(N, K)`` over the labels that occur in 0/1 targets; 0 for none.

    >>> macro_f1(torch.tensor([[1], [1], [0]]), torch.tensor([[1], [0], [1]]))
    0.5
    """
    chosen, targets = chosen.double(), targets.double()
    scores = 2 * (chosen * targets).sum(0) / (chosen.sum(0) + targets.sum(0)).clamp(min=1)
    present = targets.sum(0) > 0
    return float(scores[present].mean()) if present.any() else 0.0


def best_thresholds(scores: Tensor, targets: Tensor) -> tuple[float, ...]:
    """Choose the threshold with the best F1 for each label; scores ``(N, K)`` from 0 to 1 above it are positive.

    A threshold is midway between two scores; it is 0.5 for a label that no image has.

    >>> best_thresholds(torch.tensor([[1.0], [0.5], [0.25]]), torch.tensor([[1], [1], [0]]))
    (0.375,)
    """
    thresholds = []
    for hits, numbers, values in map(_cut, scores.T, targets.T):
        best = int((2 * hits / (numbers + hits[-1])).argmax())
        below = torch.cat((values, values.new_zeros(1)))[best + 1]
        thresholds.append(float(values[best] + below) / 2 if hits[-1] > 0 else 0.5)
    return tuple(thresholds)


def regression_errors(values: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean absolute error and R squared of each output, both ``(K,)``, for values and targets ``(N, K)``.

    R squared is 1 minus the squared errors divided by those of the targets' mean. If all targets are equal, it is 1 if
    the values are equal to them, and 0 otherwise.

    >>> regression_errors(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [3.0]]))
    (tensor([0.5000], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
    """
    values, targets = values.double(), targets.double()
    squares, total = (values - targets).square().sum(0), (targets - targets.mean(0)).square().sum(0)
    least = (ROUNDING * targets.abs().amax(0)).square() * len(targets)
    differ = total > least
    r2 = (1 - squares / total.where(differ, 1)).where(differ, (squares <= least).double())
    return (values - targets).abs().mean(0), r2


def _cut(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count the hits and all scores ``(N,)`` at or above each distinct score; return both and the distinct scores."""
    values, order = scores.double().sort(descending=True)
    last = torch.cat((values.diff() != 0, values.new_ones(1).bool()))  # of equal scores
    hits = targets[order].double().cumsum(0)
    return hits[last], values.new_ones(len(values)).cumsum(0)[last], values[last]
