"""Do something in a training when a number of its optimizer steps are done, e.g. stop it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch.optim.optimizer import register_optimizer_step_post_hook


class StoppedError(Exception):
    """Stands for a kill."""


def stop() -> NoReturn:
    raise StoppedError


@contextmanager
def after_step(number: int, function: Callable[[], Any] = stop) -> Iterator[None]:
    """Call a function when that many optimizer steps have been taken in the block; by default, raise StoppedError."""
    left = number

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            function()

    hook = register_optimizer_step_post_hook(count)
    try:
        yield
    finally:
        hook.remove()
