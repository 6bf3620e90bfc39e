"""Checks for DistributedDataParallel, and resharding for FSDP2."""

from __future__ import annotations

import sys
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .names import shortened

# The parameters of a wrapper's reducer never change, so they are looked up once.
_frozen_at_wrap: WeakKeyDictionary[nn.Module, list[nn.Parameter]] = WeakKeyDictionary()


def active_wrapper() -> DistributedDataParallel | None:
    """Return the DistributedDataParallel whose forward is running, or None.

    >>> active_wrapper() is None
    True
    """
    # A private attribute, which torch's compiler also reads; a test fails if torch removes it.
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def check_calls_of(*parts: nn.Module) -> None:
    """If there are several processes, register a hook on each part that runs ``check_active_wrapper``.

    >>> check_calls_of(nn.Linear(2, 2))

    A module around the model may call ``model.backbone`` and ``model.classifier`` without calling the model.
    """
    if dist.is_available() and dist.is_initialized():
        for part in parts:
            if _check_before_forward not in part._forward_pre_hooks.values():
                part.register_forward_pre_hook(_check_before_forward)


def _check_before_forward(module: nn.Module, inputs: object) -> None:
    check_active_wrapper()


def check_active_wrapper() -> None:
    """Raise RuntimeError in a DistributedDataParallel forward if parameters were unfrozen after wrapping.

    >>> check_active_wrapper()
    """
    if (wrapper := active_wrapper()) is not None and torch.is_grad_enabled():
        check_unfrozen_since(wrapper)


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="each forward in DistributedDataParallel checks for parameters that were unfrozen after wrapping"
)
def check_unfrozen_since(wrapper: DistributedDataParallel) -> None:
    """Raise RuntimeError if parameters train that were frozen when they were wrapped.

    >>> wrapper = active_wrapper()
    >>> if wrapper is not None and torch.is_grad_enabled():
    ...     check_unfrozen_since(wrapper)

    DistributedDataParallel averages only the gradients of parameters that require gradients at construction. Others
    would use the gradients of their own process, and the replicas would drift apart.
    """
    if wrapper not in _frozen_at_wrap:
        buckets = wrapper.reducer._get_zeros_like_grad_buckets()
        averaged = {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
        # Parameters that the user told DistributedDataParallel to ignore are not among them.
        _frozen_at_wrap[wrapper] = [p for p in wrapper._module_parameters if id(p) not in averaged]
    if any(parameter.requires_grad for parameter in _frozen_at_wrap[wrapper]):
        unfrozen = {id(parameter) for parameter in _frozen_at_wrap[wrapper] if parameter.requires_grad}
        names = [name for name, parameter in wrapper.module.named_parameters() if id(parameter) in unfrozen]
        raise RuntimeError(
            f"DistributedDataParallel: {shortened(names)} were frozen when the model was wrapped and train "
            "now; their gradients would not be averaged, and the replicas would drift apart. Wrap again whenever "
            "what trains changes: model = DistributedDataParallel(model.module, ...)."
        )


def reshard(model: nn.Module) -> None:
    """Reshard all FSDP2 modules, so that ``parameters()`` returns the sharded parameters.

    >>> reshard(nn.Linear(2, 2))

    After a forward without gradients, FSDP2's root keeps unsharded parameters until the next step. Changes made to
    those (``requires_grad``, membership in an optimizer) would be lost.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # if it was never imported, nothing is sharded
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()
