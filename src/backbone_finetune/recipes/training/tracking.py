"""Trackers of experiments, such as TensorBoard, through accelerate: settings at the start, figures after each epoch."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator

from ..text import one_line, printable
from .config import TrainerConfig
from .phases import Phase
from .progress import EpochResult

logger = logging.getLogger(__name__)

PROJECT = "backbone-finetune"


def flatten(settings: Any, name: str = "") -> dict[str, bool | int | float | str]:
    """Name each value of nested settings by its path, as trackers take them; others than numbers become texts.

    >>> flatten({"batch_size": 32, "phases": [{"epochs": 3, "lr": None}]})
    {'batch_size': 32, 'phases/1/epochs': 3, 'phases/1/lr': 'None'}
    """
    if isinstance(settings, Mapping):
        pairs = [(str(key), value) for key, value in settings.items()]
    elif isinstance(settings, Sequence) and not isinstance(settings, str):
        pairs = [(str(number), value) for number, value in enumerate(settings, start=1)]
    else:
        return {name: settings if isinstance(settings, bool | int | float) else str(settings)}
    inside = f"{name}/" if name else ""
    return {path: value for key, each in pairs for path, value in flatten(each, f"{inside}{key}").items()}


def epoch_figures(result: EpochResult) -> dict[str, float]:
    """Return the figures of an epoch by name, those that there are.

    >>> epoch_figures(EpochResult(1, 2.1, None, lr=0.1, weight_decay=0.0, validation_loss=2.0))
    {'train/loss': 2.1, 'validation/loss': 2.0, 'lr': 0.1, 'weight_decay': 0.0, 'phase': 1}
    """
    figures = {
        "train/loss": result.train_loss,
        "train/accuracy": result.train_accuracy,
        "validation/loss": result.validation_loss,
        "validation/accuracy": result.validation_accuracy,
        "validation/balanced_accuracy": result.validation_balanced_accuracy,
        **{f"validation/{name}": value for name, value in result.validation_metrics.items()},
        "lr": result.lr,
        "weight_decay": result.weight_decay,
        "phase": result.phase,
    }
    return {name: value for name, value in figures.items() if value is not None}


def start_trackers(config: TrainerConfig, phases: Sequence[Phase]) -> None:
    """Start the accelerator's trackers with the settings of a training, unless the caller has started them."""
    accelerator = config.accelerator
    if config.track and accelerator.log_with and not accelerator.trackers:
        settings = {"batch_size": config.batch_size, "seed": config.seed, "objective": config.objective}
        accelerator.init_trackers(PROJECT, flatten({**settings, "phases": [asdict(phase) for phase in phases]}))


def log_epoch(config: TrainerConfig, result: EpochResult) -> None:
    """Log the figures of an epoch to the accelerator's trackers."""
    if config.track:
        log_figures(config.accelerator, epoch_figures(result), result.epoch)


def log_figures(accelerator: Accelerator, figures: Mapping[str, float], step: int) -> None:
    """Log figures to each tracker of the main process. One that fails is reported, and does not end the run."""
    for tracker in accelerator.trackers if accelerator.is_main_process else ():
        with _reported(f"{tracker.name}: the figures of epoch {step} are not logged"):
            tracker.log(dict(figures), step=step)


def finish_trackers(accelerator: Accelerator) -> None:
    """Finish each tracker of the main process; one that fails is reported."""
    for tracker in accelerator.trackers if accelerator.is_main_process else ():
        with _reported(f"{tracker.name}: may not be complete"):
            tracker.finish()
    accelerator.trackers = []  # or accelerate would finish them again


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Log an error of a tracker, which must not end a training, with its text."""
    try:
        yield
    except Exception as error:
        logger.warning("%s: %s: %s", what, type(error).__name__, printable(one_line(error, most=300)))
