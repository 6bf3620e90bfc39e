"""Phases of a training run, each with its own trainable layers and learning rates."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.dataclasses import dataclass
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.step_lr import StepLRScheduler
from typing_extensions import Self

from backbone_finetune import FineTuneModel

from ..checking import Above0, NotNegative, Positive, Whole
from ..data.augmentation import AUGMENTATIONS, Augmentation
from ..files import check_file
from ..text import describe_fault

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Of `tuning_phases`.
IMAGES_SEEN = 2500  # by each phase that trains layers
FEWEST_EPOCHS, MOST_EPOCHS = 3, 10
HEAD_RATE, LAST_RATE, ALL_RATE = 1e-3, 3e-4, 1e-4

DEFAULT_LR = 1e-3  # of a classifier that does not start from zero


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Phase:
    """A part of a training in which the same layers train.

    Head first, then everything (LP-FT, Kumar et al. 2022):

    >>> [phase.epochs for phase in (Phase(epochs=20), Phase(epochs=5, trainable_groups=5, lr=1e-4, cosine=True))]
    [20, 5]

    Args:
        epochs: The number of passes over the training images.
        trainable_groups: The number of last layer groups of the backbone that train; 0 trains the
            classifier alone.
        lr: Learning rate of the classifier. None means 1e-3; but in a first phase with a frozen backbone a linear
            classifier then starts from zero, whatever its weights, at a rate that fits the size of the features.
            Pass a rate to train further from the weights of the model.
        backbone_lr: Learning rate of the backbone's last layer.
        layer_decay: Factor on the rate for each layer towards the input, as in BEiT.
        weight_decay: Weight decay of AdamW. None means 0.01.
        warmup_epochs: Epochs, or a fraction of one, in which the rates rise from 0.
        cosine: Whether the rates fall to 0 at the end (Loshchilov and Hutter, 2017).
        norm_eval: Whether the backbone's running statistics are fixed even if its weights train. On few images,
            trainable statistics cost accuracy (benchmarks/results/learning.md), but random weights need them.
        standardize: Whether the classifier of a frozen backbone trains on features of mean 0 and standard deviation 1
            over the training images. At the end of the phase both are folded into its first linear layer. It makes the
            rates independent of the scale of the features; it takes cached features, and memory for a copy of them.
        augment: The random changes of the training images, for an `ImageDataset`. New ones are drawn in each
            epoch, so that nothing is cached and the whole model runs in every step, unless ``TrainerConfig(views=K)``
            caches K views. None trains on the image itself.
        mixup: Alpha of mixup (Zhang et al. 2018), which averages the images of a batch in pairs, and their targets;
            0 for none. Nothing is cached.
        cutmix: Alpha of CutMix (Yun et al. 2019), which pastes a part of one image of a pair into the other; with
            ``mixup``, each step has one of both.

    Raises:
        ValueError: a value is of the wrong type or out of range (pydantic's ``ValidationError``).
    """

    epochs: Positive = 30
    trainable_groups: Whole = 0
    lr: Above0 | None = None
    backbone_lr: Above0 = 1e-4
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    weight_decay: NotNegative | None = None
    warmup_epochs: NotNegative = 0.0
    cosine: bool = False
    norm_eval: bool = True
    standardize: bool = False
    augment: Augmentation | None = None
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if not self.warmup_epochs <= self.epochs:
            raise ValueError(
                f"warmup_epochs = {self.warmup_epochs}: expected a number from 0 to its {self.epochs} epochs"
            )
        if self.standardize and self.trainable_groups:
            raise ValueError(
                f"standardize was given with trainable_groups = {self.trainable_groups}; it is for a frozen backbone, "
                "whose features do not change"
            )
        return self


class _PhasesFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]

    @field_validator("phases", mode="before")
    @classmethod
    def _name_augmentations(cls, phases: Any) -> Any:
        for phase in phases if isinstance(phases, list) else ():
            if isinstance(phase, dict) and isinstance(name := phase.get("augment"), str):
                if name not in AUGMENTATIONS:
                    raise ValueError(f"augment = {name!r}: expected {', '.join(AUGMENTATIONS)}, or a table")
                phase["augment"] = AUGMENTATIONS[name]
        return phases


def read_phases(path: Path) -> tuple[Phase, ...]:
    r"""Read the phases of a run from a TOML file: a ``[[phases]]`` table each, with the arguments of a ``Phase``.

    ``augment`` is "none", "light" or "strong", or a table with the arguments of an ``Augmentation``.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "phases.toml")
    ...     _ = path.write_text("[[phases]]\nepochs = 20\n\n[[phases]]\nepochs = 5\ntrainable_groups = 1\n")
    ...     [(phase.epochs, phase.trainable_groups) for phase in read_phases(path)]
    [(20, 0), (5, 1)]

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no TOML file, has no phases, or an entry of a phase is unknown or out of range.
    """
    wanted = f"pass a TOML file with [[phases]] tables, each with some of {', '.join(f.name for f in fields(Phase))}"
    check_file(path, wanted)
    try:
        return _PhasesFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).phases
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML ({error})") from error
    except ValidationError as error:
        raise ValueError(f"{path}: {describe_fault(error)}; {wanted}") from error


def tuning_phases(num_images: int, model: FineTuneModel) -> tuple[Phase, ...]:
    """Return phases that train the head, then the last third of the layer groups too, then everything.

    The order is that of LP-FT (Kumar et al. 2022): a head that fits first, so that the steps of a random head do not
    distort the backbone. Lengths follow from the number of images, as in BiT's HyperRule (Kolesnikov et al. 2020):
    each phase that trains layers sees about 2,500 images, in 3 to 10 epochs, with new crops and mirror images in each.
    Its rates fall along a cosine, the backbone's from 3e-4 for the last groups and from 1e-4 for everything. On two
    sets of few images this is better than a head alone, and on one of them than plain fine-tuning
    (benchmarks/results/tuning.md).

    >>> model = FineTuneModel.from_timm("test_resnet", num_classes=2)
    >>> [(phase.epochs, phase.trainable_groups) for phase in tuning_phases(100, model)]
    [(30, 0), (10, 2), (10, 5)]
    >>> [(phase.epochs, phase.trainable_groups) for phase in tuning_phases(100_000, model)]
    [(30, 0), (3, 2), (3, 5)]

    Args:
        num_images: The number of training images.
        model: Its layer groups are counted.
    """
    groups = len(model.layer_groups)
    epochs = min(max(round(IMAGES_SEEN / num_images), FEWEST_EPOCHS), MOST_EPOCHS)
    last = -(-groups // 3)
    steps = [(last, LAST_RATE), (groups, ALL_RATE)] if last < groups else [(groups, ALL_RATE)]
    return (
        Phase(epochs=30),
        *(
            Phase(
                epochs=epochs,
                trainable_groups=count,
                lr=HEAD_RATE,
                backbone_lr=rate,
                weight_decay=0.01,
                warmup_epochs=1,
                cosine=True,
                augment=Augmentation.LIGHT,
            )
            for count, rate in steps
        ),
    )


def make_schedule(optimizer: torch.optim.Optimizer, phase: Phase, steps_per_epoch: int) -> Scheduler:
    """Return the schedule of a phase's learning rates, which depend only on the number of the step.

    >>> optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0)
    >>> schedule, rates = make_schedule(optimizer, Phase(epochs=4, warmup_epochs=1, cosine=True), 2), []
    >>> for step in range(1, 9):
    ...     schedule.step_update(step)
    ...     rates.append(round(optimizer.param_groups[0]["lr"], 2))
    >>> rates
    [0.5, 1.0, 0.95, 0.81, 0.61, 0.39, 0.19, 0.05]
    """
    steps, warmup = phase.epochs * steps_per_epoch, round(phase.warmup_epochs * steps_per_epoch)
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate may have wrapped it
    if phase.cosine:  # one step longer than the phase, so that the last step has a positive rate
        return CosineLRScheduler(
            inner, steps - warmup + 1, warmup_t=warmup, warmup_lr_init=0, warmup_prefix=True, t_in_epochs=False
        )
    return StepLRScheduler(inner, steps + 1, decay_rate=1, warmup_t=warmup, warmup_lr_init=0, t_in_epochs=False)
