"""The training loop: phase after phase, on features if the backbone is frozen, otherwise on images."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Dataset

from backbone_finetune import FineTuneModel

from ..data.images import ImageDataset
from ..data.targets import check_dataset
from ..text import printable
from .checkpoints import load_by_name, open_checkpoints, resume
from .config import TrainerConfig
from .epoch import train_epoch
from .phase_state import prepared_phase, save_checkpoint, snapshot
from .phases import DEFAULT_LR, Phase
from .progress import EpochResult, Progress
from .tracking import log_epoch, start_trackers

logger = logging.getLogger(__name__)


def fine_tune(
    model: FineTuneModel,
    train: Dataset[Any],
    validation: Dataset[Any] | None,
    phases: Sequence[Phase],
    config: TrainerConfig,
) -> list[EpochResult]:
    """Train a model in phases, and check in each that no frozen tensor changed.

    In a phase with a frozen backbone, the backbone runs once over the images and the classifier trains on its features,
    if both datasets are known to be deterministic: tensors, lists, and datasets whose ``transform`` is None
    or a deterministic one of torchvision or timm, also in a Subset or ConcatDataset. A custom dataset is marked by
    ``transform = None``. Otherwise the whole model runs in every step, and the random numbers of an image's transform
    depend on the seed, the epoch and the image's index. Unreadable images of an `ImageDataset` are skipped.
    Each phase has a new AdamW and schedule. The validation data is evaluated after each epoch; with
    ``config.monitor`` the weights after the best epoch are kept, otherwise those after the last one. In a first
    phase without a learning rate, a linear classifier on a frozen backbone starts from zero.

    >>> import torch
    >>> model = FineTuneModel(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    >>> images = torch.utils.data.TensorDataset(torch.eye(2), torch.tensor([0, 1]))
    >>> phases = [Phase(epochs=2), Phase(epochs=1, trainable_groups=1)]
    >>> len(fine_tune(model, images, images, phases, TrainerConfig(Accelerator(cpu=True), show_progress=False)))
    3

    With ``config.checkpoints``, a killed run resumes from its last checkpoint, and on a CPU, with one process,
    ends with exactly the same weights: the initial model, the phases and the config must be the same.

    Raises:
        AssertionError: a frozen parameter or buffer changed.
        DivergedError: an epoch's loss or trainable tensors are not finite; a ValueError.
        ValueError: there are no phases or no images, or nothing trains.
    """
    if not phases:
        raise ValueError("phases is empty; pass one Phase or more")
    parts = {"train": train} if validation is None else {"train": train, "validation": validation}
    for name, data in parts.items():
        check_dataset(name, data, lambda name, targets: config.objective.check(name, targets, model.num_classes))
    if validation is None and config.monitor is not None:
        raise ValueError("monitor was given without validation data; pass validation, or leave monitor out")
    begun, saved = (
        (False, None) if config.checkpoints is None else open_checkpoints(config.checkpoints, config.accelerator)
    )
    progress, changed = Progress(), set[str]()
    if saved is not None:
        progress = saved.progress
        changed.update(saved.model)
        load_by_name(model, saved.model)
    for images in (data for data in parts.values() if isinstance(data, ImageDataset)):
        known = {path: progress.skipped[path] for path in map(str, images.folder.paths) if path in progress.skipped}
        images.broken.update(known)
        progress.skipped.update(images.broken)  # logged already, by this run or another on the same data
    if begun and config.shows:
        done = progress.phase == len(phases)
        logger.info("the training was finished before" if done else f"resuming at {progress.describe()}")
    total = sum(phase.epochs for phase in phases)
    start_trackers(config, phases)
    while progress.phase < len(phases):
        phase = phases[progress.phase]
        entered = saved is not None and bool(progress.epoch or progress.step)
        if entered:  # the classifier has started
            phase = replace(phase, lr=progress.lr, weight_decay=progress.weight_decay)
        elif progress.history and phase.lr is None:  # a later phase goes on with the classifier of the one before
            phase = replace(phase, lr=DEFAULT_LR)
        with prepared_phase(model, train, validation, phase=phase, changed=changed, config=config) as state:
            progress.lr, progress.weight_decay = state.phase.lr, state.phase.weight_decay
            report_skipped(parts.values(), progress.skipped, config.accelerator)
            check_classes(parts.values())
            if saved is not None:
                resume(saved, state.model, state.optimizer, config.accelerator)
                state.best = dict(saved.best) or None
                saved = None
            if state.best is None and progress.best_epoch is not None:  # of an earlier phase, as the model is now
                state.best = snapshot(state)
            is_done = False
            while not is_done:
                is_done = train_epoch(state, progress, config, title=f"epoch {len(progress.history) + 1}/{total}")
                report_skipped(parts.values(), progress.skipped, config.accelerator)
                check_classes(parts.values())
                save_checkpoint(state, progress, config)
                log_epoch(config, progress.history[-1])  # then a resumed run does not log the epoch again
    return progress.history


def report_skipped(data: Iterable[Dataset[Any]], skipped: dict[str, str], accelerator: Accelerator) -> None:
    """Log the broken images that are not in ``skipped``, and add them to it.

    Collective: every process must call it.
    """
    for images in (part for part in data if isinstance(part, ImageDataset)):
        for broken in gather_object([images.broken]):
            images.broken.update(broken)
        for path, problem in images.broken.items():
            if path not in skipped and accelerator.is_main_process:
                logger.warning("%s", printable(f"skipped: {problem}"))
        skipped.update(images.broken)


def check_classes(data: Iterable[Dataset[Any]]) -> None:
    """Raise ValueError if a class has no readable image."""
    for images in (part for part in data if isinstance(part, ImageDataset)):
        images.check_classes()
