"""The data of a phase: outputs of frozen modules, computed once for each image if they are the same in every epoch."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from backbone_finetune import FineTuneModel

from ..data.augmentation import Augmentation
from ..data.fingerprint import find_randomness
from ..data.images import ImageDataset, is_read
from ..data.loading import DeviceLoader
from ..data.targets import split_row
from ..features.cache import backbone_fingerprint, bytes_per_row, layout_of
from ..features.dataset import Features, on_device, select_rows
from ..features.frozen_pass import (
    FrozenPass,
    UncacheableError,
    autocast_dtype,
    find_front,
    front_of_backbone,
    has_trainable,
    in_eval,
    load_sample,
)
from ..features.rows import compute_rows
from ..features.running import Runner
from ..rng import preserve_rng_state
from ..sending import send
from ..together import together
from .config import TrainerConfig, count
from .phases import Phase

logger = logging.getLogger(__name__)

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class PhaseData:
    """The data of a phase, and the module that trains on it.

    Args:
        train: Images, or rows: all images of the first view, then those of the second, and so on.
        validation: Images, or rows; None if there is none.
        module: The part of the model that runs in each step: all of it, or the part after the cached tensors.
        on_features: Whether the whole backbone is frozen, so that the rows are features and the module a classifier.
        views: The views of each image.
        why_uncached: Why the data is images; None if it is rows of cached tensors.
    """

    train: Dataset[Any]
    validation: Dataset[Any] | None
    module: nn.Module
    on_features: bool = False
    views: int = 1
    why_uncached: str | None = None

    def on_device(self, device: torch.device) -> "PhaseData":
        """Return the data with features on a device, as far as its memory suffices.

        Rows of a frontier are larger, and training layers on them takes memory and hides their transfer.
        """
        if not (self.on_features and isinstance(self.train, Features)):
            return self
        validation = on_device(self.validation, device) if isinstance(self.validation, Features) else None
        return replace(self, train=on_device(self.train, device), validation=validation)


class Fold(Subset[Any]):
    """A subset of a dataset, whose rows are taken from those of the whole dataset.

    Args:
        dataset: The whole dataset.
        indices: The images of the subset.
        computed: The rows of the whole dataset, shared with other folds.
    """

    def __init__(self, dataset: Dataset[Any], indices: Sequence[int], computed: dict[str, Features]) -> None:
        super().__init__(dataset, indices)
        self.computed = computed

    def select(self, rows: Features) -> Features:
        """Return the rows of these images, in each view."""
        count_of_all = count(self.dataset)
        views = torch.arange(len(rows) // count_of_all, device="cpu")[:, None] * count_of_all
        return select_rows(rows, (views + torch.tensor(self.indices, device="cpu")).flatten())


def _whole(data: Dataset[Any]) -> Dataset[Any]:
    """Return the dataset whose rows are computed."""
    return data.dataset if isinstance(data, Fold) else data


def _without_whole(data: Dataset[Any]) -> Dataset[Any]:
    """Return a dataset to load directly; one of image files, so that broken ones can be skipped."""
    if not (isinstance(data, Fold) and isinstance(data.dataset, ImageDataset)):
        return data
    return ImageDataset(
        data.dataset.folder.select(data.indices), data.dataset.transform, channels=data.dataset.channels
    )


def _augmented(data: Dataset[Any], augmentation: Augmentation) -> Dataset[Any]:
    """Return a dataset of image files with augmented images."""
    if isinstance(data, Fold):
        return Fold(_augmented(data.dataset, augmentation), data.indices, data.computed)
    if isinstance(data, ImageDataset):
        return data.augmented(augmentation)
    raise ValueError(
        f"Phase(augment=...) was given, and the training data is a {type(data).__name__}; pass an ImageDataset, or "
        "leave augment out and give the dataset a random transform"
    )


def prepare_data(
    model: FineTuneModel,
    train: Dataset[Any],
    validation: Dataset[Any] | None,
    config: TrainerConfig,
    phase: Phase | None = None,
    *,
    name: str = "train",
) -> PhaseData:
    """Run frozen modules once for each image, if the images are the same in each epoch or views are cached.

    Otherwise the log has the reason, and the whole model runs in every step. A ``phase`` may augment or mix images.
    ``name`` says what ``train`` is in the progress and the caches: "train", "validation" or "test".

    >>> from accelerate import Accelerator
    >>> model = FineTuneModel(nn.Linear(3, 4), nn.Linear(4, 2)).freeze_backbone()
    >>> images = [(torch.ones(3), 0), (torch.ones(3), 1)]
    >>> data = prepare_data(model, images, None, TrainerConfig(Accelerator(cpu=True), show_progress=False))
    >>> data.module, [tuple(tensor.shape) for tensor in data.train.tensors]
    (Linear(in_features=4, out_features=2, bias=True), [(2, 4), (2,)])
    """
    phase = Phase() if phase is None else phase
    if phase.augment is not None:
        train = _augmented(train, phase.augment)
    whole = PhaseData(_without_whole(train), None if validation is None else _without_whole(validation), model)
    if not config.cache_features:
        return replace(whole, why_uncached="--cache off (in Python: cache_features=False)")
    trains = [parameter.requires_grad for parameter in model.backbone.parameters()]
    if trains and all(trains):
        return replace(whole, why_uncached="no layer is frozen")
    drawn = find_randomness(_whole(train))
    if drawn is not None and phase.augment is not None:
        drawn = (
            "the phase draws new images in each epoch; --views K (in Python: TrainerConfig(views=K)) caches K of each, "
            "and --augment none the images themselves"
        )
    if phase.mixup or phase.cutmix:
        drawn = "mixup and CutMix mix the images of each step"
    views = config.views if drawn is not None and not (phase.mixup or phase.cutmix) else 1
    reason = (drawn if views == 1 else None) or (None if validation is None else find_randomness(_whole(validation)))
    if reason is None:
        try:
            with preserve_rng_state():
                parts = {name: train} if validation is None else {name: train, "validation": validation}
                return _compute(model, parts, config, phase, views)
        except UncacheableError as error:
            reason = str(error)
    if config.accelerator.is_main_process:
        logger.warning("features are not cached, and the whole model runs in every step: %s", reason)
    return replace(whole, why_uncached=reason)


def _compute(
    model: FineTuneModel, parts: Mapping[str, Dataset[Any]], config: TrainerConfig, phase: Phase, views: int
) -> PhaseData:
    """Compute the rows of each part, the first in views; raise UncacheableError if the frozen modules have none."""
    model.to(config.accelerator.device)
    name, train = next(iter(parts.items()))
    views_of = {part: views if part == name else 1 for part in parts}
    loaders = {
        part: DeviceLoader(
            _whole(data),
            config.accelerator.device,
            batch_size=config.batch_size,
            workers=config.workers_for(_whole(data), computing=True, views=views_of[part]),
            views=views_of[part],
            seed=f"{config.seed} view",
        )
        for part, data in parts.items()
    }
    run = _make_pass(model, loaders[name], config)
    front, is_frozen = run.front, run.front.module is model.backbone
    drawn = {name: f" in {views} views of seed {config.seed}: {phase.augment}" if views > 1 else ""}
    caches = {
        part: replace(cache, data_fingerprint=cache.data_fingerprint + drawn.get(part, ""))
        for part, cache in zip(("train", "validation", "test"), config.caches or (), strict=False)
    }
    if isinstance(train, Fold):  # all folds have the same frozen modules, unless an earlier phase trained them
        key = f"{backbone_fingerprint(front.backbone, front.trained)} {front.description} {run.dtype}"
    computed: dict[str, Features] = {}
    with in_eval(front.module):
        if config.shows and not is_frozen and not isinstance(train, Fold):
            size = sum(map(bytes_per_row, layout_of(run.sample(loaders[name]).tensors[:-1])))
            images = sum(views_of[part] * count(data) for part, data in parts.items())
            logger.info("caching %s: %.1f MB for %d images", front.description, size * images / 1e6, images)
        for part, data in parts.items():
            compute = partial(
                compute_rows,
                run,
                loaders[part],
                # A fold trains on rows of all training images; those it is evaluated on may be other views of them.
                cache=None if isinstance(data, Fold) and part == "validation" else caches.get(part),
                memory_share=config.memory_share,
                accelerator=config.accelerator,
                title=f"features, {part}" if config.shows else None,
            )
            if isinstance(data, Fold):
                shared = key + drawn.get(part, "")
                rows = data.select(data.computed.get(shared) or data.computed.setdefault(shared, compute()))
            else:
                rows = compute()
            targets = rows.tensors[-1]
            config.objective.check(part, targets[is_read(targets)], model.num_classes)
            if isinstance(data, ImageDataset):
                data.skip_ignored(targets[: count(data)])
            computed[part] = rows
    return PhaseData(computed[name], computed.get("validation"), front.rest, on_features=is_frozen, views=views)


def _make_pass(model: FineTuneModel, loader: DeviceLoader, config: TrainerConfig) -> FrozenPass:
    """Return the pass of the frozen modules; all processes have it, or raise UncacheableError."""
    accelerator, device = config.accelerator, config.accelerator.device
    if not has_trainable(model.backbone):
        dtype = autocast_dtype(model.backbone, device) if config.autocast_features else None
        return FrozenPass(front_of_backbone(model), device, dtype, compile=config.compile)
    if accelerator.is_fsdp2:
        raise UncacheableError("FSDP2 shards the model")
    dtype = PRECISIONS.get(accelerator.mixed_precision)  # of the steps, so that they equal those of the whole model
    with together(accelerator):
        inputs, _ = split_row(load_sample(loader))
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            inputs = [send(tensor, device) for tensor in inputs]
            front = Runner().in_fast_layout(partial(find_front, model), inputs, model)
    if config.compile is not None and accelerator.is_main_process:
        logger.warning("features: not compiled; a compiler takes a backbone that is frozen as a whole")
    return FrozenPass(front, device, dtype, widens=False)
