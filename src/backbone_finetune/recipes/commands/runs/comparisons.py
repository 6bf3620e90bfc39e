"""What is measured beside a trained model, for which no run fails: folds, baselines and the time of a backward pass."""

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import default_collate

from backbone_finetune import FineTuneModel

from ...data.images import ImageDataset
from ...data.sources.rows import TRAIN
from ...features.cache import FeatureCache
from ...features.dataset import Features
from ...objectives.kinds import SingleLabel
from ...rng import seed_everything
from ...text import one_line
from ...together import OUT_OF_MEMORY, is_alone, is_on_all_processes, run_on_main
from ...training.config import TrainerConfig
from ...training.folds import cross_predict, split_folds
from ...training.loop import fine_tune
from ...training.phase_data import prepare_data
from ...training.scoring import evaluate
from ..nearest import score_neighbors
from ..reporting.figures import Answers, make_answers
from ..settings import TrainSettings
from ..setup import Task
from .baselines import measure_backward, pixel_model, random_model
from .held_out import held_out, held_out_part
from .metrics import Metrics

logger = logging.getLogger(__name__)

TIMED_BATCH_SIZE = 16
FOLDS = 5  # where labels are checked and no number is given


@contextmanager
def left_out_if_it_fails(accelerator: Accelerator | None, name: str) -> Iterator[None]:
    """Leave out the rest of the block, and log that, if the memory is too small for it, or if it raises a ValueError.

    A `DivergedError` is such an error.

    >>> with left_out_if_it_fails(None, "curves.png"):
    ...     raise torch.OutOfMemoryError("CUDA out of memory")

    If several processes run the block, pass their accelerator. All of them leave it out after an error that `together`
    raised on all, and they diverge together. Any other error is raised: the others would wait for this process.
    """
    try:
        yield
    except (*OUT_OF_MEMORY, ValueError) as error:
        if not (is_alone(accelerator) or is_on_all_processes(error)):
            raise
        if accelerator is None or accelerator.is_main_process:
            why = one_line(error, most=200)
            why = why if isinstance(error, ValueError) else f"the memory is too small ({why})"
            logger.warning("%s: left out, %s", name, why)


def predict_folds(
    metrics: Metrics, settings: TrainSettings, task: Task, config: TrainerConfig, model: FineTuneModel
) -> tuple[Metrics, dict[str, Answers]]:
    """Predict the training images by models that did not train on them (`cross_predict`), and add each fold's accuracy.

    Frozen modules run over the images at most once more. The answers are by the name of the part, "train".
    """
    config, folds = replace(config, show_progress=False), settings.folds or FOLDS
    with left_out_if_it_fails(config.accelerator, "folds"):
        rows = cross_predict(model, task.train, task.phases, config, folds=folds)

        def answer(images: Iterable[int]) -> Answers:
            read = [index for index in images if not rows[index].isnan().any()]
            return make_answers(task.train.folder.select(read), rows[read], task.objective)

        if settings.folds is not None:
            parts = split_folds(task.train, folds, config.seed)
            accuracies = (answer(part).measure()[config.objective.main_metric] for part in parts)
            metrics = replace(metrics, fold_accuracies=tuple(accuracies))
        return metrics, {TRAIN: answer(range(len(rows)))}
    return metrics, {}


def add_baselines(metrics: Metrics, settings: TrainSettings, task: Task, config: TrainerConfig) -> Metrics:
    """Train the baselines, and time the backward pass."""
    accelerator, num_classes = config.accelerator, len(metrics.class_names)
    if accelerator.is_main_process:
        logger.info("training the same classifier on a random backbone and on raw pixels, to compare")
    seed_everything(settings.seed)
    # As many epochs as the model, with the first phase's rates, and always frozen.
    phase = replace(
        task.phases[0], epochs=len(metrics.history), trainable_groups=0, augment=None, mixup=0.0, cutmix=0.0
    )
    baseline_config = replace(config.aside(), caches=None, compile=None, show_progress=False)

    def compare(model: FineTuneModel) -> float:
        fine_tune(model, task.train, None, [phase], baseline_config)
        return evaluate(model, held_out(task), baseline_config).metrics[config.objective.main_metric]

    with left_out_if_it_fails(accelerator, "random backbone"):
        random = random_model(task.model, task.architecture, num_classes, **task.arguments)
        metrics = replace(metrics, random_backbone=compare(random))
    if isinstance(config.objective, SingleLabel):
        with left_out_if_it_fails(accelerator, "nearest neighbours"):
            metrics = replace(metrics, nearest_neighbors=_measure_neighbors(task, baseline_config, config.caches))
    with left_out_if_it_fails(accelerator, "raw pixels"):
        metrics = replace(metrics, raw_pixels=compare(pixel_model(num_classes, task.train.channels)))
    with left_out_if_it_fails(accelerator, "backward"):
        times = run_on_main(
            accelerator, lambda: measure_backward(task.model, *_first_batch(task.train, accelerator.device))
        )
        return replace(metrics, backward_milliseconds=times)
    return metrics


def _measure_neighbors(task: Task, config: TrainerConfig, caches: tuple[FeatureCache, ...] | None) -> float | None:
    """Return the accuracy of the nearest neighbours on the trained backbone; its cached features are used again."""
    model, config = copy.deepcopy(task.model).freeze_backbone(), replace(config, views=1, cache_features=True)
    if any(phase.augment is not None for phase in task.phases):  # the cache may have augmented views
        caches = None
    config = replace(config, caches=caches)
    known = prepare_data(model, task.train, None, config).train
    asked = prepare_data(model, held_out(task), None, config, name=held_out_part(task)).train
    if not (isinstance(known, Features) and isinstance(asked, Features)):
        return None
    return run_on_main(config.accelerator, lambda: score_neighbors(known, asked, len(task.class_names)).value)


def _first_batch(data: ImageDataset, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first images, at most 16, to time a step: ``(B, C, H, W)`` and ``(B,)``."""
    readable = ImageDataset(data.readable(), data.transform, channels=data.channels)
    inputs, targets = default_collate([readable[index] for index in range(min(TIMED_BATCH_SIZE, len(readable)))])
    return inputs.to(device), targets.to(device)
