"""Notice parameters that were unfrozen and that no optimizer steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..tensor_parts import plain_parts

_SAMPLE = 256  # values of a tensor


class StepWatch:
    """Compare what was unfrozen with what moves from one training forward to the next.

    >>> layers = nn.ModuleDict({"old": nn.Linear(2, 2), "new": nn.Linear(2, 2).requires_grad_(False)})
    >>> watch = StepWatch()
    >>> watch.note(layers.named_parameters())
    >>> watch.note(layers.requires_grad_(True).named_parameters())
    >>> sorted(watch.pending)
    ['new.bias', 'new.weight']

    An optimizer that was built before the unfreezing does not hold what was unfrozen. A module does not know its
    optimizers, but it sees what they write: where others moved and nothing of what was unfrozen did, no optimizer steps
    it. A load or an initialisation before the first forward does not count.
    """

    def __init__(self) -> None:
        self.pending: dict[str, nn.Parameter] = {}  # unfrozen, and not seen to move so far
        self._others: dict[str, nn.Parameter] = {}
        self._trainable: frozenset[str] | None = None
        self._when_noted = _Snapshot({})
        self._at_forward: _Snapshot | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has other parameters, and its own optimizers: nothing is pending there."""
        return {**vars(StepWatch()), "_trainable": self._trainable}

    def note(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Take down what trains now; what did not when it was last called is pending until a step moves it."""
        trainable = {name: p for name, p in parameters if p.requires_grad and not is_lazy(p)}
        newly = frozenset[str]() if self._trainable is None else trainable.keys() - self._trainable
        self._trainable = frozenset(trainable)
        names = newly | self.pending.keys()
        kept = {**self._others, **self.pending}
        # A parameter may be another object now: fully_shard puts its own in place.
        is_same = not newly and all(trainable.get(name) is parameter for name, parameter in kept.items())
        if names and not is_same:
            self.pending = {name: parameter for name, parameter in trainable.items() if name in names}
            self._others = {name: parameter for name, parameter in trainable.items() if name not in names}
            self._when_noted, self._at_forward = _Snapshot({**self.pending, **self._others}), None

    def look_at_forward(self) -> None:
        """Warn when a step since an earlier training forward left all of what is pending as it was."""
        if self._at_forward is None:
            self._at_forward = _Snapshot({**self.pending, **self._others})
        elif self._at_forward.sees_step(self._others) or self._at_forward.sees_step(self.pending):
            if self._at_forward.moved(self.pending):
                self._conclude(self._at_forward.with_idle_gradients(self.pending))
            else:
                self._conclude(list(self.pending))

    def look_at_gradients(self) -> None:
        """Warn when others moved and what is pending has gradients and did not: also where the forward is compiled."""
        if self.pending and self._when_noted.sees_step(self._others):
            left = self._when_noted.with_idle_gradients(self.pending)
            if left or self._when_noted.moved(self.pending):
                self._conclude(left)

    def _conclude(self, left: list[str]) -> None:
        self.pending, self._others, self._when_noted, self._at_forward = {}, {}, _Snapshot({}), None
        if left:
            names = f"{', '.join(left[:3])}{', ...' if len(left) > 3 else ''}"
            warnings.warn(
                f"{len(left)} parameters were unfrozen ({names}) and no optimizer steps them: one that was built "
                "earlier holds what trained then. Build a new one from model.param_groups(...), or the first one from "
                "model.param_groups(..., include_frozen=True), which lives through every unfreezing.",
                stacklevel=2,
            )


class _Snapshot:
    """The versions of parameters, and a sample of their values: fused optimizers write without a new version."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._versions = {name: parameter._version for name, parameter in parameters.items()}
        self._samples = {name: _sample(parameter) for name, parameter in parameters.items()}

    def sees_step(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether any of them moved: by version of all, else by value of the few smallest, which a step writes too."""
        if any(parameter._version != self._versions[name] for name, parameter in parameters.items()):
            return True
        smallest = sorted(parameters, key=lambda name: parameters[name].numel())[:4]
        return bool(self.moved({name: parameters[name] for name in smallest}))

    def moved(self, parameters: Mapping[str, nn.Parameter]) -> set[str]:
        """Name those that moved."""
        return {
            name
            for name, parameter in parameters.items()
            if parameter._version != self._versions[name]
            or not all(map(torch.equal, _sample(parameter), self._samples[name]))
        }

    def with_idle_gradients(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """Name those that have a gradient and did not move; what has none may go unused in the forward.

        A sample of a large tensor may be left where a step moves the rest, as rows of an embedding: beside others that
        moved it counts only where steps show in versions.
        """
        moved = self.moved(parameters)
        if moved and all(parameter._version == self._versions[name] for name, parameter in parameters.items()):
            return []
        return [name for name, parameter in parameters.items() if name not in moved and parameter.grad is not None]


def _sample(parameter: nn.Parameter) -> list[torch.Tensor]:
    parts = (part.detach().reshape(-1) for part in plain_parts(parameter) if not part.is_meta)
    return [part[:: part.numel() // _SAMPLE + 1].clone() for part in parts]
