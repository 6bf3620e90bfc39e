"""Trace which tensors of a forward change between epochs: those that depend on trainable parameters or randomness."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ChangeTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Marks the tensors of a forward that are computed from a trainable parameter or a random number.

    >>> network = nn.Linear(2, 2)
    >>> with ChangeTrace(network) as trace:
    ...     with torch.no_grad():
    ...         output = network(torch.ones(1, 2))
    >>> trace.changes(output), trace.changes(torch.ones(1, 2))
    (True, False)

    ``requires_grad`` is not enough: ``detach``, ``no_grad`` and reentrant checkpoints drop it. If Python reads a marked
    value, as in ``if x.sum() > 0``, every later tensor is marked.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recomputed: set[FrameType] = set()  # calls of checkpoint() that backward repeats
        self.drew = False  # whether the forward has drawn a random number so far
        self._everything = False
        # References keep the storages alive, so that no other storage gets the same identity.
        self._marked: dict[int, object] = {}
        for parameter in network.parameters():
            if parameter.requires_grad:
                self._mark(parameter)

    def __enter__(self) -> ChangeTrace:
        """Start tracing a forward."""
        self._everything = self.drew = False
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def changes(self, value: object) -> bool:
        """Return whether a value can differ between epochs. Values that are not tensors cannot."""
        return isinstance(value, torch.Tensor) and (
            self._everything or value.requires_grad or _identity(value)[0] in self._marked
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = _given(func, args, kwargs)
        draws = _draws(func, given)
        self.drew = self.drew or draws
        if self._everything or draws or any(map(self.changes, tree_leaves((args, kwargs)))):
            self._everything = self._everything or func is torch.ops.aten._local_scalar_dense.default
            for value in tree_leaves((result, _written(func, given))):
                if isinstance(value, torch.Tensor):
                    self._mark(value)
            self.recomputed.update(checkpoints())
        return result

    def _mark(self, tensor: torch.Tensor) -> None:
        identity, owner = _identity(tensor)
        self._marked[identity] = owner


def checkpoints() -> Iterator[FrameType]:
    """Yield the calls of ``torch.utils.checkpoint.checkpoint`` that are running, the innermost first.

    >>> list(checkpoints())
    []
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "checkpoint" and frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            yield frame
        frame = frame.f_back


def _identity(tensor: torch.Tensor) -> tuple[int, object]:
    """Identify a tensor by its storage, which views share. Some tensor subclasses have none."""
    try:
        storage = tensor.untyped_storage()
    except NotImplementedError:
        return id(tensor), tensor
    return int(storage._cdata), storage


def _given(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call of an operator by name."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _written(func: Any, given: Mapping[str, Any]) -> list[Any]:
    aliased = [argument for argument in func._schema.arguments if argument.alias_info is not None]
    return [given.get(argument.name) for argument in aliased if argument.alias_info.is_write]


def _draws(func: Any, given: Mapping[str, Any]) -> bool:
    """Return whether an operator is random. Fused attention has that tag, but is not random without dropout."""
    has_dropout = any(argument.name == "dropout_p" for argument in func._schema.arguments)
    return torch.Tag.nondeterministic_seeded in func.tags and not (has_dropout and given.get("dropout_p", 0.0) == 0.0)
