"""The training loss: cross-entropy, with class weights and label smoothing, or one of the caller's own."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..data.images import IGNORED
from .config import TrainerConfig

__all__ = ["balanced_weights", "image_losses", "sum_losses", "sum_weights"]


def balanced_weights(targets: Sequence[int]) -> tuple[float, ...]:
    """Weigh each class by ``N / (K * count)``, as scikit-learn's "balanced" does; each class has an image.

    >>> balanced_weights([0, 0, 0, 1])
    (0.6666666666666666, 2.0)
    """
    counts = Counter(targets)
    return tuple(len(targets) / (len(counts) * counts[target]) for target in sorted(counts))


def image_losses(config: TrainerConfig, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a config's loss as a function of ``(B, K)`` logits and ``(B,)`` targets that returns ``(B,)`` losses."""
    weights = None if config.class_weights is None else torch.tensor(config.class_weights, device=device)
    return config.loss or partial(
        cross_entropy, weight=weights, label_smoothing=config.label_smoothing, reduction="none"
    )


def sum_losses(logits: Tensor, targets: Tensor, config: TrainerConfig, weights: Tensor | None = None) -> Tensor:
    """Sum the losses of ``(B, K)`` logits and ``(B,)`` targets: ``()``. What cannot be read adds nothing.

    Raises:
        ValueError: a loss of the caller's own does not return one number per image.
    """
    if config.loss is None:
        weights = None if weights is None else weights.to(logits.dtype)
        smoothing = config.label_smoothing
        return cross_entropy(logits, targets, weights, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
    readable = targets != IGNORED
    losses, expected = config.loss(logits[readable], targets[readable]), targets[readable].shape
    if not isinstance(losses, Tensor) or losses.shape != expected:
        came = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"loss returned {came}: expected one loss per image, shape {tuple(expected)}; "
            "torch's losses return that with reduction='none'"
        )
    return losses.sum()


def sum_weights(targets: Tensor, weights: Tensor) -> Tensor:
    """Sum the weights of the classes of ``(B,)`` targets: ``()``. What cannot be read has none."""
    return weights[targets.clamp(min=0)].where(targets != IGNORED, 0).sum()
