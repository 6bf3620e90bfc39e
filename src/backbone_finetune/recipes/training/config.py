"""How to train, whatever the phases: on which processes, by which batches, kept where."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass
from torch.utils.data import Dataset, TensorDataset
from typing_extensions import Self

from ..checking import NotNegative, Positive, Whole
from ..data.loading import default_workers
from ..features.cache import FeatureCache
from ..features.compiled import Compile
from .checkpoints import EpochResult
from .objectives import Objective, SingleLabel

__all__ = ["TrainerConfig", "count"]


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True, extra="forbid"))
class TrainerConfig:
    """How to train, whatever the phases: on which processes, by which batches, kept where.

    A step sees ``batch_size`` images, on however many processes and in ``accumulation`` parts one after another:
    these two change where the memory goes and not what is learnt. A checkpoint is written into ``checkpoints`` after
    each epoch and every ``checkpoint_steps`` steps, features are kept in ``caches`` (training, test), and are computed
    under bf16 autocast where the device gains from it, but for ``autocast_features=False``. ``workers`` processes load
    images, None for a number by the cores and the images; the result is the same for any number. ``compile`` makes a
    faster callable of a frozen backbone; see ``extract_features``. Features that take more than ``memory_share`` of the
    machine's memory stay on disk; ``cache_features=False`` runs the whole model in every step. Where the training
    images are drawn at random, ``views`` of each are computed once, and epoch e shows view (e + index) mod ``views``
    of an image; 1 draws them anew in each epoch, and runs the whole model.

    ``objective`` says what the targets are, and holds the settings of the loss: `SingleLabel` for class indices,
    `SoftLabels`, `MultiLabel` or `Regression`. It is one for all phases, so that the losses of all epochs compare.

    With ``monitor``, a function of an epoch's result, the weights after the epoch for which it is largest are kept, as
    in ``monitor=lambda result: result.validation_accuracy``; else those after the last epoch. A phase ends early after
    ``patience`` epochs that are no better.

    >>> TrainerConfig(Accelerator(cpu=True)).batch_size
    32
    """

    accelerator: Accelerator
    batch_size: Positive = 32
    accumulation: Positive = 1
    seed: Whole = 0
    checkpoints: Path | None = None
    # A step of a whole network takes 0.1 to 1 s, so a killed run loses minutes at most; a step of a classifier on
    # features takes under a millisecond, so that a checkpoint of some 10 ms costs it about 1 %.
    checkpoint_steps: Positive = 1000
    caches: tuple[FeatureCache, FeatureCache] | None = None
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

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.patience is not None and self.monitor is None:
            raise ValueError("patience was given without monitor, which says how good an epoch is")
        return self

    def workers_for(self, data: Dataset[Any]) -> int:
        """Choose how many processes load a dataset."""
        if self.workers is not None or isinstance(data, TensorDataset):
            return self.workers or 0
        return default_workers(count(data), processes=self.accelerator.num_processes)

    @property
    def shows(self) -> bool:
        """Whether this process is the one that shows progress."""
        return self.show_progress and self.accelerator.is_main_process


def count(data: Dataset[Any]) -> int:
    """Count a dataset's images; torch's Dataset declares no length, those used here have one."""
    return len(data)  # type: ignore[arg-type]
