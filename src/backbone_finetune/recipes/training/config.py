"""The settings of a training that are the same in all phases."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass
from torch.utils.data import Dataset, TensorDataset
from typing_extensions import Self

from ..checking import NotNegative, Positive, Whole
from ..data.loading import FEWEST_IMAGES, default_workers
from ..features.cache import FeatureCache
from ..features.compiled import Compile
from ..objectives.kinds import SingleLabel
from ..objectives.objective import Objective
from .progress import EpochResult

FEWEST_COMPUTED = 128  # images for which starting processes is faster, if they also compute


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True, extra="forbid"))
class TrainerConfig:
    """The settings of a training that are the same in all phases.

    A step has ``batch_size`` images, on any number of processes and in ``accumulation`` consecutive parts:
    these two change the use of memory, but not the result. A checkpoint is written into ``checkpoints`` after
    each epoch and every ``checkpoint_steps`` steps, features are kept in ``caches`` (training, validation, test), and
    are under bf16 autocast if that is faster, except with ``autocast_features=False``. ``workers`` processes load
    images, None for a number by cores and images; the result is the same for any number. ``compile`` returns a
    faster callable for a frozen backbone; see ``extract_features``. Features of more than ``memory_share`` of the
    machine's memory stay on disk; ``cache_features=False`` runs the whole model in every step. If the training
    images are random, ``views`` views of each are computed once, and epoch e uses view (e + index) mod ``views``
    of an image; 1 draws new ones in each epoch, and runs the whole model.

    ``objective`` is the kind of targets, with the settings of the loss: `SingleLabel` for class indices,
    `SoftLabels`, `MultiLabel` or `Regression`. It is the same in all phases, so that losses are comparable.

    With ``monitor``, a function of an epoch's result, the weights after the epoch with its largest value are kept, e.g.
    ``monitor=lambda result: result.validation_accuracy``; else those after the last epoch. A phase ends early after
    ``patience`` epochs without improvement.

    Each epoch is logged to the trackers of the accelerator, e.g. ``Accelerator(log_with="tensorboard",
    project_dir="runs")``, which are started if they are not; its ``end_training()`` finishes them. ``track=False`` does
    not log.

    >>> TrainerConfig(Accelerator(cpu=True)).batch_size
    32
    """

    accelerator: Accelerator
    batch_size: Positive = 32
    accumulation: Positive = 1
    seed: Whole = 0
    checkpoints: Path | None = None
    # A step of a whole network takes 0.1 to 1 s, so a killed run loses at most minutes; a step of a classifier on
    # features takes under a millisecond, so that a checkpoint of some 10 ms costs it about 1 %.
    checkpoint_steps: Positive = 1000
    caches: tuple[FeatureCache, ...] | None = None
    autocast_features: bool = True
    workers: Whole | None = None
    compile: Compile | None = None
    memory_share: NotNegative = FeatureCache.memory_share
    cache_features: bool = True
    views: Positive = 1
    objective: Objective = SingleLabel()
    monitor: Callable[[EpochResult], float] | None = None
    patience: Positive | None = None
    show_progress: bool = True
    track: bool = True

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.patience is not None and self.monitor is None:
            raise ValueError(
                "patience was given without monitor, which says how good an epoch is; pass one "
                "(train --monitor accuracy)"
            )
        return self

    def aside(self) -> Self:
        """Return the settings of a training beside the main one: no checkpoints, nothing chosen, and no trackers."""
        return replace(self, checkpoints=None, monitor=None, patience=None, track=False)

    def workers_for(self, data: Dataset[Any], *, computing: bool = False, views: int = 1) -> int:
        """Return the number of processes that load a dataset; ``computing`` ones run frozen modules too on a CPU."""
        if self.workers is not None or (isinstance(data, TensorDataset) and not computing):
            return self.workers or 0
        fewest = FEWEST_COMPUTED if computing and self.accelerator.device.type == "cpu" else FEWEST_IMAGES
        return default_workers(views * count(data), processes=self.accelerator.num_processes, fewest=fewest)

    @property
    def shows(self) -> bool:
        """Whether this process shows progress."""
        return self.show_progress and self.accelerator.is_main_process


def count(data: Dataset[Any]) -> int:
    """Return the length of a dataset, which torch's Dataset does not declare."""
    return len(data)  # type: ignore[arg-type]
