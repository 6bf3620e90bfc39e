"""Copies of a network that share its weights, to run it without changing it."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def eval_copy(network: ModuleT) -> ModuleT:
    """Copy a network in eval mode. The copy shares the parameters and has its own modes, buffers and caches.

    >>> layer = nn.BatchNorm1d(2)
    >>> twin = eval_copy(layer)
    >>> twin.weight is layer.weight, twin.running_mean is layer.running_mean, twin.training
    (True, False, False)

    Modules, and the lists, dicts and bound methods that contain them, are copied; any other attribute (a lock, a
    process group) is shared. Hooks are left out, except those with which torch itself computes weights.
    """
    return _StructureCopier(_keep_parameter).copy(network).eval()


def meta_copy(network: ModuleT) -> ModuleT:
    """Copy a network in eval mode, with its parameters and buffers on the meta device.

    >>> meta_copy(nn.Linear(4, 2))(torch.empty(8, 4, device="meta")).shape
    torch.Size([8, 2])
    """
    return _StructureCopier(_to_meta).copy(network).eval()


def sharing_copy(module: ModuleT) -> ModuleT:
    """Copy a module with its hooks and modes. The copy shares the parameters and buffers.

    >>> layer = nn.BatchNorm1d(2)
    >>> twin = sharing_copy(layer)
    >>> twin is layer, twin.weight is layer.weight, twin.running_mean is layer.running_mean
    (False, True, True)
    """
    return _StructureCopier(lambda tensor: tensor, keep_hooks=True).copy(module)


def shallow_copy(module: ModuleT) -> ModuleT:
    """Copy a module but not its children. The dicts of children and hooks are copied; tensors are shared.

    >>> layer = nn.Linear(4, 2)
    >>> shallow_copy(layer).weight is layer.weight
    True
    """
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if name == "_modules" or (name.startswith("_") and "_hooks" in name and isinstance(value, dict)):
            twin.__dict__[name] = value.copy()
    return twin


def rebind(value: Any, copies: dict[int, Any]) -> Any:
    """Bind a bound method, or a partial of one, to the copy of its module.

    >>> layer, twin = nn.Linear(4, 2), nn.Linear(4, 2)
    >>> rebind(layer.forward, {id(layer): twin}).__self__ is twin
    True
    """
    if isinstance(value, types.MethodType) and id(value.__self__) in copies:
        return types.MethodType(value.__func__, copies[id(value.__self__)])
    if type(value) is functools.partial:
        return functools.partial(rebind(value.func, copies), *value.args, **value.keywords)
    return value


class _StructureCopier:
    """Copies the modules of a network; ``state`` converts each parameter and buffer."""

    def __init__(self, state: Callable[[torch.Tensor], torch.Tensor], *, keep_hooks: bool = False) -> None:
        self.state = state
        self.keep_hooks = keep_hooks
        self.copies: dict[int, Any] = {}

    def copy(self, module: ModuleT) -> ModuleT:
        if id(module) in self.copies:
            return cast(ModuleT, self.copies[id(module)])
        if isinstance(module, torch.jit.ScriptModule):  # its attributes are not in Python
            self.copies[id(module)] = copy.deepcopy(module)
            return cast(ModuleT, self.copies[id(module)])
        twin = self.copies[id(module)] = object.__new__(type(module))
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                twin.__dict__[name] = {key: self.copy_state(tensor) for key, tensor in value.items()}
            elif name.endswith("_hooks") and name.startswith("_") and isinstance(value, dict):
                kept = {key: self.copy_value(h) for key, h in value.items() if self.keep_hooks or _computes(h)}
                twin.__dict__[name] = self.copies[id(value)] = type(value)(kept)
            else:
                twin.__dict__[name] = self.copy_value(value)
        return twin

    def copy_state(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in self.copies:
            self.copies[id(tensor)] = self.state(tensor)
        return cast(torch.Tensor, self.copies[id(tensor)])

    def copy_value(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return self.copy(value)
        if isinstance(value, nn.Parameter) or id(value) in self.copies:  # e.g. in an RNN's list of weights
            return self.copy_state(value)
        if isinstance(value, torch.Tensor):  # a cache; deepcopy fails for a tensor with a gradient function
            return value.detach().clone()
        if type(value) in (list, tuple, set):
            return type(value)(self.copy_value(entry) for entry in value)
        return self.copy_attribute(value)

    def copy_attribute(self, value: Any) -> Any:
        if type(value) in (dict, OrderedDict, defaultdict):
            twin = self.copies[id(value)] = copy.copy(value)
            twin.update((key, self.copy_value(entry)) for key, entry in value.items())
            return twin
        if isinstance(value, RemovableHandle):  # a lazy layer removes its hook with it
            twin = copy.copy(value)
            twin.hooks_dict_ref = self.copy_reference(value.hooks_dict_ref)
            twin.extra_dict_ref = tuple(map(self.copy_reference, value.extra_dict_ref))
            return twin
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            self.copy(value.__self__)
        return rebind(value, self.copies)

    def copy_reference(self, reference: weakref.ref[Any]) -> weakref.ref[Any]:
        copied = self.copies.get(id(reference()))
        return reference if copied is None else weakref.ref(copied)


def _keep_parameter(tensor: torch.Tensor) -> torch.Tensor:
    if is_lazy(tensor):  # the first forward initializes it in place
        return _uninitialized(tensor, tensor.device)
    return tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    if is_lazy(tensor):
        return _uninitialized(tensor, torch.device("meta"))
    if type(tensor) in (torch.Tensor, nn.Parameter):
        values = torch.empty_like(tensor, device="meta")
    else:  # a quantised weight may have no operators on the meta device
        values = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _uninitialized(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    kind: Any = type(tensor)
    return cast(torch.Tensor, kind(requires_grad=tensor.requires_grad, device=device, dtype=tensor.dtype))


def _computes(hook: Any) -> bool:
    """Return whether a hook is part of a module's computation: torch's own (lazy layers), or this package's cut."""
    return (getattr(hook, "__module__", None) or "").partition(".")[0] in ("torch", __name__.partition(".")[0])


@contextmanager
def isolated(network: nn.Module) -> Iterator[None]:
    """Run without gradients, and restore the random state of the CPU and of the network's devices on exit.

    >>> network = nn.Linear(2, 2)
    >>> before = torch.get_rng_state()
    >>> with isolated(network):
    ...     _ = torch.rand(1)
    >>> torch.equal(before, torch.get_rng_state())
    True
    """
    devices = {p.device for p in network.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng(sorted(devices, key=str), device_type=kind), torch.no_grad():
        yield


def assert_same(actual: Any, expected: Any) -> None:
    """Raise AssertionError unless two tensors, or dicts, lists and tuples of them, are equal up to rounding.

    >>> assert_same(torch.tensor([1e-7, 2e-7]), torch.tensor([1e-7, 3e-7]))
    Traceback (most recent call last):
    ...
    AssertionError: Tensor-likes are not close!...

    The tolerances are ``torch.testing``'s for the dtype, relative to the largest value: values near zero have the
    rounding error of the large ones, and an absolute tolerance would accept any two tensors of small values.
    """
    if isinstance(expected, Mapping) and isinstance(actual, Mapping) and list(actual) == list(expected):
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, (list, tuple)) and isinstance(actual, (list, tuple)) and len(actual) == len(expected):
        for pair in zip(actual, expected, strict=True):
            assert_same(*pair)
        return
    if not isinstance(actual, torch.Tensor) or not isinstance(expected, torch.Tensor):
        raise AssertionError(f"a {type(actual).__name__} and a {type(expected).__name__} cannot be compared")
    largest = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    torch.testing.assert_close(actual / largest, expected / largest)
