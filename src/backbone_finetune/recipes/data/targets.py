"""Checks of what a dataset returns: inputs and a class index, before any of it costs a pass."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from ..rng import preserve_rng_state
from ..text import join_some
from .images import IGNORED, ImageDataset

__all__ = ["check_dataset", "check_targets", "describe_value", "split_row"]


def check_dataset(name: str, data: Dataset[Any], classes: int | None) -> None:
    """Check that a dataset has a length and returns inputs and a class index; all targets, where they are at hand.

    >>> check_dataset("train", DataLoader([]), classes=3)
    Traceback (most recent call last):
    ...
    ValueError: train is a DataLoader; pass its dataset: train.dataset

    Of a dataset whose targets are not at hand the first item is read.

    Raises:
        ValueError: it does not.
    """
    if isinstance(data, DataLoader):
        raise ValueError(f"{name} is a DataLoader; pass its dataset: {name}.dataset")
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise ValueError(f"{name} is a stream of unknown length; pass a dataset that has a length")
    if not len(data):
        raise ValueError(f"len({name}) = 0: expected one image or more")
    targets = _known_targets(data)
    if targets is None:
        with preserve_rng_state():
            _, targets = split_row(default_collate([data[0]]))
    check_targets(name, targets, classes)


def _known_targets(data: Any) -> Tensor | None:
    """Return the targets of a dataset that has them at hand."""
    if type(data) is ImageDataset:
        return torch.tensor(data.folder.targets)
    if isinstance(data, TensorDataset):
        return data.tensors[-1] if len(data.tensors) > 1 else None
    if type(data) is Subset:
        targets = _known_targets(data.dataset)
        return None if targets is None else targets[list(data.indices)]
    if type(data) is ConcatDataset:
        parts = [targets for part in data.datasets if (targets := _known_targets(part)) is not None]
        return torch.cat(parts) if len(parts) == len(data.datasets) else None
    return None


def check_targets(name: str, targets: Tensor, classes: int | None = None) -> None:
    """Check that targets are class indices: one whole number per image, from 0 to ``classes - 1``, or ``IGNORED``.

    >>> check_targets("train", torch.tensor([0, 3]), classes=3)
    Traceback (most recent call last):
    ...
    ValueError: train: target 3 is outside the 3 classes of the classifier (0 to 2)

    Raises:
        ValueError: they are not.
    """
    if targets.ndim != 1 or targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(
            f"{name}: the targets are {str(targets.dtype).removeprefix('torch.')} of shape {tuple(targets.shape[1:])} "
            "per image; pass class indices, one whole number per image"
        )
    wrong = (targets < 0) | (targets >= (classes or torch.iinfo(torch.long).max))
    if faulty := targets[wrong & (targets != IGNORED)][:1].tolist():
        known = "the classes" if classes is None else f"the {classes} classes of the classifier (0 to {classes - 1})"
        raise ValueError(f"{name}: target {faulty[0]} is outside {known}")


def split_row(batch: Any) -> tuple[list[Tensor], Tensor]:
    """Split what a loader gives, ``(input, ..., target)`` tensors, into inputs and targets.

    >>> split_row((torch.zeros(2, 3), torch.tensor([0, 1])))
    ([tensor([[0., 0., 0.],
            [0., 0., 0.]])], tensor([0, 1]))

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(batch, tuple | list) or len(batch) < 2 or not all(isinstance(part, Tensor) for part in batch):
        raise ValueError(
            f"the loader gave {describe_value(batch)}; the dataset must return (input, target), or (input, input, ..., "
            "target) for a backbone of several inputs, as tensors or numbers"
        )
    *inputs, targets = batch
    return inputs, targets


def describe_value(value: object) -> str:
    """Name what came in a few words.

    >>> describe_value(torch.zeros(2, 3)), describe_value([1, 2, 3]), describe_value({"image": 1, "label": 2})
    ('a tensor of shape (2, 3)', 'a list of 3', 'a dict of image, label')
    """
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"a dict of {join_some([str(key) for key in value])}"
    return f"a {type(value).__name__}{f' of {len(value)}' if isinstance(value, tuple | list) else ''}"
