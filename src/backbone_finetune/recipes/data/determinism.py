"""Whether a transform, or a whole dataset, gives the same tensor for the same image in every epoch."""

import hashlib
from collections.abc import Mapping
from inspect import getattr_static
from typing import Any

import numpy
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from backbone_finetune.verification import digest

from ..rng import preserve_rng_state
from ..text import one_line

__all__ = ["digest_item", "find_randomness", "is_deterministic", "stated_transforms"]

# By name, so that nothing is imported for them. Each gives the same tensor for the same image and is described by its
# public attributes. A subclass may do anything, so it does not count.
_PACKAGES = ("torchvision.transforms.", "timm.data.transforms", "open_clip.transform")
_DETERMINISTIC = frozenset(
    {"CenterCrop", "CenterCropOrPad", "ConvertImageDtype", "Grayscale", "Identity", "ImageClassification"}
    | {"MaybeConvertMode", "MaybePILToTensor", "MaybeToTensor", "Normalize", "PILToTensor", "Pad", "RGB", "Resize"}
    | {"ToDtype", "ToImage", "ToNumpy", "ToPILImage", "ToPureTensor", "ToTensor", "TrimBorder", "_convert_to_rgb"}
)
# What torchvision's datasets, and most others, call what they do to an image and its target.
_TRANSFORMS = ("transform", "transforms", "target_transform")
NAME_INSTEAD = "pass a name of your own: FeatureCache(folder, 'images of 2024, 224 pixels')"
_MISSING = object()
_LOOKS = 8


def is_deterministic(transform: Any) -> bool:
    """Tell whether a transform of torchvision, timm or open_clip is known to give the same tensor each time.

    >>> from timm.data import create_transform
    >>> is_deterministic(create_transform(64)), is_deterministic(create_transform(64, is_training=True))
    (True, False)

    A transform that is not known, such as a function or a class of your own, counts as random.
    """
    named = transform if hasattr(transform, "__qualname__") else type(transform)  # a function, or an object's class
    module, name = getattr(named, "__module__", None) or "", getattr(named, "__qualname__", "")
    if type(transform) is nn.Sequential:
        return all(is_deterministic(part) for part in transform)
    if not module.startswith(_PACKAGES):
        return False
    if name == "Compose":
        return all(is_deterministic(part) for part in transform.transforms)
    if name == "ResizeKeepRatio":
        draws = (transform.random_scale_prob, transform.random_aspect_prob)
        return not any(draws) and not isinstance(transform.interpolation, tuple | list)
    return name in _DETERMINISTIC


def find_randomness(data: Any) -> str | None:
    """Say why a dataset may give other tensors in the next epoch, or None where it is known to give the same.

    Tensors, lists and tuples are the same each time, and a dataset of other datasets is what they are. Any other says
    so by ``transform`` (``transforms``, ``target_transform``), which is None or a transform that ``is_deterministic``.
    Eight items of a class that is not torchvision's or ours are then read twice, and must be equal.
    """
    stated = stated_transforms(data)
    parts = [data.dataset] if isinstance(data, Subset) else data.datasets if isinstance(data, ConcatDataset) else []
    unknown = [
        f"{one_line(repr(each))} is not known to give the same tensor for the same image each time"
        for each in stated
        if not _draws_nothing(each)
    ]
    if reasons := unknown or [reason for reason in map(find_randomness, parts) if reason]:
        return reasons[0]
    # A subclass may do anything in __getitem__, as one of Subset that has a transform of its own does.
    if type(data) in {TensorDataset, Subset, ConcatDataset, list, tuple}:
        return None
    if not stated:
        return f"{type(data).__name__} may draw random numbers when it is read; give it transform = None if it does not"
    if type(data).__module__.startswith(("torchvision.datasets.", "backbone_finetune.recipes.")):
        return None
    last = len(data) - 1
    with preserve_rng_state():
        for index in sorted({round(look * last / (_LOOKS - 1)) for look in range(_LOOKS)}):
            if digest_item(data[index]) != digest_item(data[index]):
                return f"item {index} of {type(data).__name__} was not the same when it was read twice"
    return None


def stated_transforms(data: Any) -> list[Any]:
    """List the transforms that a dataset has under the usual names, not those of a dataset that it wraps."""
    return [getattr(data, name) for name in _TRANSFORMS if getattr_static(data, name, _MISSING) is not _MISSING]


def _draws_nothing(transform: Any) -> bool:
    """Tell whether a dataset's transform is None or deterministic."""
    if type(transform).__name__ == "StandardTransform":  # what torchvision's datasets make of their two others
        return _draws_nothing(transform.transform) and _draws_nothing(transform.target_transform)
    return transform is None or is_deterministic(transform)


def digest_item(item: Any) -> str:
    """Digest what a dataset returns for one index: tensors, arrays, images and numbers, in tuples, lists and dicts.

    Anything else is a ValueError.
    """
    leaves, structure = tree_flatten(dict(item) if isinstance(item, Mapping) else item)
    hashed = hashlib.sha256(f"{structure} ".encode())
    for leaf in leaves:
        hashed.update(f"{type(leaf).__name__} ".encode())
        if isinstance(leaf, Tensor):
            hashed.update(digest(leaf).encode())
        elif isinstance(leaf, numpy.ndarray):
            hashed.update(f"{leaf.dtype.str} {leaf.shape} ".encode() + leaf.tobytes())
        elif isinstance(leaf, Image.Image):
            hashed.update(f"{leaf.mode} {leaf.size} ".encode() + leaf.tobytes())
        elif leaf is None or isinstance(leaf, bool | int | float | str | bytes | numpy.generic):
            hashed.update(f"{leaf!r} ".encode())
        else:
            raise ValueError(
                f"a dataset gave a {type(leaf).__name__}, which can't be compared; return tensors, arrays or numbers, "
                f"or {NAME_INSTEAD}"
            )
    return hashed.hexdigest()
