"""What a phase trains on: images, or, where the backbone is frozen and shows the same each time, its features."""

from inspect import getattr_static
from typing import Any

from accelerate import Accelerator
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.datasets.vision import StandardTransform  # it comes with timm

from backbone_finetune import FineTuneModel

from ..data.fingerprint import is_deterministic
from ..data.loading import DeviceLoader
from ..rng import preserve_rng_state
from .cache import remove_store
from .extract import FeatureCache, extract_features
from .shared_features import share_features

__all__ = ["gather_features", "repeats"]

# What torchvision's datasets, and most others, call what they do to an image and its target.
TRANSFORMS = ("transform", "transforms", "target_transform")
MISSING = object()


def repeats(data: Dataset[Any]) -> bool:
    """Say whether a dataset is known to show the same in every epoch.

    >>> import torch
    >>> repeats(TensorDataset(torch.ones(1))), repeats(Subset([(torch.rand, 0)], [0]))
    (True, True)

    A dataset tells by ``transform`` (``transforms``, ``target_transform``): None, or one of torchvision or timm that is
    known to draw nothing. Tensors, lists and tuples need not tell; a dataset of other datasets shows what they show.
    Any other, a class of your own that has no such attribute, may draw in its ``__getitem__``, and counts as random.
    """
    # Its own, and not what it hands on from a dataset that it stands around.
    stated = [getattr(data, name) for name in TRANSFORMS if getattr_static(data, name, MISSING) is not MISSING]
    if not all(draws_nothing(transform) for transform in stated):
        return False
    if isinstance(data, Subset) and not repeats(data.dataset):
        return False
    if isinstance(data, ConcatDataset) and not all(repeats(part) for part in data.datasets):
        return False
    # A subclass may do anything in __getitem__, as one of Subset that has a transform of its own does.
    return bool(stated) or type(data) in {TensorDataset, Subset, ConcatDataset, list, tuple}


def draws_nothing(transform: Any) -> bool:
    """Say whether what a dataset names as a transform is none, or known to give the same each time.

    >>> import torch
    >>> draws_nothing(None), draws_nothing(torch.rand_like)
    (True, False)
    """
    if type(transform) is StandardTransform:  # what torchvision's datasets make of their two others
        return draws_nothing(transform.transform) and draws_nothing(transform.target_transform)
    return transform is None or is_deterministic(transform)


def gather_features(
    model: FineTuneModel,
    data: Dataset[Any],
    *,
    batch_size: int,
    accelerator: Accelerator,
    cache: FeatureCache | None = None,
    autocast: bool = True,
    title: str | None = None,
    moved: bool = False,
    workers: int = 0,
) -> TensorDataset:
    """Run a frozen backbone once over a dataset: each process over its part, and all of them get all features.

    See `extract_features`; this adds the processes, and draws nothing from any random generator. A cache of a backbone
    that has ``moved`` since then, as it should, is replaced without a word.

    The main process writes and trusts the cache, batch by batch as the others compute it, and they map its files where
    they see them; one on a machine that does not gets a copy, in memory or in a temporary folder. The memory share of a
    cache is that of all processes together. An error of one is raised on all of them.

    >>> import torch
    >>> model = FineTuneModel(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).freeze_backbone()
    >>> images = TensorDataset(torch.ones(3, 3), torch.tensor([0, 1, 1]))
    >>> features = gather_features(model, images, batch_size=2, accelerator=Accelerator(cpu=True))
    >>> [tuple(tensor.shape) for tensor in features.tensors]
    [(3, 4), (3,)]
    """
    with preserve_rng_state():
        if accelerator.num_processes > 1:
            return share_features(
                model,
                data,
                batch_size=batch_size,
                accelerator=accelerator,
                cache=cache,
                autocast=autocast,
                title=title,
                moved=moved,
                workers=workers,
            )
        if cache is not None and moved:
            remove_store(cache.folder)
        return extract_features(
            model,
            DeviceLoader(data, accelerator.device, batch_size=batch_size, workers=workers),
            device=accelerator.device,
            cache=cache,
            autocast=autocast,
            title=title,
        )
