"""Warn about unfrozen parameters that are in no optimizer."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..names import shortened

# Optimizers may alternate: the critic of a WGAN takes five steps for each step of the generator.
STEPS = 10


class StepWatch:
    """Compare unfrozen parameters with those in the optimizers that step parameters of this model.

    >>> layers = nn.ModuleDict({"old": nn.Linear(2, 2), "new": nn.Linear(2, 2).requires_grad_(False)})
    >>> watch = StepWatch()
    >>> watch.note(layers.named_parameters())
    >>> watch.note(layers.requires_grad_(True).named_parameters())
    >>> sorted(watch.pending)
    ['new.bias', 'new.weight']
    >>> torch.optim.SGD(layers.parameters()).step()
    >>> watch.pending
    {}

    An optimizer that was built before the unfreezing does not contain the unfrozen parameters. A hook on each
    optimizer step reads its parameters, also with a learning rate of 0, without gradients, and with a compiled
    forward. A compiled ``step`` is not seen.
    """

    def __init__(self) -> None:
        self.pending: dict[str, nn.Parameter] = {}  # unfrozen, and in no optimizer that has taken a step since
        self._all: dict[str, nn.Parameter] = {}
        self._trainable: frozenset[str] | None = None
        self._steps = 0

    def __getstate__(self) -> dict[str, Any]:
        """Copy without pending parameters: a copy has other parameters and its own optimizers."""
        return {**vars(StepWatch()), "_trainable": self._trainable}

    def note(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Record what trains now. Newly trainable parameters are pending until an optimizer contains them."""
        everything = dict(parameters)
        trainable = {name: p for name, p in everything.items() if p.requires_grad and not is_lazy(p)}
        newly = frozenset[str]() if self._trainable is None else trainable.keys() - self._trainable
        self._trainable = frozenset(trainable)
        if newly:
            self._steps = 0
        # A parameter may be another object now: fully_shard replaces them.
        self.pending = {name: p for name, p in trainable.items() if name in newly or name in self.pending}
        self._all = everything if self.pending else {}
        if self.pending:
            _listen()
            with _lock:
                _watches.add(self)

    def see_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Remove an optimizer's parameters from the pending ones; warn if some are left after ``STEPS`` steps."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if held.isdisjoint(map(id, self._all.values())):
            return  # of another model
        self.pending = {name: p for name, p in self.pending.items() if p.requires_grad and id(p) not in held}
        self._steps += 1
        if self.pending and self._steps < STEPS:
            return
        left = list(self.pending)
        self.pending, self._all = {}, {}
        if left:
            warnings.warn(
                f"{len(left)} parameters were unfrozen ({shortened(left)}) but are in no optimizer, so they do not "
                "train. Build a new optimizer from model.param_groups(...), or the first one from "
                "model.param_groups(..., include_frozen=True), which includes parameters that are unfrozen later.",
                stacklevel=4,  # where the optimizer's step() is called
            )


_watches: WeakSet[StepWatch] = WeakSet()
_lock = threading.Lock()


@functools.cache
def _listen() -> None:
    """Register a hook on every optimizer step. It is never removed: other threads may be running the hooks."""
    register_optimizer_step_post_hook(_tell)


def _tell(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():  # the graph of a step would be broken
        return
    with _lock:
        watches = [watch for watch in _watches if watch.pending]
    for watch in watches:
        watch.see_step(optimizer)
