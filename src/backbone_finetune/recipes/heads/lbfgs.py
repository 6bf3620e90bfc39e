"""Train a head by full-batch L-BFGS on cached features, like CLIP's linear probe, without a learning rate."""

from __future__ import annotations  # help() shows the names of types, not what pydantic checks

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from pydantic import SkipValidation
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from backbone_finetune.splitting.measures import count_classes

from ..checking import NotNegative, Positive, validated
from ..features.dataset import on_device
from ..features.extract import find_device_of
from ..features.frozen_pass import in_eval
from ..precision import products_in
from .grid import check_features, decaying_names, head_batch


@dataclass(frozen=True)
class LbfgsResult:
    """The result of L-BFGS: the objective, its largest partial derivative, and whether that is within the tolerance.

    >>> LbfgsResult(loss=0.3, gradient=2e-6, iterations=80, converged=True).converged
    True
    """

    loss: float
    gradient: float
    iterations: int
    converged: bool


@validated
def fit_lbfgs(
    classifier: nn.Module,
    features: SkipValidation[TensorDataset],
    *,
    weight_decay: NotNegative = 0.0,
    max_iterations: Positive = 1000,
    tolerance: NotNegative = 1e-5,
    chunk_size: Positive = 8192,
    device: torch.device | None = None,
) -> LbfgsResult:
    """Minimize a classifier's mean cross entropy over all features by L-BFGS with a strong-Wolfe search.

    CLIP (Radford et al. 2021, section 3.2 and appendix A.3) evaluates features like this, with 1000 iterations; its L2
    penalty ``C`` of scikit-learn is ``weight_decay = 1 / (C * N)``: the objective is ``mean loss + weight_decay / 2 *
    |weights|**2``, without biases and 1-d weights as in `FineTuneModel.param_groups`. For a linear classifier it is
    convex, so the optimum does not depend on the start.

    >>> classifier = nn.Linear(2, 2)
    >>> data = TensorDataset(torch.eye(2), torch.tensor([0, 1]))
    >>> fit_lbfgs(classifier, data, weight_decay=0.1).converged
    True

    Memory is bounded by ``chunk_size`` images at a time. The search needs a deterministic function, so the
    classifier runs in eval mode: dropout is off, running statistics are fixed. It moves to ``device``; modes are kept.

    Raises:
        ValueError: an argument is out of range, there are no features, nothing in the classifier trains, or the
            objective is not finite.
    """
    features = check_features("features", features, count_classes(classifier))
    decaying = decaying_names(classifier)
    device = device or find_device_of(classifier)
    classifier.to(device)
    trained = {name: parameter for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.LBFGS(
        trained.values(),
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    tensors = on_device(features, device).tensors  # each evaluation reads all features
    chunks = list(zip(*(torch.split(each, chunk_size) for each in tensors), strict=True))
    # Near the optimum the loss changes by less than float32 can represent, and the search would stop early: gradients
    # of 8e-5 remained, but with the sum in double precision they fall below 1e-5. MPS has no double precision.
    precision = torch.float32 if device.type == "mps" else torch.float64

    def objective() -> Tensor:
        """Compute the objective and its gradient, with the graph of one chunk at a time in memory."""
        optimizer.zero_grad()
        total = torch.zeros((), dtype=precision, device=device)
        weights = [parameter for name, parameter in trained.items() if name in decaying]
        penalties = (weight_decay / 2 * weight.to(precision).square().sum() for weight in weights)
        for term in chain(penalties, map(mean_loss, chunks)):
            term.backward()  # type: ignore[no-untyped-call]
            total += term.detach()
        return total

    def mean_loss(chunk: Sequence[Tensor]) -> Tensor:
        inputs, targets = head_batch(features, chunk, device)
        logits: Tensor = classifier(inputs)
        return cross_entropy(logits.to(precision), targets.long(), reduction="sum") / len(features)

    # TF32 would round the gradient to a thousandth.
    with in_eval(classifier), products_in("ieee"):
        if not (start := objective()).isfinite():  # torch's search would raise an unclear error
            raise ValueError(f"the objective is {start}; the features or the classifier's weights are not finite")
        optimizer.step(objective)  # type: ignore[no-untyped-call]
        loss = objective()
    gradient = max(float(parameter.grad.abs().max()) for parameter in trained.values() if parameter.grad is not None)
    optimizer.zero_grad()
    iterations = int(next(iter(optimizer.state.values()))["n_iter"])
    return LbfgsResult(loss.item(), gradient, iterations, converged=gradient <= tolerance)
