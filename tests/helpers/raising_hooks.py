"""Raise an error in a forward, to stop a command at a chosen point."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def raising(error: BaseException, when: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Raise an error before the forward of any module for which `when` returns True."""

    def check(module: nn.Module, inputs: Any) -> None:
        if when(module):
            raise error

    handle = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


def is_pixel_baseline(module: nn.Module) -> bool:
    """Return whether a module is the backbone of the baseline on raw pixels, which trains after the model itself."""
    return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size == 32


def trains(module: nn.Module) -> bool:
    """Return whether a module is a linear classifier in train mode."""
    return isinstance(module, nn.Linear) and module.training
