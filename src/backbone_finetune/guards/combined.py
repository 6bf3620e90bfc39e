"""All guards of a model, run when its freezing changes, when its mode is set, and before each forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ..distributed import check_active_wrapper, check_calls_of
from .frozen_statistics import FrozenStatistics
from .padded_encoders import padded_encoders
from .shared_parts import check_shares_no_memory, warn_of_shared_modes
from .step_watch import StepWatch


class Guards:
    """Run the guards of a model. Each guard has its own file.

    >>> layer = nn.Linear(2, 2)
    >>> guards = Guards(layer)
    >>> with guards.change(layer, lambda: [layer]):
    ...     _ = layer.requires_grad_(False)
    >>> guards.settle(layer, [layer])
    >>> guards.look_at_forward(layer)
    """

    def __init__(self, model: nn.Module) -> None:
        self._steps = StepWatch()
        self._steps.note(model.named_parameters())
        self._statistics = FrozenStatistics()
        self._padded_encoders: list[nn.TransformerEncoder] = []

    @contextmanager
    def change(self, model: nn.Module, frozen_modules: Callable[[], Sequence[nn.Module]]) -> Iterator[None]:
        """Change ``requires_grad`` inside; undone if a frozen parameter then shares memory with a trainable one."""
        self._steps.note(model.named_parameters())
        before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            yield
            check_shares_no_memory(model)
        except BaseException:
            for parameter, required in before:
                parameter.requires_grad = required
            raise
        warn_of_shared_modes(model, frozen_modules())

    def settle(self, model: nn.Module, frozen: Sequence[nn.Module]) -> None:
        """Record which parts are frozen and which train, after modes were set."""
        self._statistics.guard(model.modules(), frozen)
        self._padded_encoders = padded_encoders(model, self._padded_encoders)
        check_calls_of(*model.children())
        self._steps.note(model.named_parameters())

    def look_at_forward(self, model: nn.Module) -> None:
        """Check DistributedDataParallel and weight averaging before a forward."""
        check_active_wrapper()
        if self._statistics.were_reset() and model.training:
            self._statistics.restore()
