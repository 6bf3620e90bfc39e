"""The precision and memory format of training steps on a CUDA device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def default_precision(properties: Any) -> str:
    """Return the mixed precision for a device by its properties: "bf16" for a CUDA device that has it, else "no".

    >>> default_precision(None)  # of a CPU, which trains in float32
    'no'

    Args:
        properties: ``torch.cuda.get_device_properties(device)``, or None for another device.
    """
    return "bf16" if has_tensor_cores(properties) else "no"


def has_tensor_cores(properties: Any) -> bool:
    """Return whether a CUDA device has bf16 and TF32, which compute capability 8.0 (Ampere) introduced."""
    return properties is not None and (properties.major >= 8 or torch.version.hip is not None)


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
