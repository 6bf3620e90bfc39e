"""Whether a transform, or a whole dataset, gives the same tensor for the same image in every epoch."""

import hashlib
from collections.abc import Mapping
from inspect import getattr_static
from typing import Any

import numpy
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from backbone_finetune.verification import digest

from ..rng import preserve_rng_state
from ..text import one_line

__all__ = ["digest_item", "find_randomness", "is_deterministic", "stated_transforms"]

# Classes by where they are defined, so that nothing is imported for them. Each gives the same tensor for the same image
# and is described by its public attributes. A subclass may do anything, so it does not count.
_DETERMINISTIC: Mapping[str, frozenset[str]] = {
    "torchvision.transforms.transforms": frozenset(
        {"CenterCrop", "ConvertImageDtype", "Grayscale", "Normalize", "PILToTensor", "Pad", "Resize", "ToTensor"}
    ),
    "torchvision.transforms.v2": frozenset(
        {"CenterCrop", "ConvertImageDtype", "Grayscale", "Identity", "Normalize", "PILToTensor", "Pad", "RGB", "Resize"}
        | {"ToDtype", "ToImage", "ToPILImage", "ToPureTensor", "ToTensor"}
    ),
    "torchvision.transforms._presets": frozenset({"ImageClassification"}),  # what weights.transforms() gives
    "timm.data.transforms": frozenset(
        {"CenterCropOrPad", "MaybePILToTensor", "MaybeToTensor", "ToNumpy", "ToTensor", "TrimBorder"}
    ),
    "open_clip.transform": frozenset({"CenterCropOrPad", "MaybeConvertMode", "MaybeToTensor", "_convert_to_rgb"}),
}
# What torchvision's datasets, and most others, call what they do to an image and its target.
_TRANSFORMS = ("transform", "transforms", "target_transform")
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
    if module.startswith("torchvision.transforms.v2."):
        module = "torchvision.transforms.v2"
    if type(transform) is nn.Sequential:
        return all(is_deterministic(part) for part in transform)
    if module.startswith("torchvision.transforms.") and name == "Compose":
        return all(is_deterministic(part) for part in transform.transforms)
    if module in {"timm.data.transforms", "open_clip.transform"} and name == "ResizeKeepRatio":
        draws = (transform.random_scale_prob, transform.random_aspect_prob)
        return not any(draws) and not isinstance(transform.interpolation, tuple | list)
    return name in _DETERMINISTIC.get(module, ())


def find_randomness(data: Dataset[Any]) -> str | None:
    """Say why a dataset may give other tensors in the next epoch, or None where it is known to give the same.

    >>> import torch
    >>> find_randomness(TensorDataset(torch.ones(1))) is None
    True

    Tensors, lists and tuples are the same each time, and a dataset of other datasets is what they are. Any other says
    so by ``transform`` (``transforms``, ``target_transform``), which is None or a transform that ``is_deterministic``.
    Eight items of a class that is not torchvision's or ours are then read twice, and must be equal.
    """
    stated = stated_transforms(data)
    if unknown := [each for each in stated if not _draws_nothing(each)]:
        return f"{one_line(repr(unknown[0]))} is not known to give the same tensor for the same image each time"
    parts = [data.dataset] if isinstance(data, Subset) else data.datasets if isinstance(data, ConcatDataset) else []
    if reasons := [reason for reason in map(find_randomness, parts) if reason]:
        return reasons[0]
    # A subclass may do anything in __getitem__, as one of Subset that has a transform of its own does.
    if type(data) in {TensorDataset, Subset, ConcatDataset, list, tuple}:
        return None
    if not stated:
        return f"{type(data).__name__} may draw random numbers when it is read; give it transform = None if it does not"
    if type(data).__module__.startswith(("torchvision.datasets.", "backbone_finetune.recipes.")):
        return None
    return _look_twice(data)


def _look_twice(data: Any) -> str | None:
    """Read a few items twice, and say which was not the same."""
    last = len(data) - 1
    with preserve_rng_state():
        for index in sorted({round(look * last / (_LOOKS - 1)) for look in range(_LOOKS)}):
            if digest_item(data[index]) != digest_item(data[index]):
                return f"item {index} of {type(data).__name__} was not the same when it was read twice"
    return None


def stated_transforms(data: Dataset[Any]) -> list[Any]:
    """List the transforms that a dataset has under the usual names, not those of a dataset that it wraps.

    >>> stated_transforms([])
    []
    """
    return [getattr(data, name) for name in _TRANSFORMS if getattr_static(data, name, _MISSING) is not _MISSING]


def _draws_nothing(transform: Any) -> bool:
    """Tell whether a dataset's transform is None or deterministic."""
    if type(transform).__name__ == "StandardTransform":  # what torchvision's datasets make of their two others
        return _draws_nothing(transform.transform) and _draws_nothing(transform.target_transform)
    return transform is None or is_deterministic(transform)


def digest_item(item: Any) -> str:
    """Digest what a dataset returns for one index: tensors, arrays, images and numbers, in tuples, lists and dicts.

    >>> digest_item((numpy.zeros(2), 1)) == digest_item((numpy.zeros(2), 1)) != digest_item((numpy.zeros(2), 2))
    True

    Raises:
        ValueError: it holds something else.
    """
    hashed = hashlib.sha256()

    def add(value: Any) -> None:
        hashed.update(f"{type(value).__name__} ".encode())
        if isinstance(value, Tensor):
            hashed.update(digest(value).encode())
        elif isinstance(value, numpy.ndarray):
            hashed.update(f"{value.dtype.str} {value.shape} ".encode() + value.tobytes())
        elif isinstance(value, Image.Image):
            hashed.update(f"{value.mode} {value.size} ".encode() + value.tobytes())
        elif isinstance(value, Mapping | tuple | list):
            hashed.update(f"{len(value)} ".encode())
            for part in value.items() if isinstance(value, Mapping) else value:
                add(part)
        elif value is None or isinstance(value, bool | int | float | str | bytes | numpy.generic):
            hashed.update(f"{value!r} ".encode())
        else:
            raise ValueError(
                f"a dataset gave a {type(value).__name__}, which can't be compared; return tensors, arrays or numbers, "
                "or pass a name of your own: FeatureCache(folder, 'images of 2024, 224 pixels')"
            )

    add(item)
    return hashed.hexdigest()
