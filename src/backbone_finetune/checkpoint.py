"""safetensors in, safetensors out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open  # it comes with timm
from safetensors.torch import save_file
from torch import nn

_FORMAT = {"format": "backbone-finetune", "format_version": "1"}


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write the parameters and persistent buffers of a model, and text about them, to a `.safetensors` file.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     save_checkpoint(nn.Linear(2, 1), f"{folder}/model.safetensors", {"architecture": "none"})
    ...     tensors, metadata = read_checkpoint(f"{folder}/model.safetensors")
    >>> sorted(tensors), metadata
    (['bias', 'weight'], {'architecture': 'none'})

    The file appears whole or not at all: it is written under a temporary name beside it and moved into place.
    """
    path = Path(path)
    tensors = {name: tensor.detach().contiguous() for name, tensor in _distinct_tensors(model).items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.touch()
    mode = temporary.stat().st_mode  # as the umask has it; safetensors writes for the owner alone
    try:
        save_file(tensors, temporary, metadata={**metadata, **_FORMAT})
        os.chmod(temporary, mode)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a file that `save_checkpoint` wrote; see there for an example.

    Raises FileNotFoundError, or ValueError for a file that is truncated or not ours. Nothing in a file is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; pass the model.safetensors that a training run wrote.")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            if metadata.get("format") != _FORMAT["format"]:
                raise ValueError(
                    f"{path}: a safetensors file, but not one of backbone-finetune; pass the model.safetensors that a "
                    "training run wrote (weights of other origin go to `train --checkpoint`)."
                )
            if metadata["format_version"] != _FORMAT["format_version"]:
                raise ValueError(
                    f"{path}: format version {metadata['format_version']!r}, and this backbone-finetune reads "
                    f"{_FORMAT['format_version']}; upgrade it."
                )
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: no safetensors file, or a truncated one ({error}); copy or train it again."
        ) from error
    return tensors, {name: text for name, text in metadata.items() if name not in _FORMAT}


def load_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors into a model by name, all of them or none.

    >>> model = nn.Linear(2, 1)
    >>> load_tensors(model, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
    >>> load_tensors(model, {"weight": torch.ones(3, 2), "bias": torch.zeros(1)})
    Traceback (most recent call last):
    ...
    ValueError: the tensors do not fit the Linear: weight has shape (3, 2), not (1, 2)...

    Raises ValueError for missing, unexpected or misshapen tensors.
    """
    own = _distinct_tensors(model)
    faults = [f"{name} is missing" for name in own if name not in tensors]
    faults += [f"{name} is unexpected" for name in tensors if name not in own]
    faults += [
        f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(
            f"the tensors do not fit the {type(model).__name__}: {'; '.join(faults[:3])}{more}; "
            "load them into the architecture that they were saved from."
        )
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    model.train()  # attention biases that levit and its like cached in eval are forgotten when they hear this
    for module, training in modes:
        module.training = training


def _distinct_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict, tied tensors once."""
    seen: set[int] = set()
    distinct: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            distinct[name] = tensor
    return distinct
