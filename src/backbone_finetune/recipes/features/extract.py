"""Run a frozen backbone once: what its classifier sees of every image."""

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
    """Run a frozen backbone once over ``(input, ..., target)`` batches: a dataset of ``(features, target)``, in order.

    A frozen backbone computes the same features in every epoch, so a classifier that trains on them trains as it would
    above the backbone, but without its cost. Where the backbone returns several tensors, each (B, ...) of any shape and
    dtype, in a tuple, list or dict, the dataset's ``tensors`` are ``(*features, targets)``, on the CPU.

    >>> model = FineTuneModel(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).freeze_backbone()
    >>> images = torch.utils.data.TensorDataset(torch.ones(3, 3), torch.tensor([0, 1, 1]))
    >>> features, targets = extract_features(model, DataLoader(images, batch_size=2)).tensors
    >>> tuple(features.shape), targets
    ((3, 4), tensor([0, 1, 1]))

    With a ``cache`` they are kept on disk, and used again when two things hold. The key is equal: each parameter and
    buffer to the bit, the class of each module, data, precision and versions. And eight images, spread over the
    dataset, give what is stored when they are read, transformed and run through the backbone now. A change that touches
    no weight and no class name, and acts on few images or stays below 1e-3 of the largest value (5e-2 under bf16), is
    not noticed. Otherwise they are computed again, and a line in the log says why. Without a cache they are in memory,
    or from a quarter of it on in a temporary folder; so they are where the cache's disk is full.

    Images go through convolutions in channels_last. The model's modes are left as they were.

    Args:
        model: its backbone is frozen.
        loader: gives each item once and in order.
        device: where the backbone runs; the model goes there and stays. By default where it is.
        cache: where to keep the features.
        autocast: run a float32 backbone under bf16 autocast on CUDA and on a CPU with bf16 instructions. What comes out
            in bf16 is widened to float32, so that a float32 classifier can train on it.
        compile: makes a faster callable of the backbone, as ``compile_openvino`` does. Where its answer on the first
            batch is not the backbone's, a line in the log says so and the backbone itself runs.
        title: show a progress bar under this name.

    Raises:
        ValueError: part of the backbone trains; the loader shuffles, drops images or has none; or what it or the
            backbone gives is not what can be stored.
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
    """Return the device of a module's first tensor, the CPU where it has none."""
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), torch.device("cpu"))


def _check_order(loader: DataLoader[Any]) -> None:
    """Raise ValueError where a loader does not give each image once and in order, as far as can be told."""
    if getattr(loader.batch_sampler, "drop_last", False):
        raise ValueError("the loader drops its last images; pass one with drop_last=False")
    for sampler in (getattr(loader.batch_sampler, "sampler", loader.sampler), loader.batch_sampler):
        if not (isinstance(loader.dataset, IterableDataset) or type(sampler) in _IN_ORDER):
            raise ValueError(
                f"the loader draws by {type(sampler).__name__}; pass one that gives every image in the dataset's "
                "order: DataLoader(dataset, batch_size)"
            )
