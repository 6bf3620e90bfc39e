"""Learning rate and weight decay of a classifier on features: given, or chosen from a grid on validation data."""

import copy
import logging
import math
import random
from collections import Counter

import torch
from torch import nn

from ..data.groups import deal_groups, lacking_classes, places_by_class
from ..data.images import is_read
from ..features.dataset import Features, select_rows
from ..heads.grid import HeadResult, fit_heads
from ..objectives.kinds import SingleLabel
from ..rng import preserve_rng_state
from ..together import run_on_main
from .config import TrainerConfig
from .phase_data import PhaseData
from .phases import Phase

__all__ = ["choose_rates"]

logger = logging.getLogger(__name__)

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
WEIGHT_DECAYS = (0.0, 0.01, 0.1, 1.0)
FEWEST = 5  # images of each class that are needed to choose on a fifth of them


def choose_rates(data: PhaseData, phase: Phase, config: TrainerConfig) -> tuple[float, float]:
    """Return the learning rate and weight decay of a phase that trains the module of ``data``.

    A phase without a learning rate that trains a classifier on features tries 32 pairs at once (`fit_heads`), on the
    validation data if a monitor also uses it, else on a fifth of the training images if each class has
    five. It then trains again, on all training images, with the rates of the head with the lowest validation loss, if
    that is lower than at the default rates by more than two standard errors of the difference, else with these.

    >>> from accelerate import Accelerator
    >>> from torch.utils._pytree import tree_structure
    >>> rows = Features([torch.eye(2).repeat(10, 1), torch.tensor([0, 1]).repeat(10)], tree_structure(0))
    >>> config = TrainerConfig(Accelerator(cpu=True), show_progress=False)
    >>> choose_rates(PhaseData(rows, None, nn.Linear(2, 2), on_features=True), Phase(epochs=9), config)
    (0.3, 0.0)
    """
    default = (phase.lr or 1e-3, 0.01 if phase.weight_decay is None else phase.weight_decay)
    if phase.lr is not None or phase.trainable_groups:
        return default
    parts = _split(data, config) if data.on_features and _can_be_stacked(data.module) else None
    if parts is None:
        if config.shows:
            why = "others are tried only on cached features with five images of each class, in two groups or more"
            logger.info("rates: lr %g and weight decay %g; %s", *default, why)
        return default

    def fit() -> tuple[float, float]:
        with preserve_rng_state():
            heads = fit_heads(
                copy.deepcopy(data.module),
                *parts,
                learning_rates=LEARNING_RATES,
                weight_decays=WEIGHT_DECAYS if phase.weight_decay is None else (phase.weight_decay,),
                epochs=phase.epochs,
                batch_size=config.batch_size,
                device=config.accelerator.device,
                seed=config.seed,
                loss=config.objective.losses,
                show_progress=config.show_progress,
            )
        # On a small validation set the loss is more informative than the accuracy, with its few values: on the packaged
        # clipart the rates with the highest accuracy were up to a hundred times too large.
        best = min(heads, key=lambda head: head.validation_loss)
        (usual,) = (head for head in heads if (head.lr, head.weight_decay) == default)
        is_chosen = _is_better(best, usual)
        chosen = best if is_chosen else usual
        if config.show_progress:
            logger.info(
                "rates: lr %g and weight decay %g, of %d heads the one with %s loss on %s (%.3g)",
                *(chosen.lr, chosen.weight_decay, len(heads)),
                "the lowest" if is_chosen else "the default rates, as no other has a clearly lower",
                "a fifth of the training images" if config.monitor is None else "the validation images",
                chosen.validation_loss,
            )
        return chosen.lr, chosen.weight_decay

    return run_on_main(config.accelerator, fit)


def _is_better(best: HeadResult, usual: HeadResult) -> bool:
    """Return whether a head's loss is lower by more than two standard errors of the difference over the images.

    On few images the lowest of 32 losses is low by chance: there its rates were worse than the default ones.
    """
    gains = usual.losses.double() - best.losses.double()
    is_clear = len(gains) > 1 and bool(gains.mean() > 2 * gains.std() / math.sqrt(len(gains)))
    return is_clear or not math.isfinite(usual.validation_loss)


def _can_be_stacked(classifier: nn.Module) -> bool:
    """Return whether `fit_heads` supports a classifier: torch's layers."""
    return all(type(layer).__module__.startswith(("torch.nn.", "backbone_finetune.")) for layer in classifier.modules())


def _split(data: PhaseData, config: TrainerConfig) -> tuple[Features, Features] | None:
    """Return the training and validation data of the heads; None if there is too little, or it is not finite."""
    train = data.train
    assert isinstance(train, Features)
    if not all(tensor.isfinite().all() for tensor in train.tensors):
        return None  # the training raises the error
    if data.validation is not None and config.monitor is not None:
        assert isinstance(data.validation, Features)
        return train, data.validation
    images = len(train) // data.views
    classes = train.tensors[-1][:images]
    read = is_read(classes).nonzero().flatten().tolist()
    # Rows and values are drawn from as one class.
    targets = [int(classes[index]) if isinstance(config.objective, SingleLabel) else 0 for index in read]
    groups = None if data.groups is None else [data.groups[index] for index in read]
    if not read or min(Counter(targets).values()) < FEWEST:
        return None
    drawn = _draw_fifth(targets, groups, random.Random(f"{config.seed} rates"))
    if drawn is None:
        return None
    held_out = {read[place] for place in drawn}
    fitted = [index for index in range(len(train)) if index % images not in held_out]
    with torch.device("cpu"):
        return select_rows(train, torch.tensor(fitted)), select_rows(train, torch.tensor(sorted(held_out)))


def _draw_fifth(targets: list[int], groups: list[str] | None, generator: random.Random) -> set[int] | None:
    """Draw a fifth of each class, whole groups if there are such; None if a class is then not on both sides."""
    if groups is not None:
        dealt = deal_groups(groups, targets, (0.8, 0.2), generator)
        return None if lacking_classes(dealt, targets, parts=2) else {place for place, part in enumerate(dealt) if part}
    drawn: set[int] = set()
    for members in places_by_class(targets).values():
        drawn.update(generator.sample(members, round(len(members) / 5)))
    return drawn
