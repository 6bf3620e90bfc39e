"""The proof that nothing frozen changed: digests of what is frozen, and what moved, by layer group and cause."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from typing import cast

import torch
from torch import nn

from .layer_groups import LayerGroup


def frozen_tensors(model: nn.Module, frozen: Iterable[nn.Module]) -> dict[str, torch.Tensor]:
    """Collect frozen parameters and the buffers, persistent or not, of frozen modules, by state-dict name.

    >>> layer = nn.BatchNorm1d(2).requires_grad_(False)
    >>> sorted(frozen_tensors(layer, [layer]))
    ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']
    """
    tensors: dict[str, torch.Tensor] = {
        name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad
    }
    inside = {id(module) for root in frozen for module in root.modules()}
    for path, module in model.named_modules():
        if id(module) in inside:
            prefix = f"{path}." if path else ""
            tensors |= {prefix + name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    return tensors


def digest(tensor: torch.Tensor) -> str:
    """Digest the exact bits, dtype and shape of a tensor; of a DTensor, those of the local shard.

    >>> digest(torch.zeros(2)) == digest(torch.zeros(2)), digest(torch.zeros(2)) == digest(-torch.zeros(2))
    (True, False)
    """
    to_local = getattr(tensor, "to_local", None)
    local = cast(torch.Tensor, to_local()) if to_local is not None else tensor
    hashed = hashlib.sha256(f"{local.dtype} {tuple(local.shape)} ".encode())
    for part in (local,) if local.layout == torch.strided else _parts_of_sparse(local):
        # One tensor at a time leaves the device, and on the CPU its own memory is read: no second copy of the model.
        bits = part.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        hashed.update(bits.data)
    return hashed.hexdigest()


def _parts_of_sparse(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    in_coordinates = tensor.detach() if tensor.layout == torch.sparse_coo else tensor.detach().to_sparse()
    return in_coordinates._indices(), in_coordinates._values()


def describe_changes(
    changed: Iterable[str],
    present: Collection[str],
    parameters: Collection[str],
    unfrozen: Collection[str],
    layer_groups: Sequence[LayerGroup],
) -> str:
    """List by layer group what moved, each with its likely cause.

    >>> print(describe_changes(["backbone.0.w"], ["backbone.0.w"], ["backbone.0.w"], [], [LayerGroup("0", ("0.w",))]))
    0: backbone.0.w: written to, by an optimizer that held a gradient of it, or by a load
    """
    by_cause: dict[tuple[str, str], list[str]] = {}
    for name in sorted(changed):
        if name in unfrozen:
            cause = "unfrozen inside"
        elif name not in present:
            cause = "no longer in the model, since a module was replaced"
        elif name.rpartition(".")[2].startswith(("running_", "num_batches_tracked")):
            cause = (
                "a running statistic, moved by a forward with its module in train mode (call the model's own train()), "
                "or by a load"
            )
        elif name not in parameters:
            cause = "a buffer, written by a load or a forward (some fill a table in their first forward)"
        else:
            cause = "written to, by an optimizer that held a gradient of it, or by a load"
        by_cause.setdefault((_group_of(name, layer_groups), cause), []).append(name)
    return "\n".join(
        f"{group}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}: {cause}"
        for (group, cause), names in by_cause.items()
    )


def _group_of(name: str, layer_groups: Sequence[LayerGroup]) -> str:
    """The layer group of a parameter, and of a buffer that of the parameters nearest to it."""
    part, _, owner = name.partition(".")
    while part == "backbone" and owner:
        for group in layer_groups:
            if any(other == owner or other.startswith(f"{owner}.") for other in group.parameter_names):
                return group.name
        owner = owner.rpartition(".")[0]
    return part
