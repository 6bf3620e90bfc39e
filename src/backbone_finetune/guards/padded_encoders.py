"""Turn off nested tensors in partly frozen transformer encoders, whose trainable layers do not support them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def padded_encoders(model: nn.Module, before: Iterable[nn.TransformerEncoder] = ()) -> list[nn.TransformerEncoder]:
    """Turn off nested tensors in encoders with a frozen first layer and a trainable later one; return these.

    >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(2, 2, 2, batch_first=True), 2)
    >>> _ = encoder.layers[0].requires_grad_(False)
    >>> padded_encoders(encoder) == [encoder], encoder.use_nested_tensor
    (True, False)

    ``nn.TransformerEncoder`` decides by its first layer whether to replace a padding mask by nested tensors, and
    trainable layers raise an error for these. Encoders in ``before`` that changed get nested tensors again.
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
