"""Transformer encoders that are partly frozen, kept from the nested tensors that layers which train refuse."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def padded_encoders(model: nn.Module, before: Iterable[nn.TransformerEncoder] = ()) -> list[nn.TransformerEncoder]:
    """Keep from nested tensors, and list, the encoders whose first layer is frozen below a layer that trains.

    >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(2, 2, 2, batch_first=True), 2)
    >>> _ = encoder.layers[0].requires_grad_(False)
    >>> padded_encoders(encoder) == [encoder], encoder.use_nested_tensor
    (True, False)

    `nn.TransformerEncoder` asks its first layer alone whether nested tensors can replace a padding mask, and layers
    that train refuse them. Those of `before` that it no longer holds for get them back.
    """
    for encoder in before:
        encoder.use_nested_tensor = True
    padded = [
        module
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoder)
        and getattr(module, "use_nested_tensor", False)
        and not any(parameter.requires_grad for parameter in module.layers.get_submodule("0").parameters())
        and any(parameter.requires_grad for parameter in module.layers.parameters())
    ]
    for encoder in padded:
        encoder.use_nested_tensor = False
    return padded
