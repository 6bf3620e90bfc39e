"""Check the items of a dataset, inputs and a target, before the first pass."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from backbone_finetune.names import shortened

from ..rng import preserve_rng_state
from .images import IGNORED, ImageDataset


def check_dataset(name: str, data: Dataset[Any], check: Callable[[str, Tensor], None]) -> None:
    """Raise ValueError unless a dataset has a length and returns inputs and a target that ``check`` accepts.

    All targets are checked if the dataset has them in memory; otherwise the first item is read.
    """
    if isinstance(data, DataLoader):
        raise ValueError(f"{name} is a DataLoader; pass its dataset: {name}.dataset")
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise ValueError(f"{name} is a stream of unknown length; pass a dataset that has a length")
    if not len(data):
        raise ValueError(f"len({name}) = 0: expected one image or more")
    targets = known_targets(data)
    if targets is None:
        _, targets = first_row(name, data)
    check(name, targets)


def first_row(name: str, data: Any) -> tuple[list[Tensor], Tensor]:
    """Load the first row of a dataset as a batch of one; raise ValueError if that is not possible."""
    with preserve_rng_state(), torch.device("cpu"):
        row = data[0]
        try:
            return split_row(default_collate([row]))
        except TypeError as error:  # e.g. a Pillow image
            kinds = ", ".join(type(part).__name__ for part in row) if isinstance(row, tuple | list) else ""
            raise ValueError(
                f"{name}[0] is {describe_value(row)}{f' ({kinds})' if kinds else ''}; return tensors or numbers: give "
                "the dataset a transform, such as timm.data.create_transform(224)"
            ) from error


def known_targets(data: Any) -> Tensor | None:
    """Return the targets of a dataset that has them in memory; None otherwise."""
    if type(data) is ImageDataset:
        return torch.tensor(data.folder.targets, device="cpu")
    if isinstance(data, list) and all(
        isinstance(row, tuple | list) and isinstance(row[-1], Tensor | float | int) for row in data
    ):
        with torch.device("cpu"):
            return torch.as_tensor(default_collate([row[-1] for row in data]))
    if isinstance(data, TensorDataset):
        return data.tensors[-1] if len(data.tensors) > 1 else None
    if type(data) is Subset:
        targets = known_targets(data.dataset)
        return None if targets is None else targets[list(data.indices)]
    if type(data) is ConcatDataset:
        parts = [targets for part in data.datasets if (targets := known_targets(part)) is not None]
        return torch.cat(parts) if len(parts) == len(data.datasets) else None
    return None


def known_groups(data: Any) -> Sequence[str] | None:
    """Return the group of each image of a dataset that has groups; None otherwise."""
    if isinstance(data, Subset):
        groups = known_groups(data.dataset)
        return None if groups is None else [groups[index] for index in data.indices]
    return data.folder.groups if isinstance(data, ImageDataset) else None


def check_targets(name: str, targets: Tensor, classes: int | None = None) -> None:
    """Raise ValueError unless targets are one integer per image, from 0 to ``classes - 1``, or ``IGNORED``."""
    if targets.ndim != 1 or targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(
            f"{name}: the targets are {describe_targets(targets)}; pass class indices, one whole number per image"
            f"{_suggest(targets)}"
        )
    if classes == 1:
        raise ValueError(
            f"{name}: the targets are class indices, and the network has 1 output, whose class would always be right; "
            "pass num_classes=2 or more, or TrainerConfig(objective=Regression()) for values of one output"
        )
    wrong = targets < 0
    if classes is not None:  # a limit of int64 would wrap in int32
        wrong |= targets >= classes
    if faulty := targets[wrong & (targets != IGNORED)][:1].tolist():
        known = "the classes" if classes is None else f"the {classes} classes of the classifier (0 to {classes - 1})"
        raise ValueError(f"{name}: target {faulty[0]} is outside {known}")


def describe_targets(targets: Tensor) -> str:
    """Describe the type and shape of targets, such as "float32 of shape (3,) per image"."""
    return f"{str(targets.dtype).removeprefix('torch.')} of shape {tuple(targets.shape[1:])} per image"


def _suggest(targets: Tensor) -> str:
    """Suggest an objective for targets that are not class indices."""
    if targets.ndim == 2 and targets.shape[1] > 1:
        is_binary = bool(((targets == 0) | (targets == 1)).all())
        sums_to_1 = bool(((targets.double().sum(1) - 1).abs() <= 1e-3).all())
        if is_binary and sums_to_1:
            return ": targets.argmax(1); or, for labels that may go together, TrainerConfig(objective=MultiLabel())"
        if is_binary:
            return "; for rows of 0 and 1, pass TrainerConfig(objective=MultiLabel())"
        if sums_to_1:
            return "; for rows that sum to 1, pass TrainerConfig(objective=SoftLabels())"
    if targets.is_floating_point():
        return "; for float targets, pass TrainerConfig(objective=Regression())"
    if targets.ndim > 1 and targets[0].numel() == 1:
        return ": targets.flatten()"
    return ": targets.long()" if targets.dtype == torch.bool else ""


def split_row(batch: Any) -> tuple[list[Tensor], Tensor]:
    """Split a batch ``(input, ..., target)`` of tensors into inputs and targets; raise ValueError for other batches."""
    if not isinstance(batch, tuple | list) or len(batch) < 2 or not all(isinstance(part, Tensor) for part in batch):
        raise ValueError(
            f"the loader gave {describe_value(batch)}; the dataset must return (input, target), or (input, input, ..., "
            "target) for a backbone of several inputs, as tensors or numbers"
        )
    *inputs, targets = batch
    return inputs, targets


def describe_value(value: object) -> str:
    """Describe a value, such as "a tensor of shape (2, 3)" or "a list of 3"."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"a dict of {shortened([str(key) for key in value])}"
    return f"a {type(value).__name__}{f' of {len(value)}' if isinstance(value, tuple | list) else ''}"
