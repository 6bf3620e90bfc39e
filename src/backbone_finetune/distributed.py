"""What DistributedDataParallel and FSDP2 would do wrong without a message."""

from __future__ import annotations

import sys
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# The reducer of a wrapper keeps its parameters for good, so they are looked up once.
_frozen_at_wrap: WeakKeyDictionary[nn.Module, list[nn.Parameter]] = WeakKeyDictionary()


def active_wrapper() -> DistributedDataParallel | None:
    """Give the DistributedDataParallel whose forward is running.

    >>> active_wrapper() is None
    True
    """
    # A private attribute, but the compiler reads it for the same end; a test fails if torch drops it.
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def check_calls_of(*parts: nn.Module) -> None:
    """Where there are several processes, let each part look for itself at what was unfrozen when it is called.

    >>> check_calls_of(nn.Linear(2, 2))

    A module around the model may call ``model.backbone`` and ``model.classifier`` and never the model.
    """
    if dist.is_available() and dist.is_initialized():
        for part in parts:
            if _check_before_forward not in part._forward_pre_hooks.values():
                part.register_forward_pre_hook(_check_before_forward)


def _check_before_forward(module: nn.Module, inputs: object) -> None:
    check_active_wrapper()


def check_active_wrapper() -> None:
    """Raise RuntimeError in a forward within DistributedDataParallel when what it took for frozen trains.

    >>> check_active_wrapper()
    """
    if (wrapper := active_wrapper()) is not None and torch.is_grad_enabled():
        check_unfrozen_since(wrapper)


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="what trains is compared at each forward within DistributedDataParallel"
)
def check_unfrozen_since(wrapper: DistributedDataParallel) -> None:
    """Raise RuntimeError when parameters train that were frozen when they were wrapped.

    >>> wrapper = active_wrapper()
    >>> if wrapper is not None and torch.is_grad_enabled():
    ...     check_unfrozen_since(wrapper)

    DistributedDataParallel averages the gradients of the parameters that train when it wraps them, and never looks
    again: the others would take each process's own gradients, and the replicas drift apart.
    """
    if wrapper not in _frozen_at_wrap:
        buckets = wrapper.reducer._get_zeros_like_grad_buckets()
        averaged = {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
        # Without what the user told DistributedDataParallel to ignore.
        _frozen_at_wrap[wrapper] = [p for p in wrapper._module_parameters if id(p) not in averaged]
    if any(parameter.requires_grad for parameter in _frozen_at_wrap[wrapper]):
        unfrozen = {id(parameter) for parameter in _frozen_at_wrap[wrapper] if parameter.requires_grad}
        names = [name for name, parameter in wrapper.module.named_parameters() if id(parameter) in unfrozen]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise RuntimeError(
            f"DistributedDataParallel: {', '.join(names[:3])}{more} were frozen when the model was wrapped and train "
            "now; their gradients would not be averaged, and the replicas would drift apart. Wrap again whenever "
            "what trains changes: model = DistributedDataParallel(model.module, ...)."
        )


def reshard(model: nn.Module) -> None:
    """Let the modules that `fully_shard` took over show their own parameters again.

    >>> reshard(nn.Linear(2, 2))

    After a forward without gradients the root of FSDP2 shows whole ones, which go at the next step, and with them what
    was said of them: whether they train, that an optimizer holds them, their digest.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nothing is sharded where it was never imported
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()
