"""What a fine-tuned model is compared with: chance, a random backbone, raw pixels, and an unfrozen backward pass.

The benchmarks folder measures backward passes at length; here it is a small measurement on the user's machine.
"""

import copy
import logging
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from backbone_finetune import FineTuneModel

from ..training.loop import TrainerConfig, fine_tune
from ..training.phases import Phase

logger = logging.getLogger(__name__)

__all__ = ["BackwardTimes", "chance_accuracy", "measure_backward", "random_backbone_accuracy", "raw_pixel_accuracy"]


def chance_accuracy(train_targets: Sequence[int], test_targets: Sequence[int]) -> float:
    """The test accuracy of always answering the commonest training class: the most that ignoring the image gives.

    >>> chance_accuracy([0, 0, 1], [0, 1, 1, 1])
    0.25
    """
    commonest = Counter(train_targets).most_common(1)[0][0]
    return sum(target == commonest for target in test_targets) / len(test_targets)


def random_backbone_accuracy(
    architecture: str,
    num_classes: int,
    train: Dataset[tuple[Tensor, int]],
    test: Dataset[tuple[Tensor, int]],
    *,
    phase: Phase,
    loop: TrainerConfig,
) -> float:
    """Test accuracy of the same classifier, trained likewise above the same architecture with random frozen weights.

    >>> import torch
    >>> from accelerate import Accelerator
    >>> images = [(-torch.ones(3, 32, 32), 0), (torch.ones(3, 32, 32), 1)]
    >>> loop = TrainerConfig(Accelerator(cpu=True), show_progress=False)
    >>> 0 <= random_backbone_accuracy("test_resnet", 2, images, images, phase=Phase(epochs=1), loop=loop) <= 1
    True
    """
    model = FineTuneModel.from_timm(timm.create_model(architecture), num_classes=num_classes)
    return fine_tune(model, train, test, [phase], loop)[-1].test_accuracy


def raw_pixel_accuracy(
    num_classes: int,
    train: Dataset[tuple[Tensor, int]],
    test: Dataset[tuple[Tensor, int]],
    *,
    phase: Phase,
    loop: TrainerConfig,
) -> float:
    """Test accuracy of a linear classifier on the pixels, averaged down to 32 x 32, trained likewise.

    >>> import torch
    >>> from accelerate import Accelerator
    >>> images = [(-torch.ones(3, 32, 32), 0), (torch.ones(3, 32, 32), 1)]
    >>> loop = TrainerConfig(Accelerator(cpu=True), show_progress=False)
    >>> raw_pixel_accuracy(2, images, images, phase=Phase(epochs=9), loop=loop)
    1.0
    """
    model = FineTuneModel(nn.Sequential(nn.AdaptiveAvgPool2d(32), nn.Flatten()), nn.Linear(3 * 32 * 32, num_classes))
    return fine_tune(model, train, test, [phase], loop)[-1].test_accuracy


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


def measure_backward(model: FineTuneModel, inputs: Tensor, targets: Tensor, *, rounds: int = 5) -> BackwardTimes | None:
    """Time the backward pass of a model as it is frozen, of the unfrozen model, and of its classifier alone.

    Returns None where the unfrozen model does not fit into the memory of the device.

    The three take turns, forwards and then backwards, so that a machine that slows down meanwhile slows them all. Each
    forward is outside the clock. The model itself is left as it was: copies run.

    >>> model = FineTuneModel(nn.Linear(2, 3), nn.Linear(3, 2)).freeze_backbone()
    >>> measure_backward(model, torch.ones(4, 2), torch.zeros(4, dtype=torch.long)).batch_size
    4
    """
    try:
        return _measure(model, inputs, targets, rounds)
    except torch.OutOfMemoryError:
        logger.warning("backward: the unfrozen model does not fit into the memory of %s; not timed", inputs.device)
        return None


def _measure(model: FineTuneModel, inputs: Tensor, targets: Tensor, rounds: int) -> BackwardTimes:
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
                elapsed = _time_backward(*variants[name], targets)
                if turn >= 0:  # the turn before warms up caches and allocators
                    milliseconds[name].append(elapsed)
    medians = {name: statistics.median(times) for name, times in milliseconds.items()}
    return BackwardTimes(**medians, batch_size=len(inputs))


def _time_backward(module: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Time one ``.backward()`` in milliseconds; the forward pass is not timed."""
    module.zero_grad(set_to_none=True)
    loss = cross_entropy(module(inputs), targets)
    _synchronize(inputs.device)
    start = time.perf_counter()
    loss.backward()  # type: ignore[no-untyped-call]
    _synchronize(inputs.device)
    return (time.perf_counter() - start) * 1000


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
