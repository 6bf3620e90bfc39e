"""Run a frozen backbone once, and return the features of every image."""

from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from backbone_finetune import FineTuneModel

from .cache import FeatureCache
from .compiled import Compile
from .dataset import Features
from .frozen_pass import FrozenPass, autocast_dtype, front_of_backbone, in_eval
from .rows import compute_rows

_IN_ORDER = {SequentialSampler, BatchSampler, type(None)}


def extract_features(
    model: FineTuneModel,
    loader: DataLoader[Any],
    *,
    device: torch.device | None = None,
    cache: FeatureCache | None = None,
    autocast: bool = True,
    compile: Compile | None = None,  # noqa: A002
    title: str | None = None,
) -> Features:
    """Run a frozen backbone once over ``(input, ..., target)`` batches, and return a dataset of ``(features, target)``.

    A frozen backbone computes the same features in every epoch, so a classifier trains on them in the same way as
    on the backbone, without its cost. If the backbone returns several tensors, each (B, ...) of any shape and
    dtype, in a tuple, list or dict, the dataset's ``tensors`` are ``(*features, targets)``, on the CPU.

    >>> model = FineTuneModel(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).freeze_backbone()
    >>> images = torch.utils.data.TensorDataset(torch.ones(3, 3), torch.tensor([0, 1, 1]))
    >>> features, targets = extract_features(model, DataLoader(images, batch_size=2)).tensors
    >>> tuple(features.shape), targets
    ((3, 4), tensor([0, 1, 1]))

    With a ``cache`` they are kept on disk, and used again under two conditions. The key is equal: each parameter and
    buffer, the class of each module, data, precision and versions. And eight images, spread over the
    dataset, have the stored features when they are read, transformed and run through the backbone now. A change of
    neither weights nor class names that affects few images or is below 1e-3 of the largest value (5e-2 under bf16) is
    not detected. Otherwise they are recomputed, and the log has the reason. Without a cache they are in memory,
    or, if larger than a quarter of it, in a temporary folder; the same if the cache's disk is full.

    Convolutions run in channels_last. The model's modes do not change.

    Args:
        model: its backbone is frozen.
        loader: returns each item once and in order.
        device: where the backbone runs; the model is moved there. Default: its present device.
        cache: where to keep the features.
        autocast: run a float32 backbone under bf16 autocast on CUDA and on a CPU with bf16 instructions. Outputs
            in bf16 are converted to float32, so that a float32 classifier can train on them.
        compile: returns a faster callable for the backbone, e.g. ``compile_openvino``. If its output on the first
            batch differs from the backbone's, that is logged and the backbone itself runs.
        title: show a progress bar with this title.

    Raises:
        ValueError: part of the backbone trains; the loader shuffles, drops images or has none; or its items or outputs
            of the backbone cannot be stored.
    """
    _check_order(loader)
    front = front_of_backbone(model)
    device = device or find_device_of(model)
    model.to(device)
    dtype = autocast_dtype(model.backbone, device) if autocast else None
    share = FeatureCache.memory_share if cache is None else cache.memory_share
    with in_eval(front.module):
        run = FrozenPass(front, device, dtype, compile=compile)
        return compute_rows(run, loader, cache=cache, memory_share=share, title=title)


def find_device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first tensor, the CPU if it has none."""
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), torch.device("cpu"))


def _check_order(loader: DataLoader[Any]) -> None:
    """Raise ValueError if a loader is known not to return each image once and in order."""
    if getattr(loader.batch_sampler, "drop_last", False):
        raise ValueError("the loader drops its last images; pass one with drop_last=False")
    for sampler in (getattr(loader.batch_sampler, "sampler", loader.sampler), loader.batch_sampler):
        if not (isinstance(loader.dataset, IterableDataset) or type(sampler) in _IN_ORDER):
            raise ValueError(
                f"the loader draws by {type(sampler).__name__}; pass one that gives every image in the dataset's "
                "order: DataLoader(dataset, batch_size)"
            )
