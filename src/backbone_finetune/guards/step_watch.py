"""Notice parameters that were unfrozen and that no optimizer holds."""

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

# Two optimizers may step in turn: the critic of a WGAN steps five times for each step of the generator.
STEPS = 10


class StepWatch:
    """Compare what was unfrozen with what the optimizers hold that step parameters of this model.

    >>> layers = nn.ModuleDict({"old": nn.Linear(2, 2), "new": nn.Linear(2, 2).requires_grad_(False)})
    >>> watch = StepWatch()
    >>> watch.note(layers.named_parameters())
    >>> watch.note(layers.requires_grad_(True).named_parameters())
    >>> sorted(watch.pending)
    ['new.bias', 'new.weight']
    >>> torch.optim.SGD(layers.parameters()).step()
    >>> watch.pending
    {}

    An optimizer that was built before the unfreezing does not hold what was unfrozen. Each optimizer says what it holds
    when it steps, also with a rate of 0, without a gradient, and where the forward is compiled. A `step` that is
    compiled itself is not seen.
    """

    def __init__(self) -> None:
        self.pending: dict[str, nn.Parameter] = {}  # unfrozen, and in no optimizer that has stepped since
        self._all: dict[str, nn.Parameter] = {}
        self._trainable: frozenset[str] | None = None
        self._steps = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy has other parameters, and its own optimizers: nothing is pending there."""
        return {**vars(StepWatch()), "_trainable": self._trainable}

    def note(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Take down what trains now; what did not when it was last called is pending until an optimizer holds it."""
        everything = dict(parameters)
        trainable = {name: p for name, p in everything.items() if p.requires_grad and not is_lazy(p)}
        newly = frozenset[str]() if self._trainable is None else trainable.keys() - self._trainable
        self._trainable = frozenset(trainable)
        if newly:
            self._steps = 0
        # A parameter may be another object now: fully_shard puts its own in place.
        self.pending = {name: p for name, p in trainable.items() if name in newly or name in self.pending}
        self._all = everything if self.pending else {}
        if self.pending:
            _listen()
            with _lock:
                _watches.add(self)

    def see_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take what an optimizer holds off what is pending; warn when something is left after `STEPS` steps."""
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
            names = f"{', '.join(left[:3])}{', ...' if len(left) > 3 else ''}"
            warnings.warn(
                f"{len(left)} parameters were unfrozen ({names}) and no optimizer steps them: one that was built "
                "earlier holds what trained then. Build a new one from model.param_groups(...), or the first one from "
                "model.param_groups(..., include_frozen=True), which lives through every unfreezing.",
                stacklevel=4,  # where the optimizer's step() is called
            )


_watches: WeakSet[StepWatch] = WeakSet()
_lock = threading.Lock()


@functools.cache
def _listen() -> None:
    """Hear of each step of an optimizer; for good, as torch runs over its hooks while threads step."""
    register_optimizer_step_post_hook(_tell)


def _tell(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():  # the graph of a step would be broken
        return
    with _lock:
        watches = [watch for watch in _watches if watch.pending]
    for watch in watches:
        watch.see_step(optimizer)
