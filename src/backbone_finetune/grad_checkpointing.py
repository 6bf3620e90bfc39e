"""Gradient checkpointing of timm and transformers networks."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_TIMM = "set_grad_checkpointing"
_TRANSFORMERS = "activation_checkpointing"
_SUPPORTED = "supports_gradient_checkpointing"
_TRANSFORMERS_4 = "gradient_checkpointing"  # its name before transformers 5


def set_grad_checkpointing(backbone: nn.Module, enable: bool) -> None:
    """Turn gradient checkpointing on or off in a timm or transformers network, also inside an adapter.

    >>> import timm
    >>> adapter = nn.Sequential(timm.create_model("resnet18", num_classes=0))
    >>> set_grad_checkpointing(adapter, True)
    >>> adapter[0].grad_checkpointing
    True

    Raises:
        AttributeError: nothing in the backbone has gradient checkpointing.
    """
    networks = list(_checkpointing_networks(backbone))
    if not networks:
        raise AttributeError(
            f"set_grad_checkpointing: {type(backbone).__name__} has no gradient checkpointing, neither timm's "
            f"({_TIMM}) nor transformers' ({_TRANSFORMERS_4}_enable); give the backbone a method "
            f"{_TIMM}(enable), and use torch.utils.checkpoint.checkpoint(..., use_reentrant=False) in its forward."
        )
    for network in networks:
        _switch(network, enable)


def _checkpointing_networks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules that have gradient checkpointing."""
    names = (_TIMM, f"{_TRANSFORMERS}_enable", f"{_TRANSFORMERS_4}_enable")
    # Every transformers network has the methods; an attribute of its class tells whether they are supported.
    if any(hasattr(module, name) for name in names) and getattr(module, _SUPPORTED, True):
        yield module
        return
    for child in module.children():
        yield from _checkpointing_networks(child)


def _switch(network: nn.Module, enable: bool) -> None:
    if hasattr(network, _TIMM):
        getattr(network, _TIMM)(enable)
        return
    name = _TRANSFORMERS if hasattr(network, f"{_TRANSFORMERS}_enable") else _TRANSFORMERS_4
    if enable:
        # Reentrant checkpointing computes no gradients above a frozen stem, whose output does not require them.
        getattr(network, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
    else:
        getattr(network, f"{name}_disable")()
