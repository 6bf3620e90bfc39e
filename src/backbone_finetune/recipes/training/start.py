"""The start of a classifier on a frozen backbone, if the phase has no learning rate of its own."""

import logging
import math

import torch
from torch import nn

from ..data.images import is_read
from ..features.dataset import Features
from ..objectives.kinds import SingleLabel
from .config import TrainerConfig
from .phase_data import PhaseData
from .phases import DEFAULT_LR, Phase

logger = logging.getLogger(__name__)

LOGIT_STEP = 0.3
TYPICAL_RATE = 3e-4  # for features that are not cached


def start_classifier(
    classifier: nn.Module, data: PhaseData, phase: Phase, config: TrainerConfig
) -> tuple[float, float]:
    """Return the learning rate and weight decay of a phase; without a rate, a linear classifier starts from zero.

    Weights of 0 are the start of BiT's classifier (Kolesnikov et al. 2020): on few images, the features of other
    images have parts along which random weights are never trained. The rate fits the size of the features: a step
    of Adam changes each weight by about the rate, so a logit by the rate times the sum of the absolute features and,
    for the bias, 1. That product is 0.3. Classifiers of several layers, other targets than one class per image, and
    phases that train layers keep their weights, at 1e-3.

    >>> from accelerate import Accelerator
    >>> from torch.utils._pytree import tree_structure
    >>> rows = Features([torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([0, 1])], tree_structure(0))
    >>> classifier, config = nn.Linear(2, 2), TrainerConfig(Accelerator(cpu=True), show_progress=False)
    >>> start_classifier(classifier, PhaseData(rows, None, classifier, on_features=True), Phase(), config)
    (0.05, 0.01)
    >>> classifier.bias.tolist()
    [0.0, 0.0]
    """
    weight_decay = 0.01 if phase.weight_decay is None else phase.weight_decay
    if phase.lr is not None:
        return phase.lr, weight_decay
    if phase.trainable_groups or type(classifier) is not nn.Linear or not isinstance(config.objective, SingleLabel):
        return DEFAULT_LR, weight_decay
    for parameter in classifier.parameters():
        nn.init.zeros_(parameter)
    lr = _fitting_rate(data.train) if isinstance(data.train, Features) else TYPICAL_RATE
    if config.shows:
        logger.info("the classifier starts from zero, at lr %g; with a rate given, it goes on from its weights", lr)
    return lr, weight_decay


def _fitting_rate(rows: Features) -> float:
    """Return the rate with which a step changes a logit by at most `LOGIT_STEP` on average, to two digits."""
    sums = torch.linalg.vector_norm(rows.tensors[0], ord=1, dim=-1, dtype=torch.float32)
    size = float(sums[is_read(rows.tensors[-1])].mean())
    # The training reports features that are not finite.
    return float(f"{LOGIT_STEP / (size + 1):.1e}") if math.isfinite(size) else TYPICAL_RATE
