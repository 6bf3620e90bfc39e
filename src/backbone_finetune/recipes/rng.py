"""The state of the random generators that training may draw from: those of Python, NumPy and torch."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch

__all__ = ["preserve_rng_state", "random_state", "restore_random_state", "seed_everything"]


def random_state() -> dict[str, Any]:
    """Return the state of all generators, in a form that JSON can hold.

    >>> before = random_state()
    >>> drawn = torch.rand(1), random.random(), numpy.random.rand()
    >>> restore_random_state(before)
    >>> drawn == (torch.rand(1), random.random(), numpy.random.rand())
    True
    """
    version, internal, gauss = random.getstate()
    legacy: Any = numpy.random.get_state()  # numpy types it as either of two forms
    name, key, *rest = legacy
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, key.tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        else [],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Restore a state that ``random_state`` returned; see there for an example."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, key, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(key, dtype=numpy.uint32), *rest))
    torch.set_rng_state(_as_bytes(state["torch"]))
    for index, text in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_as_bytes(text), index)


def seed_everything(seed: int) -> None:
    """Seed all generators.

    >>> with preserve_rng_state():
    ...     seed_everything(1)
    ...     first = torch.rand(1), random.random()
    ...     seed_everything(1)
    ...     first == (torch.rand(1), random.random())
    True
    """
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the state of all generators after the block.

    >>> with preserve_rng_state():
    ...     drawn = torch.rand(1)
    >>> torch.equal(drawn, torch.rand(1))
    True
    """
    before = random_state()
    try:
        yield
    finally:
        restore_random_state(before)


def _as_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
