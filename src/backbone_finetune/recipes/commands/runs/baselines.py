"""Baselines of a fine-tuned model: chance, a random backbone, raw pixels, and an unfrozen backward pass."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from backbone_finetune import FineTuneModel

from ...models.classifiers import ClassifierDescription, describe_classifier
from ...models.readouts import assemble, describe_readout
from ...rng import preserve_rng_state

SECONDS = 0.5  # seconds for which each backward pass is repeated


def chance_accuracy(train_targets: Sequence[int], test_targets: Sequence[int]) -> float | None:
    """Return the test accuracy of always predicting the most common training class; None without test images.

    >>> chance_accuracy([0, 0, 1], [0, 1, 1, 1])
    0.25
    """
    if not test_targets:
        return None
    commonest = Counter(train_targets).most_common(1)[0][0]
    return sum(target == commonest for target in test_targets) / len(test_targets)


def random_model(like: FineTuneModel, architecture: str, num_classes: int, **arguments: Any) -> FineTuneModel:
    """Build a timm architecture with random weights, with the readout and the layers of the classifier of a model."""
    described = describe_classifier(like.classifier)
    return assemble(
        timm.create_model(architecture, **arguments),
        num_classes,
        readout=describe_readout(like.backbone),
        classifier=None if described is None else ClassifierDescription.model_validate(described).build(),
    )


def pixel_model(num_classes: int, channels: int = 3) -> FineTuneModel:
    """Build a linear classifier on the pixels, averaged down to 32 x 32."""
    classifier = nn.Linear(channels * 32 * 32, num_classes)
    return FineTuneModel(nn.Sequential(nn.AdaptiveAvgPool2d(32), nn.Flatten()), classifier)


@dataclass(frozen=True)
class BackwardTimes:
    """Medians in milliseconds of ``.backward()`` alone, each for the same batch.

    ``frozen`` is the model as trained, ``classifier_alone`` its limit: the classifier on computed features.
    """

    unfrozen: float
    frozen: float
    classifier_alone: float
    batch_size: int


def measure_backward(model: FineTuneModel, inputs: Tensor, targets: Tensor) -> BackwardTimes:
    """Time the backward pass of the unfrozen model, of the frozen model, and of its classifier alone.

    Copies run, so the model does not change.

    >>> model = FineTuneModel(nn.Linear(2, 3), nn.Linear(3, 2)).freeze_backbone()
    >>> measure_backward(model, torch.ones(4, 2), torch.zeros(4, dtype=torch.long)).batch_size
    4
    """
    from torch.utils.benchmark import Timer  # noqa: PLC0415 (warns on import where CUDA is installed without a device)

    def time(module: nn.Module, inputs: Tensor) -> float:
        loss = cross_entropy(module.train()(inputs), targets)
        timer = Timer("loss.backward(retain_graph=True)", globals={"loss": loss}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=SECONDS).median * 1000

    with preserve_rng_state():
        unfrozen, frozen = time(copy.deepcopy(model).unfreeze_backbone(), inputs), time(copy.deepcopy(model), inputs)
        with torch.no_grad():
            features = copy.deepcopy(model).eval().backbone(inputs)
        return BackwardTimes(unfrozen, frozen, time(copy.deepcopy(model.classifier), features), len(inputs))
