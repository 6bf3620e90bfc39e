"""The start of a classifier on a frozen backbone, if the phase has no learning rate of its own."""

import logging
import math

import torch
from torch import Tensor, nn

from ..data.images import is_read
from ..data.loading import DeviceLoader
from ..features.dataset import Features, select_rows
from ..features.frozen_pass import FrozenPass, front_of_backbone, in_eval
from ..rng import preserve_rng_state
from .config import TrainerConfig, count
from .phase_data import PhaseData
from .phases import DEFAULT_LR, Phase

logger = logging.getLogger(__name__)

OUTPUT_STEP = 0.3
MEASURED = 1000  # images


def start_classifier(
    classifier: nn.Module, data: PhaseData, phase: Phase, config: TrainerConfig
) -> tuple[float, float]:
    """Return the learning rate and weight decay of a phase; without a rate, a linear classifier starts from zero.

    Weights of 0 are the start of BiT's classifier (Kolesnikov et al. 2020): on few images, the features of other
    images have parts along which random weights are never trained. The rate fits the size of the features: a step
    of Adam changes each weight by about the rate, so an output by the rate times the sum of the absolute features
    and, for the bias, 1. That product is 0.3. Classifiers of several layers, and phases that train layers of the
    backbone, keep their weights, at 1e-3.

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
    if phase.trainable_groups or type(classifier) is not nn.Linear:
        return DEFAULT_LR, weight_decay
    features, targets = _measured_rows(data, config)
    sums = torch.linalg.vector_norm(features, ord=1, dim=-1, dtype=torch.float32)
    size = float(sums[is_read(targets)].mean())
    if not math.isfinite(size):  # the training reports it
        return DEFAULT_LR, weight_decay
    for parameter in classifier.parameters():
        nn.init.zeros_(parameter)
    lr = float(f"{OUTPUT_STEP / (size + 1):.1e}")
    if config.shows:
        logger.info("the classifier starts from zero, at lr %g; with a rate given, it goes on from its weights", lr)
    return lr, weight_decay


def _measured_rows(data: PhaseData, config: TrainerConfig) -> tuple[Tensor, Tensor]:
    """Return the features and the targets of up to `MEASURED` images: the same ones, cached or not."""
    images = count(data.train) // data.views
    rows = torch.arange(0, images, -(-images // MEASURED), device="cpu")
    if isinstance(data.train, Features):
        sample = select_rows(data.train, rows)
        return sample.tensors[0], sample.tensors[-1]
    device, batches = config.accelerator.device, [part.tolist() for part in torch.split(rows, config.batch_size)]
    workers, seed = config.workers_for(data.train), f"{config.seed} start"
    loader = DeviceLoader(data.train, device, batches=batches, workers=workers, seed=seed)
    front = front_of_backbone(data.module)  # type: ignore[arg-type]  # without features it is the whole model
    with preserve_rng_state(), in_eval(front.module):
        parts = list(FrozenPass(front, device, None).over(loader))
    return torch.cat([part.tensors[0] for part in parts]), torch.cat([part.tensors[-1] for part in parts])
