"""A small tensor subclass that wraps others, like quantised weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Quantised(Tensor):
    """A float dtype outside, int8 times a scale inside; only linear layers and copies support it."""

    values: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Quantised:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], context: None, size: object, stride: object) -> Quantised:
        return cls(parts["values"], parts["scale"])

    @classmethod
    def __torch_dispatch__(
        cls, function: Callable[..., Any], types: object, arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        aten = torch.ops.aten
        if function in {aten.detach.default, aten.clone.default}:
            return cls(function(arguments[0].values), function(arguments[0].scale))
        if function in {aten.t.default, aten.mm.default, aten.addmm.default}:
            arguments = tree_map_only(Quantised, lambda tensor: tensor.values * tensor.scale, arguments)
            return function(*arguments, **(keywords or {}))
        raise NotImplementedError(f"{cls.__name__} has no {function}")


def quantise(weight: Tensor) -> torch.nn.Parameter:
    """Return the weight in 8 bits as a frozen parameter."""
    scale = weight.detach().abs().max() / 127
    return torch.nn.Parameter(Quantised((weight.detach() / scale).round().to(torch.int8), scale), requires_grad=False)
