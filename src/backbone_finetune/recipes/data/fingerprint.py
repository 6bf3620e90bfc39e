"""A digest of what a dataset shows to a backbone: images, targets, order and transform."""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from os.path import relpath
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from backbone_finetune.verification import digest

from ..files import digest_file
from .determinism import NAME_INSTEAD, digest_item, find_randomness, stated_transforms
from .images import ImageDataset

__all__ = ["data_fingerprint"]


def data_fingerprint(dataset: Dataset[Any]) -> str:
    """Digest what a dataset shows to a backbone: the content, order and targets of its images, and its transform.

    >>> import torch
    >>> images, targets = torch.zeros(2, 3), torch.tensor([0, 1])
    >>> same = data_fingerprint(TensorDataset(images, targets)) == data_fingerprint(TensorDataset(images, targets))
    >>> same, data_fingerprint(TensorDataset(images, targets)) == data_fingerprint(TensorDataset(images + 1, targets))
    (True, False)

    Of an ``ImageDataset`` and of torchvision's ``ImageFolder`` the files are read and not decoded, which costs a small
    part of what a backbone costs; where they are and when they were written does not count. A ``Subset`` and a
    ``ConcatDataset`` count by what they are made of. Any other dataset is read item by item, as slow as an epoch of
    reading: where that takes too long, give ``FeatureCache`` a name instead.

    Raises:
        OSError: an image can't be read.
        ValueError: the dataset is random, or not known not to be, or its items can't be compared.
    """
    if isinstance(dataset, DataLoader):
        raise ValueError("data_fingerprint got a DataLoader; pass its dataset: data_fingerprint(loader.dataset)")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(f"{type(dataset).__name__} is a stream of unknown length; {NAME_INSTEAD}")
    return hashlib.sha256(json.dumps(_describe(dataset)).encode()).hexdigest()


def _describe(dataset: Any) -> Any:
    """Write down a dataset as JSON holds it."""
    kind = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
    if type(dataset) is TensorDataset:
        return [kind, [digest(tensor) for tensor in dataset.tensors]]
    if type(dataset) is Subset:
        return [kind, [int(index) for index in dataset.indices], _describe(dataset.dataset)]
    if type(dataset) is ConcatDataset:
        return [kind, [_describe(part) for part in dataset.datasets]]
    # A dataset of your own may state no transform: that it draws nothing is then seen from reading it twice.
    if stated_transforms(dataset) and (reason := find_randomness(dataset)):
        raise ValueError(
            f"{reason}; use an evaluation transform, as timm's create_transform(224) gives, or {NAME_INSTEAD}"
        )
    if type(dataset) is ImageDataset:
        folder = dataset.folder
        return [
            kind,
            _describe_files(folder.paths, folder.targets, folder.root),
            _describe_transform(dataset.transform),
        ]
    if kind == "torchvision.datasets.folder.ImageFolder":
        paths, targets = zip(*dataset.samples, strict=True)
        transforms = [_describe_transform(each) for each in (dataset.transform, dataset.target_transform)]
        files = _describe_files(map(Path, paths), targets, Path(dataset.root))
        return [kind, files, transforms, f"{dataset.loader.__module__}.{dataset.loader.__qualname__}"]
    items = [digest_item(dataset[index]) for index in range(len(dataset))]
    if not stated_transforms(dataset) and any(digest_item(dataset[i]) != items[i] for i in range(min(len(items), 8))):
        raise ValueError(f"{type(dataset).__name__} gave another item when it was read twice; {NAME_INSTEAD}")
    return [kind, items]


def _describe_files(paths: Iterable[Path], targets: Iterable[int], root: Path) -> list[Any]:
    """Write down images: contents are read, not sizes and times, which can stay the same when an image changes."""

    def describe(path: Path, target: int) -> tuple[str, int, str]:
        # A pipe or a link to nothing, which would block or fail, is an image that a pass skips.
        return relpath(path, root), target, digest_file(path) if path.is_file() else "no file"

    with ThreadPoolExecutor() as threads:
        return list(threads.map(describe, paths, targets))


def _describe_transform(transform: Any) -> Any:
    """Write down a deterministic transform in full: a ``repr`` shortens tensors, and leaves arguments out."""
    if transform is None:
        return None
    parts = getattr(transform, "transforms", None) or getattr(transform, "_modules", {}).values()
    arguments = {
        name: repr(value.tolist() if isinstance(value, Tensor) else value)
        for name, value in getattr(transform, "__dict__", {}).items()
        if not name.startswith("_") and name not in {"training", "transforms"}
    }
    named = transform if hasattr(transform, "__qualname__") else type(transform)
    return [f"{named.__module__}.{named.__qualname__}", arguments, [_describe_transform(part) for part in parts]]
