"""Helpers for several processes: devices, accelerate preparation, unsharding."""

import os
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    convert_outputs_to_fp32,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..precision import default_precision

# One process may compute features or baselines while the others wait.
PATIENCE = timedelta(hours=6)


def find_device(name: str) -> torch.device:
    """Return a device by its name; ``auto`` is that of torch's accelerator (CUDA, MPS, XPU), else the CPU.

    >>> find_device("cpu")
    device(type='cpu')

    Raises:
        ValueError: it is not available; the message lists available devices.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if found is None else found.type
    there = ["cpu", *(f"{kind}:{index}" for index in range(torch.accelerator.device_count()))]
    if name not in {"auto", kind, *there}:
        raise ValueError(f"device {name!r}: not on this machine, which has {', '.join(there)}, or pass auto")
    return torch.device(kind if name == "auto" else name)


def make_accelerator(
    device: torch.device,
    *,
    mixed_precision: str | None = None,
    log_with: str | None = None,
    project_dir: Path | None = None,
) -> Accelerator:
    """Return the accelerator for a device; the launcher sets the number of processes.

    >>> make_accelerator(torch.device("cpu")).device
    device(type='cpu')

    ``mixed_precision`` is "no", "fp16" or "bf16"; the default is the setting of `accelerate launch`, else bf16 on a
    CUDA device that has it. A CUDA device with an index becomes torch's current one, which a later ``cuda`` without an
    index then means; with several processes each has its own. ``log_with`` and ``project_dir`` are accelerate's.

    Raises:
        ValueError: accelerate chose another kind of device, or the launcher FSDP 1.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate uses the current device, or with several processes one each
    precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or default_precision(device)
    # accelerate keeps one state per process: after a run on the CPU or in bf16 it would choose these again.
    chosen = PartialState._shared_state.get("device")
    is_other = chosen is not None and chosen.type != device.type
    is_other |= AcceleratorState._shared_state.get("_mixed_precision", precision) != precision
    if is_other and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        log_with=log_with,
        project_dir=project_dir,
        # DistributedDataParallel would send every buffer, including frozen ones, in each forward; running statistics
        # are averaged once after each epoch instead.
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
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP 1 replaces the parameters by flat ones; pass --fsdp_version 2 to accelerate launch")
    return accelerator


def prepare(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, *, autocast: bool = True
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Prepare a module and its optimizer for one phase; after `release`, the next phase can prepare again.

    Without ``autocast`` the module computes in its own precision, whatever the mixed precision of the accelerator is.

    Without loss scaling, accelerate's wrapper of the optimizer is removed. It has no effect there except, in
    accelerate 1.15, two searches of the import path in each step, which take as long as a step of a classifier.
    """
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        # Each process has the whole model; accelerate 1.15 cannot broadcast one with buffers (its issue 3898).
        plugin.cpu_ram_efficient_loading = False
        # Autocast, as on one device: BatchNorm does not take weights in bf16 and statistics in float32.
        plugin.mixed_precision_policy = None
        if autocast and accelerator.native_amp:
            module.forward = convert_outputs_to_fp32(accelerator.autocast()(module.forward))
    with warnings.catch_warnings():
        # torch 2.14 has another name for it, which torch 2.9 and accelerate do not support.
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        before = accelerator.autocast_handler
        if not autocast:
            accelerator.autocast_handler = AutocastKwargs(enabled=False)
        prepared, prepared_optimizer = accelerator.prepare(module, optimizer)
        accelerator.autocast_handler = before
    return prepared, prepared_optimizer if accelerator.scaler is not None else prepared_optimizer.optimizer


def release(accelerator: Accelerator, prepared: nn.Module) -> None:
    """Undo `prepare` for a module: no wrapper, no autocast in its forward, no mark.

    >>> layer = nn.Linear(2, 2)
    >>> accelerator = make_accelerator(torch.device("cpu"))
    >>> prepared, _ = prepare(accelerator, layer, torch.optim.SGD(layer.parameters()))
    >>> release(accelerator, prepared)
    >>> "_is_accelerate_prepared" in vars(layer)
    False
    """
    module = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    for part in (prepared, module):
        vars(part).pop("_is_accelerate_prepared", None)  # otherwise the next prepare would do nothing
    if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
        del module.forward  # set for autocast
    if accelerator.device.type == "cpu":
        # `free_memory` also runs a full garbage collection, which frees GPU memory. Over everything that torch and timm
        # have loaded, that takes longer than twenty epochs on features.
        accelerator._models, accelerator._optimizers = [], []
    else:
        accelerator.free_memory()


def communicated_bytes(module: nn.Module) -> int:
    """Count the bytes of gradients that a process sends in a step: those of the trainable parameters.

    >>> communicated_bytes(nn.Sequential(nn.Linear(64, 32).requires_grad_(False), nn.Linear(32, 10)))
    1320
    """
    return sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full values of a tensor that may be sharded (FSDP2). Collective: every process must call it.

    >>> full_tensor(torch.ones(2))
    tensor([1., 1.])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
