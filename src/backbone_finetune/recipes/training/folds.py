"""Cross-validation in which frozen modules run once for all folds."""

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from backbone_finetune import FineTuneModel

from ..data.groups import deal_groups, places_by_class
from ..data.targets import known_groups, known_targets
from ..features.dataset import Features
from .config import TrainerConfig, count
from .loop import fine_tune
from .phase_data import Fold, prepare_data
from .phases import Phase
from .progress import EpochResult
from .scoring import evaluate


def cross_validate(
    model: FineTuneModel,
    data: Dataset[Any],
    phases: Sequence[Phase],
    config: TrainerConfig,
    *,
    folds: int = 5,
    evaluated: Dataset[Any] | None = None,
) -> tuple[list[EpochResult], ...]:
    """Train a copy of a model for each fold of a dataset on the other folds, and evaluate it on that fold.

    Rows of features, or of the frontier, are computed once for all folds; each fold runs only the trainable part. The
    numbers of images of a class in the folds differ by at most 1, or, where images have groups, each group is in one
    fold, and the numbers are as near as that allows. Nothing is chosen on the held-out fold: no monitor is
    used, and a learning rate is chosen on a fifth of the others (Kohavi 1995). The model does not change.

    >>> import torch
    >>> from accelerate import Accelerator
    >>> model = FineTuneModel(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    >>> images = torch.utils.data.TensorDataset(torch.eye(2).repeat(6, 1), torch.arange(2).repeat(6))
    >>> config = TrainerConfig(Accelerator(cpu=True), show_progress=False)
    >>> [history[-1].validation_accuracy for history in cross_validate(model, images, [Phase(lr=0.1)], config, folds=3)]
    [1.0, 1.0, 1.0]

    Args:
        model: The model that each fold starts with.
        data: The images to train on, with a length.
        phases: What trains for how long, as in ``fine_tune``.
        config: How to train. Checkpoints are not written.
        folds: The number of folds, from 2 to the number of images.
        evaluated: The same images for evaluation, if those of ``data`` are augmented.

    Returns:
        The epochs of each fold.

    Raises:
        ValueError: the number of folds is out of range, or as for ``fine_tune``.
    """
    config = config.aside()
    return tuple(
        fine_tune(copy.deepcopy(model), train, held_out, phases, config)
        for train, held_out in make_folds(data, folds, config, evaluated)
    )


def cross_predict(
    model: FineTuneModel,
    data: Dataset[Any],
    phases: Sequence[Phase],
    config: TrainerConfig,
    *,
    folds: int = 5,
    evaluated: Dataset[Any] | None = None,
) -> Tensor:
    """Predict each image of a dataset by a copy of a model that trained on the other folds, as in `cross_validate`.

    Such predictions tell which labels look wrong, by ``cleanlab.filter.find_label_issues(labels, probabilities)``
    (confident learning, Northcutt et al. 2021).

    >>> import torch
    >>> from accelerate import Accelerator
    >>> model = FineTuneModel(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    >>> images = torch.utils.data.TensorDataset(torch.eye(2).repeat(6, 1), torch.arange(2).repeat(6))
    >>> config = TrainerConfig(Accelerator(cpu=True), show_progress=False)
    >>> cross_predict(model, images, [Phase(lr=0.1)], config, folds=3).argmax(1)
    tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1])

    Args:
        model: The model that each fold starts with.
        data: The images to train on, with a length.
        phases: What trains for how long, as in ``fine_tune``.
        config: How to train. Checkpoints are not written.
        folds: The number of folds, from 2 to the number of images.
        evaluated: The same images for evaluation, if those of ``data`` are augmented.

    Returns:
        Probabilities or values of the N images, ``(N, K)``; nan for images that cannot be read.

    Raises:
        ValueError: the number of folds is out of range, or as for ``fine_tune``.
    """
    config = config.aside()
    predictions: Tensor | None = None
    for train, held_out in make_folds(data, folds, config, evaluated):
        trained = copy.deepcopy(model)
        fine_tune(trained, train, None, phases, config)
        rows = prepare_data(trained, held_out, None, replace(config, caches=None))  # as computed already, if they are
        score = evaluate(rows.module.to(config.accelerator.device), rows.train, config, keep_outputs=True)
        assert score.outputs is not None
        values = config.objective.predict(score.outputs)
        if predictions is None:
            predictions = values.new_full((count(data), values.shape[1]), torch.nan)
        predictions[torch.tensor(held_out.indices, device="cpu")[score.indices]] = values
    assert predictions is not None
    return predictions


def make_folds(
    data: Dataset[Any], folds: int, config: TrainerConfig, evaluated: Dataset[Any] | None
) -> list[tuple[Fold, Fold]]:
    """Return, for each fold, the images of the other folds to train on, and its own; rows are computed once for all."""
    check_folds(data, folds)
    computed: dict[str, Features] = {}
    shown = computed if evaluated is None else {}
    held_out = data if evaluated is None else evaluated
    return [
        (Fold(data, sorted(set(range(count(data))) - set(part)), computed), Fold(held_out, part, shown))
        for part in split_folds(data, folds, config.seed)
    ]


def check_folds(data: Dataset[Any], folds: int) -> None:
    """Raise ValueError if a dataset has fewer images or groups than folds, or there are fewer than two folds."""
    if not 2 <= folds <= count(data):
        raise ValueError(f"folds = {folds}: expected a whole number from 2 to the {count(data)} images")
    if (groups := known_groups(data)) is not None and folds > len(set(groups)):
        raise ValueError(f"folds = {folds}: expected at most {len(set(groups))}, the groups of the training images")


def split_folds(data: Dataset[Any], folds: int, seed: int) -> list[list[int]]:
    """Distribute the images of each class over the folds, in an order drawn with the seed; return their indices."""
    targets, groups = known_targets(data), known_groups(data)
    are_classes = targets is not None and targets.ndim == 1 and not targets.is_floating_point()
    classes = targets.tolist() if targets is not None and are_classes else [0] * count(data)
    generator = random.Random(f"{seed} folds")
    if groups is not None:
        parts = deal_groups(groups, classes, [1 / folds] * folds, generator)
        return [[index for index, part in enumerate(parts) if part == fold] for fold in range(folds)]
    dealt = []
    for places in places_by_class(classes).values():
        dealt += generator.sample(places, len(places))
    return [sorted(dealt[start::folds]) for start in range(folds)]
