"""What the accuracy of a fine-tuned model is held against: chance, a random backbone, and the pixels themselves."""

from collections import Counter
from collections.abc import Sequence

import timm
from torch import Tensor, nn
from torch.utils.data import Dataset

from backbone_finetune import FineTuneModel

from ..training.loop import TrainerConfig, fine_tune
from ..training.phases import Phase

__all__ = ["chance_accuracy", "random_backbone_accuracy", "raw_pixel_accuracy"]


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
