"""The state of the random generators of Python, NumPy and torch."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch


def random_state() -> dict[str, Any]:
    """Return the state of all generators, in a form that JSON can hold."""
    name, key, *rest = numpy.random.get_state(legacy=True)
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return {
        "python": random.getstate(),
        "numpy": [name, key.tolist(), *rest],  # type: ignore[union-attr]  # typed for the other form, too
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in on_gpus],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Restore a state that ``random_state`` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8, device="cpu"))
    for index, octets in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(torch.tensor(octets, dtype=torch.uint8, device="cpu"), index)


def seed_everything(seed: int) -> None:
    """Seed all generators."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the state of all generators after the block."""
    before = random_state()
    try:
        yield
    finally:
        restore_random_state(before)
