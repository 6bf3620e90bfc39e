"""Check whether a dataset returns the same tensors in every epoch, and compute a digest of its images and targets."""

import hashlib
import json
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from backbone_finetune.verification import digest

from ..files import digest_files
from ..rng import preserve_rng_state
from ..text import one_line
from .images import ImageDataset, LabelledFolder, spread_rows

# By name, so that nothing is imported for them. Each returns the same tensor for the same image; a subclass may do
# anything, so it is not included.
_PACKAGES = ("torchvision.transforms.", "timm.data.transforms", "open_clip.transform")
_DETERMINISTIC = frozenset(
    {"CenterCrop", "CenterCropOrPad", "ConvertImageDtype", "Grayscale", "Identity", "ImageClassification"}
    | {"MaybeConvertMode", "MaybePILToTensor", "MaybeToTensor", "Normalize", "PILToTensor", "Pad", "RGB", "Resize"}
    | {"ToDtype", "ToImage", "ToNumpy", "ToPILImage", "ToPureTensor", "ToTensor", "TrimBorder", "_convert_to_rgb"}
)
# The names of transforms in torchvision's datasets, and in most others.
_TRANSFORMS = ("transform", "transforms", "target_transform")
_NAME_INSTEAD = "pass a name of your own: FeatureCache(folder, 'images of 2024, 224 pixels')"


def is_deterministic(transform: Any) -> bool:
    """Return whether a transform of torchvision, timm or open_clip is known to be deterministic.

    >>> from timm.data import create_transform
    >>> is_deterministic(create_transform(64)), is_deterministic(create_transform(64, is_training=True))
    (True, False)

    An unknown transform, such as a function or a custom class, counts as random. None is deterministic.
    """
    if transform is None or type(transform) is nn.Sequential:
        return all(map(is_deterministic, transform or ()))
    named = transform if hasattr(transform, "__qualname__") else type(transform)  # a function, or an object's class
    module, name = getattr(named, "__module__", None) or "", getattr(named, "__qualname__", "")
    if name == "StandardTransform":  # torchvision's datasets combine the two other transforms in it
        return is_deterministic(transform.transform) and is_deterministic(transform.target_transform)
    if not module.startswith(_PACKAGES):
        return False
    if name == "Compose":
        return all(map(is_deterministic, transform.transforms))
    if name == "ResizeKeepRatio":
        draws = (transform.random_scale_prob, transform.random_aspect_prob)
        return not any(draws) and not isinstance(transform.interpolation, tuple | list)
    return name in _DETERMINISTIC


def _name(transform: Any) -> str:
    """Return a transform as text, without addresses, which differ between runs: the history of a run has it."""
    return re.sub(" at 0x[0-9a-fA-F]+", "", repr(transform))


def find_randomness(data: Any) -> str | None:
    """Return why a dataset may return other tensors in the next epoch; None if it is known to return the same.

    Tensors, lists and tuples are the same each time, and a dataset of other datasets is checked by these. Any other
    needs a ``transform`` (``transforms``, ``target_transform``) that is None or a transform that ``is_deterministic``.
    Eight items of a custom class are then read twice, and must be equal.
    """
    stated = _stated_transforms(data)
    reasons = [
        f"{one_line(_name(transform))} is not known to give the same tensor for the same image each time"
        for transform in stated
        if not is_deterministic(transform)
    ]
    parts = [data.dataset] if isinstance(data, Subset) else data.datasets if isinstance(data, ConcatDataset) else []
    if reasons := reasons or list(filter(None, map(find_randomness, parts))):
        return reasons[0]
    # A subclass may do anything in __getitem__, e.g. a Subset with a separate transform.
    if type(data) in {TensorDataset, Subset, ConcatDataset, list, tuple}:
        return None
    if not stated:
        return f"{type(data).__name__} may draw random numbers when it is read; give it transform = None if it does not"
    if type(data).__module__.startswith(("torchvision.datasets.", "backbone_finetune.recipes.")):
        return None
    with preserve_rng_state():
        for index in spread_rows(len(data)):
            if _digest_item(data[index]) != _digest_item(data[index]):
                return f"item {index} of {type(data).__name__} was not the same when it was read twice"
    return None


def data_fingerprint(dataset: Dataset[Any]) -> str:
    """Return a digest of the images and targets of a dataset, in their order.

    >>> import torch
    >>> images, targets = torch.zeros(2, 3), torch.tensor([0, 1])
    >>> same = data_fingerprint(TensorDataset(images, targets)) == data_fingerprint(TensorDataset(images, targets))
    >>> same, data_fingerprint(TensorDataset(images, targets)) == data_fingerprint(TensorDataset(images + 1, targets))
    (True, False)

    The files of an ``ImageDataset`` or of torchvision's ``ImageFolder`` are read but not decoded, which costs a small
    part of the cost of a backbone. Their paths, times and transform are not included: images that were moved or renamed
    have the same digest if their order is the same, and another transform is detected when a ``FeatureCache`` computes
    eight images again. A ``Subset`` and a ``ConcatDataset`` are digested through their
    datasets. Any other dataset is read item by item, which takes as long as an epoch of reading: if too long, give
    ``FeatureCache`` a name instead.

    Raises:
        OSError: an image cannot be read.
        ValueError: the dataset's transform is not known to be deterministic, or its items cannot be compared.
    """
    other = (DataLoader, IterableDataset, str, bytes, PathLike, Mapping)
    if isinstance(dataset, other) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"data_fingerprint got {type(dataset).__name__} {one_line(repr(dataset))}; pass a dataset with a length: "
            "of a loader, loader.dataset; of a folder, torchvision.datasets.ImageFolder(folder, transform); "
            f"for a stream, {_NAME_INSTEAD}"
        )
    return _digest_text(_describe(dataset))


def fingerprint_images(images: LabelledFolder, digests: Mapping[Path, str]) -> str:
    """Return the `data_fingerprint` of an `ImageDataset` of images whose files have these digests."""
    return _digest_text(_describe_images(images, digests))


def _digest_text(description: Any) -> str:
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()


def _describe(dataset: Any) -> Any:
    """Describe a dataset as JSON."""
    kind = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
    if type(dataset) is TensorDataset:
        return [kind, [digest(tensor) for tensor in dataset.tensors]]
    if type(dataset) is Subset:
        return [kind, [int(index) for index in dataset.indices], _describe(dataset.dataset)]
    if type(dataset) is ConcatDataset:
        return [kind, [_describe(part) for part in dataset.datasets]]
    # A custom dataset may have no transform attribute and still draw random numbers; then its fingerprints differ.
    if _stated_transforms(dataset) and (reason := find_randomness(dataset)):
        raise ValueError(
            f"{reason}; use an evaluation transform, as timm's create_transform(224) gives, or {_NAME_INSTEAD}"
        )
    if type(dataset) is ImageDataset:
        return _describe_images(dataset.folder, digest_files(dataset.folder.paths))
    if kind == "torchvision.datasets.folder.ImageFolder":
        digests = digest_files(Path(path) for path, _ in dataset.samples)
        return [kind, [(target, digests[Path(path)]) for path, target in dataset.samples]]
    return [kind, [_digest_item(dataset[index]) for index in range(len(dataset))]]


def _describe_images(images: LabelledFolder, digests: Mapping[Path, str]) -> list[Any]:
    """Describe images by their contents, not by sizes and times, which may not change with an image."""
    rows = [(target, digests[path]) for path, target in zip(images.paths, images.targets, strict=True)]
    return ["images", rows, *([] if images.groups is None else [list(images.groups)])]


def _stated_transforms(data: Any) -> list[Any]:
    """Return the transforms of a dataset under the usual names, without those of a wrapped dataset."""
    own = getattr(data, "__dict__", {})
    return [getattr(data, name) for name in _TRANSFORMS if name in own or hasattr(type(data), name)]


def _digest_item(item: Any) -> str:
    """Digest an item of a dataset: tensors, arrays, images and numbers, in tuples, lists and dicts."""
    leaves, structure = tree_flatten(dict(item) if isinstance(item, Mapping) else item)
    hashed = hashlib.sha256(f"{structure} ".encode())
    for leaf in leaves:
        array = numpy.empty(0) if isinstance(leaf, Tensor) else numpy.asarray(leaf)
        if array.dtype.hasobject:
            raise ValueError(
                f"a dataset gave a {type(leaf).__name__}, which cannot be compared; return tensors, arrays or numbers, "
                f"or {_NAME_INSTEAD}"
            )
        content = digest(leaf).encode() if isinstance(leaf, Tensor) else array.tobytes()
        hashed.update(f"{type(leaf).__name__} {array.dtype.str} {array.shape} ".encode() + content)
    return hashed.hexdigest()
