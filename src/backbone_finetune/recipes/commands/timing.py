"""What freezing saves on this machine: backward times, small and honest. (The benchmarks folder measures at length.)"""

import copy
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from backbone_finetune import FineTuneModel

__all__ = ["BackwardTimes", "measure_backward"]


@dataclass(frozen=True)
class BackwardTimes:
    """Medians in milliseconds of ``.backward()`` alone, each for the same batch.

    ``frozen`` is the model as it is trained, ``classifier_alone`` its limit: the classifier on ready features.

    >>> BackwardTimes(unfrozen=120.0, frozen=0.3, classifier_alone=0.2, batch_size=16).frozen
    0.3
    """

    unfrozen: float
    frozen: float
    classifier_alone: float
    batch_size: int


def measure_backward(model: FineTuneModel, inputs: Tensor, targets: Tensor, *, rounds: int = 5) -> BackwardTimes:
    """Time the backward pass of a model as it is frozen, wholly unfrozen, and of its classifier alone.

    The three take turns, forwards and then backwards, so that a machine that slows down meanwhile slows them all. Each
    forward is outside the clock. The model itself is left as it was: copies run.

    >>> model = FineTuneModel(nn.Linear(2, 3), nn.Linear(3, 2)).freeze_backbone()
    >>> measure_backward(model, torch.ones(4, 2), torch.zeros(4, dtype=torch.long)).batch_size
    4
    """
    frozen, unfrozen = copy.deepcopy(model).train(), copy.deepcopy(model).unfreeze_backbone().train()
    with torch.no_grad():
        features = copy.deepcopy(model).eval().backbone(inputs)
    variants: dict[str, tuple[nn.Module, Tensor]] = {
        "unfrozen": (unfrozen, inputs),
        "frozen": (frozen, inputs),
        "classifier_alone": (copy.deepcopy(model.classifier).train(), features),
    }
    milliseconds: dict[str, list[float]] = {name: [] for name in variants}
    with torch.random.fork_rng(devices=[inputs.device] if inputs.device.type == "cuda" else []):
        for turn in range(-1, rounds):
            for name in variants if turn % 2 else reversed(variants):
                elapsed = time_backward(*variants[name], targets)
                if turn >= 0:  # the turn before warms up caches and allocators
                    milliseconds[name].append(elapsed)
    medians = {name: statistics.median(times) for name, times in milliseconds.items()}
    return BackwardTimes(**medians, batch_size=len(inputs))


def time_backward(module: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Time one ``.backward()`` in milliseconds, on a graph built outside the clock.

    >>> time_backward(nn.Linear(2, 2), torch.ones(1, 2), torch.zeros(1, dtype=torch.long)) > 0
    True
    """
    module.zero_grad(set_to_none=True)
    loss = cross_entropy(module(inputs), targets)
    synchronize(inputs.device)
    start = time.perf_counter()
    loss.backward()  # type: ignore[no-untyped-call]
    synchronize(inputs.device)
    return (time.perf_counter() - start) * 1000


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish what it was given; the CPU always has.

    >>> synchronize(torch.device("cpu"))
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
