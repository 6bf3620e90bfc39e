"""Check that no frozen tensor changed, and report which changed, by layer group and likely cause."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .distributed import reshard
from .freezing import is_statistic
from .layers.groups import LayerGroup
from .names import shortened
from .tensors.checksums import checksums, has_checksum
from .tensors.parts import plain_parts, shared_memory


def frozen_tensors(model: nn.Module, frozen: Iterable[nn.Module]) -> dict[str, torch.Tensor]:
    """Return frozen parameters and all buffers of frozen modules, by state-dict name.

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


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the digest of each tensor, by name.

    >>> list(fingerprint({"weight": torch.zeros(2)}))
    ['weight']
    """
    return {name: digest(tensor) for name, tensor in tensors.items()}


def digest(tensor: torch.Tensor) -> str:
    """Return a digest of the bits, dtype and shape of a tensor; for a DTensor, of its local shard.

    >>> digest(torch.zeros(2)) == digest(torch.zeros(2)), digest(torch.zeros(2)) == digest(-torch.zeros(2))
    (True, False)

    A tensor that consists of others (sparse, nested, quantised) is digested through those. A tensor without values, on
    the meta device or uninitialized, is digested by its metadata.
    """
    hashed = hashlib.sha256()
    for part in plain_parts(tensor):
        if is_lazy(part):
            hashed.update(b"lazy")
            continue
        hashed.update(f"{part.dtype} {tuple(part.shape)} ".encode())
        if part.is_meta:
            hashed.update(b"meta")
            continue
        # Only one tensor at a time is copied from the device, and none on the CPU: never a second copy of the model.
        bits = part.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        hashed.update(bits.data)
    return hashed.hexdigest()


@contextmanager
def assert_unchanged(
    model: nn.Module, frozen_modules: Callable[[], Iterable[nn.Module]], layer_groups: Sequence[LayerGroup]
) -> Iterator[None]:
    """Raise AssertionError on exit if a tensor that was frozen on entry has changed.

    >>> layer = nn.Linear(2, 2).requires_grad_(False)
    >>> with assert_unchanged(layer, lambda: [layer], ()):
    ...     _ = layer(torch.ones(1, 2))
    """
    reshard(model)
    was_frozen = frozen_tensors(model, frozen_modules())
    summed = {name for name, tensor in was_frozen.items() if has_checksum(tensor)}
    before = _digest_all(was_frozen, summed)
    del was_frozen
    frozen_names = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    yield
    reshard(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers(remove_duplicate=False))}
    after = _digest_all({name: tensors[name] for name in before if name in tensors}, summed)
    unfrozen = {name for name in frozen_names & tensors.keys() if tensors[name].requires_grad}
    changed = unfrozen | {name for name, was in before.items() if after.get(name) != was}
    if changed:
        causes = describe_changes(model, changed, frozen_names, unfrozen, layer_groups)
        raise AssertionError(f"assert_frozen: {len(changed)} of {len(before)} frozen tensors changed.\n{causes}")


def _digest_all(tensors: Mapping[str, torch.Tensor], summed: Collection[str]) -> dict[str, str]:
    """Return the checksums of the tensors named in ``summed``, and the digests of the others."""
    digests = fingerprint({name: tensor for name, tensor in tensors.items() if name not in summed})
    return digests | checksums({name: tensor for name, tensor in tensors.items() if name in summed})


def describe_changes(
    model: nn.Module,
    changed: Iterable[str],
    parameters: Collection[str],
    unfrozen: Collection[str],
    layer_groups: Sequence[LayerGroup],
) -> str:
    """List the changed tensors by layer group, each with its likely cause.

    >>> model = nn.ModuleDict({"backbone": nn.Linear(2, 2)})
    >>> print(describe_changes(model, ["backbone.bias"], ["backbone.bias"], [], [LayerGroup("0", ("bias",))]))
    0: backbone.bias: written to, by an optimizer that held a gradient of it, a load or a conversion (half())

    Args:
        model: the model after the change.
        changed: names of the tensors that changed.
        parameters: names of the parameters that were frozen before.
        unfrozen: names of the parameters that train now.
        layer_groups: the layer groups of the backbone.
    """
    sharing = dict(shared_memory(model.named_parameters()))
    present = {name for name, _ in (*model.named_parameters(), *model.named_buffers(remove_duplicate=False))}
    by_cause: dict[tuple[str, str], list[str]] = {}
    for name in sorted(changed):
        path, _, attribute = name.rpartition(".")
        if name in unfrozen:
            cause = "unfrozen inside"
        elif name not in present:
            cause = "no longer in the model, because a module was replaced"
        elif name in sharing:
            cause = f"it shares memory with {sharing[name]}, which trains; tie them as one parameter, or copy one"
        elif name in parameters and getattr(model.get_submodule(path), "max_norm", None) is not None:
            cause = "rescaled in the forward by the max_norm of its embedding; set max_norm to None"
        elif name in parameters:
            cause = "written to, by an optimizer that held a gradient of it, a load or a conversion (half())"
        elif is_statistic(attribute):
            cause = (
                "a running statistic, updated by a forward with its module in train mode (call the model's own "
                "train()), or by a load"
            )
        else:
            cause = "a buffer, written by a load or a forward (some modules fill a table in their first forward)"
        by_cause.setdefault((_group_of(name, layer_groups), cause), []).append(name)
    return "\n".join(f"{group}: {shortened(names, 4)}: {cause}" for (group, cause), names in by_cause.items())


def _group_of(name: str, layer_groups: Sequence[LayerGroup]) -> str:
    """Return the layer group of a parameter; for a buffer, that of the nearest parameters."""
    part, _, owner = name.partition(".")
    while part == "backbone" and owner:
        for group in layer_groups:
            if any(other == owner or other.startswith(f"{owner}.") for other in group.parameter_names):
                return group.name
        owner = owner.rpartition(".")[0]
    return part
