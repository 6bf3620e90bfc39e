"""The precision and memory format of training steps on a CUDA device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def default_precision(device: torch.device) -> str:
    """Return the mixed precision for a device: "bf16" for a CUDA device that has it, else "no".

    >>> default_precision(torch.device("cpu"))  # which trains in float32
    'no'
    """
    return "bf16" if has_tensor_cores(device) else "no"


def has_tensor_cores(device: torch.device) -> bool:
    """Return whether a device is a CUDA one with bf16 and TF32, which compute capability 8.0 (Ampere) introduced."""
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Compute CUDA's matrix products of float32 in "ieee" or "tf32" in the block, and restore the setting after it.

    TF32 rounds factors to 10 bits of mantissa, and is some times faster. cuDNN's convolutions use it by default. If the
    caller has chosen a precision, "tf32" does not change it.

    >>> with products_in("tf32"):
    ...     torch.backends.cuda.matmul.fp32_precision
    'tf32'
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if precision == "tf32" and before != "none":
        yield
        return
    # torch has two settings for this, and reading one raises an error if only the other one was changed to TF32.
    if precision == "tf32":
        matmul.allow_tf32 = True
    else:
        matmul.fp32_precision = precision
    try:
        yield
    finally:
        if precision == "tf32":
            matmul.allow_tf32 = False
        matmul.fp32_precision = before
