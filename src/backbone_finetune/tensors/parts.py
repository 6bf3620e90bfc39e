"""The plain tensors inside tensor subclasses, and parameters that share memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.nn.parameter import is_lazy


def plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the strided tensors that hold the values of a tensor; a strided tensor yields itself.

    >>> [part.tolist() for part in plain_parts(torch.eye(2).to_sparse())]
    [[[0, 1], [0, 1]], [1.0, 1.0]]

    For a DTensor this is the local shard. Other wrapper subclasses, such as torchao's, list their tensors in
    ``__tensor_flatten__``.
    """
    parts: Iterable[torch.Tensor]
    if hasattr(tensor, "to_local"):
        parts = (tensor.to_local(),)
    elif hasattr(tensor, "__tensor_flatten__"):
        inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        parts = (part for part in inner if part is not None)
    elif tensor.is_nested:
        parts = tensor.detach().unbind()
    elif tensor.is_mkldnn:
        parts = (tensor.detach().to_dense(),)
    elif tensor.layout != torch.strided:
        in_coordinates = tensor.detach() if tensor.layout == torch.sparse_coo else tensor.detach().to_sparse()
        parts = (in_coordinates._indices(), in_coordinates._values())
    else:
        yield tensor
        return
    for part in parts:
        yield from plain_parts(part)


def shared_memory(parameters: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, str]]:
    """Return pairs of names: a frozen parameter, and a trainable one that shares its memory.

    >>> weight = torch.zeros(2, 2, requires_grad=True)
    >>> shared_memory([("weight", weight), ("transposed", weight.detach().t())])
    [('transposed', 'weight')]
    """
    by_storage: dict[int, list[tuple[str, bool, torch.Tensor]]] = {}
    for name, parameter in parameters:
        for part in plain_parts(parameter):
            if not is_lazy(part) and not part.is_meta and part.numel():
                in_storage = by_storage.setdefault(part.untyped_storage().data_ptr(), [])
                in_storage.append((name, parameter.requires_grad, part))
    pairs: dict[str, str] = {}
    for in_storage in by_storage.values():
        for name, trains, part in in_storage:
            if not trains:
                others = (other for other, other_trains, its in in_storage if other_trains and _overlap(part, its))
                if (first := next(others, None)) is not None:
                    pairs.setdefault(name, first)
    return list(pairs.items())


def _overlap(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors of one storage are sure to overlap: interleaved ones, such as columns, are not."""
    starts = [part.storage_offset() * part.element_size() for part in (first, second)]
    if starts[0] == starts[1]:
        return True
    are_dense = all(torch.ops.aten.is_non_overlapping_and_dense(part) for part in (first, second))
    ends = [start + part.nbytes for start, part in zip(starts, (first, second), strict=True)]
    return bool(are_dense and max(starts) < min(ends))
