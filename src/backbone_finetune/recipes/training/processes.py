"""What several processes need beyond one: one voice, one decision, and the whole of what is in parts."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["communicated_bytes", "find_device", "full_tensor", "make_accelerator", "prepare", "release"]

# One process may compute features or references while the others wait for it.
PATIENCE = timedelta(hours=6)


def find_device(name: str) -> torch.device:
    """Find a device by its name; ``auto`` is the first CUDA device, else Apple's MPS, else the CPU.

    >>> find_device("cpu")
    device(type='cpu')

    Raises:
        ValueError: it is not; the message names those that are.
    """
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else there[-1])
    if name not in {*there, *(["cuda"] if len(there) > 1 and there[1].startswith("cuda") else [])}:
        raise ValueError(f"device {name!r}: not on this machine, which has {', '.join(there)}, or pass auto")
    return torch.device(name)


def make_accelerator(device: torch.device, *, mixed_precision: str | None = None) -> Accelerator:
    """Make the accelerator for a device; how many processes there are, the launcher says.

    >>> make_accelerator(torch.device("cpu")).device
    device(type='cpu')

    ``mixed_precision`` is "no", "fp16" or "bf16"; left out, it is what `accelerate launch` was told.

    Raises:
        ValueError: accelerate chose another kind of device.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the current one, or with several processes each its own
    # accelerate keeps one state per process: after a run on the CPU it would choose the CPU again.
    chosen = PartialState._shared_state.get("device")
    if chosen is not None and chosen.type != device.type and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=mixed_precision,
        # DistributedDataParallel would send every buffer, frozen ones too, in each forward; what statistics gather
        # is averaged once after each epoch instead.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    if accelerator.device.type != device.type:
        raise ValueError(
            f"device {device}: accelerate computes on {accelerator.device} here, as its launcher or "
            "ACCELERATE_USE_CPU says; pass that device, or change these"
        )
    return accelerator


def prepare(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Prepare a module and its optimizer for one phase; after `release`, the next phase can prepare anew.

    Where no loss is scaled, accelerate's wrapper around the optimizer is left out. It adds nothing there but, in
    accelerate 1.15, two searches of the import path in each step, which take as long as a classifier's own step.
    """
    with warnings.catch_warnings():
        # torch 2.14 has another name for it, which 2.9 and accelerate do not know.
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        prepared, prepared_optimizer = accelerator.prepare(module, optimizer)
    return prepared, prepared_optimizer if accelerator.scaler is not None else prepared_optimizer.optimizer


def release(accelerator: Accelerator, prepared: nn.Module) -> None:
    """Give a module back as it was before `prepare`: no wrapper, no autocast around its forward, no mark.

    >>> layer = nn.Linear(2, 2)
    >>> accelerator = make_accelerator(torch.device("cpu"))
    >>> prepared, _ = prepare(accelerator, layer, torch.optim.SGD(layer.parameters()))
    >>> release(accelerator, prepared)
    >>> "_is_accelerate_prepared" in vars(layer)
    False
    """
    module = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    for part in (prepared, module):
        vars(part).pop("_is_accelerate_prepared", None)  # with it, the next prepare would do nothing
    if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
        del module.forward  # put there for autocast, and left as its class has it
    # It collects all garbage too, so that a GPU's memory comes back. A CPU's does so without, and twenty epochs on
    # features take less time than a search of all that torch and timm have loaded.
    with nothing_collected() if accelerator.device.type == "cpu" else nullcontext():
        accelerator.free_memory()


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Keep what lives out of any garbage collection in the block; what the caller had kept out stays so.

    >>> with nothing_collected():
    ...     gc.collect()
    0
    """
    if gc.get_freeze_count():  # thawing would thaw the caller's too
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def communicated_bytes(module: nn.Module) -> int:
    """Count the bytes of gradients that a process gives to the others in a step: those of what trains, once.

    >>> communicated_bytes(nn.Sequential(nn.Linear(64, 32).requires_grad_(False), nn.Linear(32, 10)))
    1320
    """
    return sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)


def full_tensor(tensor: Tensor) -> Tensor:
    """Give the values on all processes together, where a tensor is in parts (FSDP2); all of them must ask.

    >>> full_tensor(torch.ones(2))
    tensor([1., 1.])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
