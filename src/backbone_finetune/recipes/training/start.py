"""The start of a classifier on a frozen backbone, if the phase has no learning rate of its own."""

from torch import nn

from backbone_finetune import FineTuneModel

from ..objectives.kinds import SingleLabel
from .config import TrainerConfig
from .phases import DEFAULT_LR, Phase

__all__ = ["start_classifier"]

LR_FROM_ZERO = 3e-4


def start_classifier(model: FineTuneModel, phase: Phase, config: TrainerConfig) -> tuple[float, float]:
    """Return the learning rate and weight decay of a phase; without a rate, a linear classifier starts from zero.

    It then trains at 3e-4. Weights of 0 are the start of BiT's classifier (Kolesnikov et al. 2020): on few images, the
    features of other images have parts along which random weights are never trained. Classifiers of several layers,
    other targets than one class per image, and phases that train layers keep their weights, at 1e-3.

    >>> from accelerate import Accelerator
    >>> model = FineTuneModel(nn.Identity(), nn.Linear(2, 2))
    >>> start_classifier(model, Phase(), TrainerConfig(Accelerator(cpu=True))), model.classifier.bias.tolist()
    ((0.0003, 0.01), [0.0, 0.0])
    """
    weight_decay = 0.01 if phase.weight_decay is None else phase.weight_decay
    if phase.lr is not None:
        return phase.lr, weight_decay
    head = model.classifier
    if phase.trainable_groups or type(head) is not nn.Linear or not isinstance(config.objective, SingleLabel):
        return DEFAULT_LR, weight_decay
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return LR_FROM_ZERO, weight_decay
