"""Blocks that several processes run together: an error of one process is raised on all of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

T = TypeVar("T")

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


def is_alone(accelerator: Accelerator | None) -> bool:
    """Return whether this is the only process, e.g. without an accelerator."""
    return accelerator is None or accelerator.num_processes == 1


@contextmanager
def together(accelerator: Accelerator | None) -> Iterator[None]:
    """Wait until every process has finished the block; an error of one of them is raised on all."""
    if accelerator is None or is_alone(accelerator):
        yield
        return
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    sent: Exception | None = error
    is_plain = isinstance(error, ValueError) and error.args == (str(error),)
    if error is not None and not isinstance(error, OSError) and not is_plain:
        # An error that cannot be pickled would raise another error.
        kind = MemoryError if isinstance(error, OUT_OF_MEMORY) else RuntimeError
        sent = kind(f"process {accelerator.process_index}: {type(error).__name__}: {error}")
    errors: list[Any] = [each for each in gather_object([sent]) if each is not None]
    if errors:
        raised: Any = error or errors[0]
        raised.is_on_all_processes = True
        raise raised


def is_on_all_processes(error: Exception) -> bool:
    """Return whether all processes raise an error, by `together` or by its kind, so that they can go on after it.

    >>> is_on_all_processes(MemoryError())
    False
    """
    return getattr(error, "is_on_all_processes", False)


def run_on_main(accelerator: Accelerator | None, function: Callable[[], T]) -> T:
    """Run a function on the main process; every process gets its result or its error."""
    if accelerator is None or is_alone(accelerator):
        return function()
    outcome: list[Any] = [None]
    with together(accelerator):
        if accelerator.is_main_process:
            outcome[0] = function()
    broadcast_object_list(outcome)
    result: T = outcome[0]
    return result
