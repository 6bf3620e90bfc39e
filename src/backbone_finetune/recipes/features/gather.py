"""Features that several processes compute together: each its own rows of one folder that all see."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import Dataset

from backbone_finetune import FineTuneModel

from ..data.determinism import find_randomness
from ..data.loading import DeviceLoader
from ..data.targets import check_targets
from ..rng import preserve_rng_state
from .backbone_pass import UncacheableError, backbone_batches, in_eval
from .cache import FeatureCache, FeatureStore, UnwritableStoreError, layout_of
from .compiled import Compile
from .extract import (
    MEMORY_SHARE,
    Features,
    count_images,
    extract_features,
    load_if_fits,
    matching_rows,
    open_store,
    prepare_backbone,
    rows_of,
    spread_rows,
)

__all__ = ["gather_features", "gather_phase"]

logger = logging.getLogger(__name__)


def gather_phase(
    model: FineTuneModel,
    train: Dataset[Any],
    test: Dataset[Any],
    *,
    batch_size: int,
    accelerator: Accelerator,
    caches: tuple[FeatureCache | None, FeatureCache | None] = (None, None),
    autocast: bool = True,
    workers: tuple[int, int] = (0, 0),
    compile: Compile | None = None,  # noqa: A002
    show_progress: bool = False,
) -> tuple[Dataset[Any], Dataset[Any], bool]:
    """Compute the features of training and test data once; returns both, and True.

    Where they cannot be used in every epoch, a line in the log says why, and the data comes back with False.

    >>> import torch
    >>> model = FineTuneModel(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).freeze_backbone()
    >>> images = [(torch.ones(3), 0), (torch.ones(3), 1)]
    >>> features, _, _ = gather_phase(model, images, images, batch_size=2, accelerator=Accelerator(cpu=True))
    >>> [tuple(tensor.shape) for tensor in features.tensors]
    [(2, 4), (2,)]
    """
    reason = find_randomness(train) or find_randomness(test)
    if reason is None:
        try:
            computed = [
                gather_features(
                    model,
                    data,
                    batch_size=batch_size,
                    accelerator=accelerator,
                    cache=cache,
                    autocast=autocast,
                    title=f"features, {name}" if show_progress else None,
                    workers=number,
                    compile=compile,
                )
                for name, data, cache, number in zip(("train", "test"), (train, test), caches, workers, strict=True)
            ]
            for name, features in zip(("train", "test"), computed, strict=True):
                check_targets(name, features.tensors[-1], model.num_classes)
            return computed[0], computed[1], True
        except UncacheableError as error:
            reason = str(error)
    if accelerator.is_main_process:
        logger.warning("features are not cached, and the whole model runs in every step: %s", reason)
    return train, test, False


def gather_features(
    model: FineTuneModel,
    data: Dataset[Any],
    *,
    batch_size: int,
    accelerator: Accelerator,
    cache: FeatureCache | None = None,
    autocast: bool = True,
    title: str | None = None,
    workers: int = 0,
    compile: Compile | None = None,  # noqa: A002
) -> Features:
    """Run a frozen backbone once over a dataset, each process over its batches; all processes get all features.

    See ``extract_features``; this adds the processes, and draws nothing from any random generator. The processes write
    into one folder, which all must see: the cache's, or a temporary one. Where one does not see it, or its disk is
    full, each process computes all features for itself. An error of one process is raised on all of them.

    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> model = FineTuneModel(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).freeze_backbone()
    >>> images = TensorDataset(torch.ones(3, 3), torch.tensor([0, 1, 1]))
    >>> features = gather_features(model, images, batch_size=2, accelerator=Accelerator(cpu=True))
    >>> [tuple(tensor.shape) for tensor in features.tensors]
    [(3, 4), (3,)]
    """
    device = accelerator.device
    loader = DeviceLoader(data, device, batch_size=batch_size, workers=workers)
    with preserve_rng_state():
        if accelerator.num_processes > 1:
            shared = _share(model, loader, accelerator, cache, autocast=autocast, title=title, compile=compile)
            if shared is not None:
                return shared
            cache = None
        return extract_features(
            model, loader, device=device, cache=cache, autocast=autocast, title=title, compile=compile
        )


def _share(
    model: FineTuneModel,
    loader: DeviceLoader,
    accelerator: Accelerator,
    cache: FeatureCache | None,
    *,
    autocast: bool,
    title: str | None,
    compile: Compile | None,  # noqa: A002
) -> Features | None:
    """Compute features together with the other processes; None where they do not see one writable folder."""
    main, process, processes = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    size, count = loader.batch_size or 1, count_images(loader) or 0
    with ExitStack() as held:
        with _together(accelerator):
            temporary = held.enter_context(TemporaryDirectory(prefix="features-"))
            dtype, device = prepare_backbone(model, accelerator.device, autocast=autocast)
            held.enter_context(in_eval(model.backbone))
            key = None if cache is None else cache.key(model.backbone, dtype)
            sample = next(backbone_batches(model.backbone, spread_rows(loader, count), device, dtype, None))
        told: list[Any] = [temporary, f"shared-{uuid4()}", False]
        broadcast_object_list(told)
        store = FeatureStore(Path(told[0]) if cache is None else cache.folder, count=count, key=key)
        try:
            with _together(accelerator):
                if main:
                    store.check_folder()
                    held.enter_context(store.lock())
                    told[2] = open_store(store, lambda: sample, autocast=dtype is not None) is not None
                    if not told[2]:
                        store.allocate(layout_of(rows_of(sample)))
                    (store.folder / told[1]).touch()  # a name that only this very folder has
                    held.callback((store.folder / told[1]).unlink, missing_ok=True)
            broadcast_object_list(told)
            if not all(gather_object([(store.folder / told[1]).exists()])):
                if main:
                    logger.warning("not all processes see %s; each computes all features for itself", store.folder)
                return None
            store.layout = layout_of(rows_of(sample))
            with _together(accelerator):
                if not told[2]:
                    starts = range(process * size, count, processes * size)
                    own = loader.over([range(start, min(start + size, count)) for start in starts])
                    batches = backbone_batches(model.backbone, own, device, dtype, title, compile=compile)
                    with store.writing() as write:
                        for start, rows in zip(starts, matching_rows(batches, sample), strict=True):
                            write(start, rows)
            with _together(accelerator):
                if main and not told[2]:
                    store.commit()
            share = (MEMORY_SHARE if cache is None else cache.memory_share) / processes
            with _together(accelerator):
                return Features(load_if_fits(store, share), sample.structure)
        except UnwritableStoreError as error:
            if main:
                logger.warning("%s; each process computes all features for itself", error)
            return None


@contextmanager
def _together(accelerator: Accelerator) -> Iterator[None]:
    """Wait until every process has finished the block; an error of one of them is raised on all."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    sent: Exception | None = error
    if error is not None and not isinstance(error, OSError) and type(error) not in {ValueError, UncacheableError}:
        # What can't be pickled, or only in part, would end in an error of its own.
        sent = RuntimeError(f"process {accelerator.process_index}: {type(error).__name__}: {error}")
    errors = [each for each in gather_object([sent]) if each is not None]
    if errors:
        raise error or errors[0]
