"""Write and read checkpoints in the safetensors format."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open  # it comes with timm
from safetensors.torch import save_file
from torch import nn

from .eval_caches import clear_caches
from .files import replacing

_FORMAT = {"format": "backbone-finetune", "format_version": "1"}


_DTYPES = {  # by safetensors' names; no network here has others
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Layout(NamedTuple):
    """Shape and dtype of a tensor in a file.

    >>> Layout((2, 3), torch.float32).shape
    (2, 3)
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write the parameters and persistent buffers of a model, and metadata, to a ``.safetensors`` file.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     save_checkpoint(nn.Linear(2, 1), f"{folder}/model.safetensors", {"architecture": "none"})
    ...     tensors, metadata = read_checkpoint(f"{folder}/model.safetensors")
    >>> sorted(tensors), metadata
    (['bias', 'weight'], {'architecture': 'none'})

    The write is atomic: the file is written under a temporary name in the same folder and then renamed.
    """
    save_tensors(distinct_tensors(model), path, metadata)


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> None:
    """Write tensors by name, as ``save_checkpoint`` does. No two of them may share memory.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     save_tensors({"bias": torch.ones(2)}, f"{folder}/bias.safetensors", {})
    ...     read_checkpoint(f"{folder}/bias.safetensors")
    ({'bias': tensor([1., 1.])}, {})

    Raises OSError if the file cannot be written, e.g. on a full disk.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(Path(path)) as temporary:
        write_safetensors(contiguous, temporary, {**metadata, **_FORMAT})


def write_safetensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file. Raises OSError if it cannot be written, for which safetensors has its own error."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path.parent}: cannot write ({error}); free disk space, or choose another folder") from error


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a file that ``save_checkpoint`` wrote; see there for an example.

    Nothing in a file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, or not a checkpoint of this package.
    """
    with _opened(Path(path)) as (opened, metadata):
        return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118 (no mapping)


def peek_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Layout], dict[str, str]]:
    """Read the metadata of a file and the layouts of its tensors, but no tensor.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     save_checkpoint(nn.Linear(2, 1, bias=False), f"{folder}/model.safetensors", {})
    ...     peek_checkpoint(f"{folder}/model.safetensors")
    ({'weight': Layout(shape=(1, 2), dtype=torch.float32)}, {})

    Raises the errors of ``read_checkpoint``, and ValueError for an unknown dtype.
    """
    layouts: dict[str, Layout] = {}
    with _opened(Path(path)) as (opened, metadata):
        for name in opened.keys():  # noqa: SIM118 (no mapping)
            part = opened.get_slice(name)
            if part.get_dtype() not in _DTYPES:
                raise ValueError(
                    f"{path}: {name[:80]!r} has dtype {part.get_dtype()}; known dtypes are {', '.join(_DTYPES)}."
                )
            layouts[name] = Layout(tuple(part.get_shape()), _DTYPES[part.get_dtype()])
    return layouts, metadata


def check_fit(model: nn.Module, layouts: Mapping[str, Layout | torch.Tensor]) -> None:
    """Raise ValueError unless the names and layouts are exactly those of a model's tensors.

    >>> check_fit(nn.Linear(2, 1, device="meta"), {"weight": Layout((1, 2), torch.float16)})
    Traceback (most recent call last):
    ...
    ValueError: the tensors do not fit the Linear: bias is missing; load them into the architecture ...

    Floating-point tensors match in any precision. The model may be on the meta device.
    """
    own = distinct_tensors(model)
    faults = [f"{name} is missing" for name in own if name not in layouts]
    faults += [f"{name[:200]} is unexpected" for name in layouts if name not in own]
    for name, tensor in own.items():
        if name not in layouts:
            continue
        if tuple(layouts[name].shape) != tuple(tensor.shape):
            faults.append(f"{name} has shape {tuple(layouts[name].shape)}, not {tuple(tensor.shape)}")
        elif _kind(layouts[name].dtype) != _kind(tensor.dtype):
            faults.append(f"{name} has dtype {layouts[name].dtype}, not {tensor.dtype}")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(
            f"the tensors do not fit the {type(model).__name__}: {'; '.join(faults[:3])}{more}; "
            "load them into the architecture that they were saved from."
        )


def load_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors into a model by name, either all of them or none.

    >>> model = nn.Linear(2, 1)
    >>> load_tensors(model, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
    >>> load_tensors(model, {"weight": torch.ones(3, 2), "bias": torch.zeros(1)})
    Traceback (most recent call last):
    ...
    ValueError: the tensors do not fit the Linear: weight has shape (3, 2), not (1, 2)...

    Raises:
        ValueError: a tensor is missing, unexpected, or has another shape or kind of dtype.
    """
    check_fit(model, tensors)
    with torch.no_grad():
        for name, tensor in distinct_tensors(model).items():
            tensor.copy_(tensors[name])
    clear_caches(model)


def distinct_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict of a model with each tied tensor once, as it is written to a file.

    >>> sorted(distinct_tensors(nn.Linear(2, 1)))
    ['bias', 'weight']
    """
    seen: set[int] = set()
    distinct: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            distinct[name] = tensor
    return distinct


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open a checkpoint; yields safetensors' handle, and the metadata without the entries of the format."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; pass the model.safetensors that a training run wrote.")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            if metadata.get("format") != _FORMAT["format"]:
                raise ValueError(
                    f"{path}: a safetensors file, but not one of backbone-finetune; pass the model.safetensors that a "
                    "training run wrote (for other weights use `train --checkpoint`)."
                )
            if metadata.get("format_version") != _FORMAT["format_version"]:
                raise ValueError(
                    f"{path}: format version {str(metadata.get('format_version'))[:20]!r}, and this backbone-finetune "
                    f"reads {_FORMAT['format_version']}; upgrade it."
                )
            yield opened, {name: text for name, text in metadata.items() if name not in _FORMAT}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a safetensors file, or a truncated one, so no model of backbone-finetune; pass the "
            "model.safetensors that a training run wrote, or copy it again."
        ) from error


def _kind(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype
