"""Count the memory that a step keeps, and reduce the batch size when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from harness import cuda

Result = TypeVar("Result")
# torch's messages for memory errors outside its own allocator, which raises OutOfMemoryError.
_OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    # cuDNN's search for an algorithm skips those whose workspace does not fit, and raises this if none is left.
    "was unable to find an engine to execute this computation",
    "DefaultCPUAllocator: can't allocate memory",
)


def count_saved_bytes(forward: Callable[[], object], parameters: Iterable[nn.Parameter]) -> int:
    """Count the bytes that a forward keeps for its backward: each storage once and completely, without parameters.

    A storage counts completely, because a small view keeps all of it alive.
    """
    parameter_storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    # References to the storages prevent that their addresses are reused, so addresses identify them.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_storages:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def peak_memory(call: Callable[[], object], device: torch.device) -> cuda.PeakMemory | None:
    """Return the bytes on the device before and during a call; None on a CPU, where torch does not count them."""
    return cuda.peak_memory(call, device) if device.type == "cuda" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, in any form that torch raises."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY)


def at_largest_batch(measure: Callable[[int], Result], batch_size: int, say: Callable[[str], object]) -> Result:
    """Measure at `batch_size`, halved as long as the device runs out of memory; `say` prints a message."""
    while True:
        try:
            return measure(batch_size)
        except RuntimeError as error:
            if batch_size == 1 or not is_out_of_memory(error):
                raise
        # Outside the handler: inside it, the traceback keeps the tensors that did not fit alive.
        batch_size //= 2
        say(f"out of memory: going on with batch size {batch_size}")
        gc.collect()
        torch.accelerator.empty_cache()
