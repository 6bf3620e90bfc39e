"""Restore frozen running statistics after weight averaging resets those of every BatchNorm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_RESET = "reset_running_stats"
_BEFORE_RESET = "_statistics_before_reset"


class FrozenStatistics:
    """Restore frozen running statistics in the first training forward after weight averaging has reset them.

    >>> norm = nn.BatchNorm1d(2).eval()
    >>> norm.running_mean.fill_(3.0)
    tensor([3., 3.])
    >>> statistics = FrozenStatistics()
    >>> statistics.guard(norm.modules(), [norm])
    >>> norm.reset_running_stats()
    >>> norm.momentum = None
    >>> statistics.were_reset()
    True
    >>> statistics.restore()
    >>> norm.running_mean
    tensor([3., 3.])

    ``torch.optim.swa_utils.update_bn`` and Lightning's ``StochasticWeightAveraging`` reset every BatchNorm, set its
    momentum to None and run forwards in train mode. Frozen statistics would stay at mean 0 and variance 1. The
    momentum distinguishes this reset from one by the user, which is kept.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[_BatchNorm, dict[str, torch.Tensor], torch.Tensor | None]] = []
        self._first: _BatchNorm | None = None

    def guard(self, modules: Iterable[nn.Module], frozen: Iterable[nn.Module]) -> None:
        """Record the statistics of frozen modules, and make these save them when they are reset in place."""
        if self.were_reset():
            self.restore()
        inside = {id(module) for root in frozen for module in root.modules()}
        self._kept = []
        for module in modules:
            if not isinstance(module, _BatchNorm) or module.running_mean is None:
                continue
            if id(module) not in inside:
                release([module])
            elif module.momentum is not None:
                count = module.num_batches_tracked
                # Lightning replaces the tensors of mean and variance, but zeroes the count in place.
                self._kept.append((module, _statistics(module), None if count is None else count.clone()))
                if _RESET not in vars(module):
                    vars(module)[_RESET] = _KeepingReset(module)
        self._first = self._kept[0][0] if self._kept else None

    def were_reset(self) -> bool:
        """Return whether weight averaging has reset the statistics."""
        return self._first is not None and self._first.momentum is None

    @torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
        reason="restores frozen running statistics that weight averaging has reset; with fullgraph=True, call "
        "update_bn with the model itself"
    )
    def restore(self) -> None:
        """Restore the statistics."""
        with torch.no_grad():
            for module, statistics, count in self._kept:
                before = vars(module).pop(_BEFORE_RESET, {})
                mean = module.get_buffer("running_mean")
                if mean is not statistics["running_mean"] and not mean.any():
                    before = statistics if count is None else {**statistics, "num_batches_tracked": count}
                for name, tensor in before.items():
                    module.get_buffer(name).copy_(tensor)


def release(modules: Iterable[nn.Module]) -> None:
    """Remove from modules the attributes that ``FrozenStatistics.guard`` has set.

    >>> release([nn.BatchNorm1d(2)])
    """
    for module in modules:
        for name in (_RESET, _BEFORE_RESET):
            vars(module).pop(name, None)


def _statistics(module: _BatchNorm) -> dict[str, torch.Tensor]:
    return {name: module.get_buffer(name) for name in ("running_mean", "running_var")}


class _KeepingReset:
    """Replaces ``reset_running_stats`` of a frozen module, and saves the statistics before the reset."""

    def __init__(self, module: _BatchNorm) -> None:
        # A weak reference: with a cycle, memory of a deleted model would be freed only by the garbage collector.
        self._module = ref(module)

    def __call__(self) -> None:
        if (module := self._module()) is not None:
            before = {name: buffer.clone() for name, buffer in module._buffers.items() if buffer is not None}
            vars(module)[_BEFORE_RESET] = before
            type(module).reset_running_stats(module)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a copied or pickled module get its own instance."""
        return _KeepingReset, (self._module(),)
