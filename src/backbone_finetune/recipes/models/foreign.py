"""Weights files of other trainers: nested state dicts, and names with the prefix of a wrapper."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor

from ..text import join_some, one_line

NESTED = ("model_state_dict", "state_dict", "model", "net", "weights")


def read_weights(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Read a weights file, and give its tensors the ``names`` of an architecture.

    A state dict inside a checkpoint is found under common keys of trainers, and the prefix that most of the
    network's tensors have in the file is removed: Lightning's ``model.``, DistributedDataParallel's ``module.``, or
    the ``backbone.`` of a `FineTuneModel`. Tensors without it are then left out: they are not part of the network.

    Names of a format that timm converts do not change.

    Raises:
        ValueError: the file cannot be read, or contains no state dict.
    """
    try:
        found: Any = load_state_dict(str(path))
    except Exception as error:  # torch's unpickler may raise any error for a file that is not a pickle
        raise ValueError(f"{path}: not a readable weights file ({one_line(error, most=300)})") from error
    while nested := [found[key] for key in NESTED if isinstance(found.get(key), Mapping)]:
        found = nested[0]
    tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    if not tensors:
        held = f" but {join_some(list(map(str, found)))}" if found else ""
        raise ValueError(f"{path}: holds no tensors{held}; pass a state dict")
    prefix = _find_prefix(tensors, names)
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def network_names(architecture: str) -> list[str]:
    """Return the tensor names of an architecture."""
    with torch.device("meta"):
        return list(timm.create_model(architecture).state_dict())


def _find_prefix(tensors: Iterable[str], names: Collection[str]) -> str:
    """Return the prefix of the names of most tensors; "" if there is none."""
    known = set(names)
    counts = Counter(
        name[: position + 1]
        for name in tensors
        for position, character in enumerate(name)
        if character == "." and name[position + 1 :] in known
    )
    own = len(known & set(tensors))
    prefix, count = counts.most_common(1)[0] if counts else ("", 0)
    return prefix if count > own else ""


def describe_names(names: Iterable[str]) -> str:
    """List the first names, and count the rest."""
    return join_some([one_line(name, most=60) for name in names])
