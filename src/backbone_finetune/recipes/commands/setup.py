"""The model, the images and the objective of a run, from its settings."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator

from backbone_finetune import FineTuneModel

from ..data.augmentation import Augmentation
from ..data.images import ImageDataset, LabelledFolder, check_first_images
from ..data.sources.parts import find_data
from ..data.sources.rows import TEST, TRAIN, VALIDATION
from ..files import check_file
from ..models.base import BaseWeights, remember_base
from ..models.file import TrainedModel, build_transform
from ..models.foreign import WANTED
from ..objectives.kinds import MultiLabel, Regression, SingleLabel, SoftLabels
from ..objectives.objective import Objective
from ..together import run_on_main, together
from ..training.mixing import make_mixing
from ..training.phases import DEFAULT_LR, Phase, tuning_phases
from ..training.progress import EpochResult
from .initial_model import load_start
from .runs.run_folder import check_output_folder
from .settings import CLIPART, TrainSettings

TEST_SHARE = 0.3
OTHER_TARGETS = {MultiLabel: "labels", Regression: "values", SoftLabels: "probabilities"}


@dataclass(frozen=True, kw_only=True)
class Task(TrainedModel):
    """A model to train, and its images, in parts: "train", and "validation", "test" or both.

    ``base`` has the initial backbone if only changed tensors will be written.
    """

    weights: str
    base: BaseWeights | None
    parts: dict[str, ImageDataset]
    phases: tuple[Phase, ...]

    @property
    def train(self) -> ImageDataset:
        """The training images."""
        return self.parts[TRAIN]


def make_task(settings: TrainSettings, accelerator: Accelerator) -> Task:
    """Find the images by their names and build the model. Nothing is written."""
    parts = run_on_main(accelerator, lambda: _find_data(settings))
    train = parts[TRAIN]
    with together(accelerator):  # a file may be damaged, or missing, on one machine alone
        start, source, weights, is_trained = load_start(settings, train.class_names)
    model, data_config = start.model, start.data_config
    channels = data_config["input_size"][0]
    run_on_main(accelerator, lambda: check_first_images(train, channels))
    with together(accelerator):
        phases = choose_phases(settings, len(train.paths), model)
        if is_trained and phases[0].lr is None:  # a rate keeps the classifier
            phases = (replace(phases[0], lr=DEFAULT_LR), *phases[1:])
        for phase in reversed(phases):  # checks each; the model is then frozen as in the first
            model.freeze_backbone(trainable_groups=phase.trainable_groups)
    base = remember_base(model, source, weights) if settings.trainable_only else None
    transform, augment = build_transform(data_config), partial(build_transform, data_config)
    data = {name: ImageDataset(part, transform, augment=augment, channels=channels) for name, part in parts.items()}
    with together(accelerator):
        start = replace(start, objective=choose_objective(settings, train, start.objective))
        for phase in phases:  # checks
            make_mixing(phase, start.objective, model.num_classes)
            build_transform(data_config, phase.augment)
    return Task(**vars(start), weights=weights, base=base, parts=data, phases=phases)


def choose_phases(settings: TrainSettings, num_images: int, model: FineTuneModel) -> tuple[Phase, ...]:
    """Return the phases of a run: those of the settings, or of ``tune``; cached views need an augmentation."""
    if settings.tune and settings.phases != TrainSettings.phases:
        raise ValueError("tune and phases were both given; tune chooses the phases, so leave one of them out")
    phases = tuning_phases(num_images, model) if settings.tune else settings.phases
    if settings.views > 1 and all(phase.augment is None for phase in phases):
        return tuple(replace(phase, augment=Augmentation.LIGHT) for phase in phases)
    return phases


def _find_data(settings: TrainSettings) -> dict[str, LabelledFolder]:
    if settings.regression and settings.soft_labels:
        raise ValueError("regression and soft_labels were both given; leave one of them out")
    check_output_folder(settings.output, overwrite=settings.overwrite)
    if settings.checkpoint is not None:  # before all images are listed
        check_file(settings.checkpoint, WANTED)
    return find_data(
        settings.images or CLIPART,
        validation=settings.validation,
        test=settings.test,
        chooses=None if settings.monitor is None else settings.monitor != "off",
        test_share=TEST_SHARE,
        seed=settings.seed,
        values=settings.regression or settings.soft_labels or (),
        group=settings.group,
    )


def choose_objective(settings: TrainSettings, folder: LabelledFolder, start: Objective) -> Objective:
    """Return the objective for the targets of the training images; raise ValueError if a setting does not fit it.

    A model of the same values that is trained further keeps the scale of its classifier.
    """
    if isinstance(folder.targets[0], int):
        weights = None if settings.class_weights is None else balanced_weights(folder.targets)
        return SingleLabel(weights, settings.label_smoothing)
    objective: Objective = MultiLabel()
    if settings.soft_labels is not None:
        objective = SoftLabels()
    elif settings.regression is not None:
        objective = Regression().scaled_to(torch.tensor(folder.targets))
    have = f"are for one class per image; these images have {OTHER_TARGETS[type(objective)]}"
    if settings.class_weights is not None or settings.label_smoothing:
        raise ValueError(f"class_weights and label_smoothing {have}; leave them out")
    if settings.monitor not in {None, "loss", "off"} and not isinstance(objective, SoftLabels):
        raise ValueError(f"accuracies as a monitor {have}, and their monitor is {objective.main_metric}, loss or off")
    return start if isinstance(objective, Regression) and isinstance(start, Regression) else objective


def choose_monitor(settings: TrainSettings, task: Task) -> Callable[[EpochResult], float] | None:
    """Return the monitor of the best epoch; None keeps the last one."""
    main = task.objective.main_metric
    monitor = settings.monitor or (main if {VALIDATION, TEST} <= task.parts.keys() else "off")
    if monitor == "off":
        return None

    def rate(result: EpochResult) -> float:
        value = result.validation(monitor.replace("-", "_"))
        if monitor == "loss":
            value = None if result.validation_loss is None else -result.validation_loss
        return -math.inf if value is None else value

    return rate


def balanced_weights(targets: Sequence[int]) -> tuple[float, ...]:
    """Return the weight ``N / (K * count)`` of each class, as scikit-learn's "balanced"; each class has an image.

    >>> balanced_weights([0, 0, 0, 1])
    (0.6666666666666666, 2.0)
    """
    counts = Counter(targets)
    return tuple(len(targets) / (len(counts) * counts[target]) for target in sorted(counts))
