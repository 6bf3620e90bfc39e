"""One pass of a frozen backbone over a loader, in the precision and memory layout that suit its device."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten
from torch.utils.data import DataLoader
from tqdm import tqdm

from backbone_finetune.eval_caches import preserve_modes

from ..data.targets import describe_value, split_row
from .compiled import Compile, Run, compile_checked

__all__ = ["FeatureBatch", "UncacheableError", "autocast_dtype", "backbone_batches", "in_eval", "trains"]

logger = logging.getLogger(__name__)


class UncacheableError(ValueError):
    """What a backbone returns cannot be stored per image, or nowhere is room for it."""


class FeatureBatch(NamedTuple):
    """The features of a batch: tensors of (B, ...), how the backbone's output is made of them, and the targets."""

    slots: tuple[Tensor, ...]
    structure: TreeSpec
    targets: Tensor


def trains(module: nn.Module) -> bool:
    """Tell whether any parameter of a module trains.

    >>> trains(nn.Linear(2, 2)), trains(nn.Linear(2, 2).requires_grad_(False)), trains(nn.Flatten())
    (True, False, False)
    """
    return any(parameter.requires_grad for parameter in module.parameters())


def autocast_dtype(backbone: nn.Module, device: torch.device) -> torch.dtype | None:
    """Choose bf16 where a float32 backbone gains from it on a device, else None.

    >>> autocast_dtype(nn.Linear(2, 2).half(), torch.device("cpu")) is None
    True

    A CPU without bf16 instructions emulates them: EfficientNet-Lite0 took 20 times as long on one of AMD's.
    """
    if any(parameter.is_floating_point() and parameter.dtype != torch.float32 for parameter in backbone.parameters()):
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None
    return None


@contextmanager
def in_eval(module: nn.Module) -> Iterator[None]:
    """Set a module to eval in the block, and restore the mode of each of its submodules after it."""
    with preserve_modes(module):
        module.eval()
        yield


def backbone_batches(
    backbone: nn.Module,
    loader: DataLoader[Any],
    device: torch.device,
    dtype: torch.dtype | None,
    title: str | None,
    *,
    compile: Compile | None = None,  # noqa: A002
) -> Iterator[FeatureBatch]:
    """Run a backbone, in autocast to ``dtype`` unless it is None, over each batch; yields features on the CPU.

    Where the memory of a device is too small for a batch, it and all that follow run in parts of half its size.

    Raises:
        ValueError: a batch is not ``(inputs, ..., targets)``, or does not fit the backbone's forward.
        UncacheableError: the backbone returns something else than tensors with an entry per image.
    """
    # Channels-last inputs are enough: convolutions follow their input, so the weights stay as they are. A batch of
    # EfficientNet-Lite0 took .73 of the time on a CPU, with the weights converted as well .70.
    convolves = device.type in {"cpu", "cuda"} and any(isinstance(module, nn.Conv2d) for module in backbone.modules())
    run: Run = backbone
    size = 0
    for number, batch in enumerate(tqdm(loader, desc=title, unit="batch", disable=title is None)):
        inputs, targets = split_row(batch)
        check_arguments(backbone, inputs)
        inputs = [tensor.to(device) for tensor in inputs]
        if convolves:
            inputs = [
                tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
                for tensor in inputs
            ]
        # Not inference_mode: its tensors, and what modules cache in it, could take no part in autograd afterwards.
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            if number == 0 and compile is not None:
                run = compile_checked(compile, backbone, inputs, tolerance=5e-2 if dtype is not None else 1e-3)
            (slots, structure), size = run_in_parts(run, inputs, size or len(targets))
        for slot in slots:
            if not isinstance(slot, Tensor) or slot.ndim == 0 or len(slot) != len(targets):
                raise UncacheableError(
                    f"the backbone gave {describe_value(slot)} for {len(targets)} images; it must give tensors with "
                    "one entry per image, alone or in a tuple, list or dict"
                )
        widened = (slot.float() if dtype is not None and slot.dtype == dtype else slot for slot in slots)
        yield FeatureBatch(tuple(slot.cpu() for slot in widened), structure, targets.cpu())


def run_in_parts(run: Run, inputs: Sequence[Tensor], size: int) -> tuple[tuple[list[Any], TreeSpec], int]:
    """Run a batch in parts of at most ``size``, halved while a device runs out of memory.

    >>> run_in_parts(nn.Flatten(), [torch.ones(3, 1)], 2)[0][0]
    [tensor([[1.],
            [1.],
            [1.]])]

    Returns:
        The flattened outputs with their structure, and the size that fitted.
    """
    while True:
        try:
            if size >= len(inputs[0]):
                return tree_flatten(run(*inputs)), size
            parts = [
                tree_flatten(run(*part)) for part in zip(*(torch.split(each, size) for each in inputs), strict=True)
            ]
            slots = [torch.cat(part) for part in zip(*(slots for slots, _ in parts), strict=True)]
            return (slots, parts[0][1]), size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = -(-min(size, len(inputs[0])) // 2)
            logger.warning("out of memory: the backbone runs on %d images at a time from here on", size)
        if inputs[0].device.type == "cuda":  # not in the except block, where the failed pass is still referred to
            torch.cuda.empty_cache()


def check_arguments(backbone: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Check that a backbone's forward takes so many inputs.

    >>> check_arguments(nn.Linear(2, 2), [torch.ones(1, 2), torch.ones(1)])
    Traceback (most recent call last):
    ...
    ValueError: the dataset's rows have 2 inputs before the target, which Linear.forward(... does not take

    Raises:
        ValueError: it does not.
    """
    taken = signature(backbone.forward)
    try:
        taken.bind(*inputs)
    except TypeError:
        raise ValueError(
            f"the dataset's rows have {len(inputs)} inputs before the target, which {type(backbone).__name__}.forward"
            f"{taken} does not take"
        ) from None
