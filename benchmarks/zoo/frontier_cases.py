"""One network with part of it frozen: whether it has a frontier, and how training on that compares with the whole."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from backbone_finetune import FineTuneModel
from backbone_finetune.frontier import Frontier, KeptTensor, find_frontier

CLASSES = 5
IMAGES = 8
STEPS = 3
REPEATS = 5


@dataclass(frozen=True)
class Case:
    """What was seen of one network with its last `trainable` of `groups` layer groups trainable."""

    family: str
    network: str
    side: int
    groups: int
    trainable: int
    refused: str | None = None  # why it has no frontier
    kept: tuple[str, ...] = ()
    bytes_per_image: int = 0
    native: str | None = None  # what is kept at the network's own image size
    logits_difference: float | None = None  # the largest, over all steps; 0 where all bits are the same
    gradients_difference: float | None = None
    state_is_equal: bool | None = None  # parameters and buffers after the steps, bit for bit
    share_of_step: float | None = None  # CPU time of a step on the frontier, of that of a whole step
    seconds_to_find: float | None = None


def examine(family: str, network: str, side: int, model: FineTuneModel, trainable: int) -> Case:
    """Find the frontier, train on it and without it from the same start, and compare every step."""
    facts: dict[str, Any] = {"family": family, "network": network, "side": side, "trainable": trainable}
    facts["groups"] = len(model.layer_groups)
    model.freeze_backbone(trainable_groups=trainable).train()
    torch.manual_seed(0)
    batches = [torch.randn(IMAGES, 3, side, side) for _ in range(STEPS)]
    started = time.process_time()
    found = find_frontier(model, batches[0])
    facts["seconds_to_find"] = time.process_time() - started
    if not isinstance(found, Frontier):
        return Case(**facts, refused=found.reason)
    records = [found.record(batch) for batch in batches]
    state = copy.deepcopy(model.state_dict())
    whole = _train(model, [partial(model, batch) for batch in batches])
    model.load_state_dict(state)
    cached = _train(model, [partial(found.replay, record) for record in records])
    return Case(
        **facts,
        kept=tuple(str(found).splitlines()),
        bytes_per_image=found.bytes_per_image,
        native=_native_size(network, found.kept) if family in timm.list_modules() else None,
        logits_difference=max(_difference([a], [b]) for a, b in zip(whole.logits, cached.logits, strict=True)),
        gradients_difference=max(_difference(a, b) for a, b in zip(whole.gradients, cached.gradients, strict=True)),
        state_is_equal=all(torch.equal(whole.state[name], value) for name, value in cached.state.items()),
        share_of_step=_share_of_step(model, batches[0], found, records[0]),
    )


@dataclass(frozen=True)
class _Training:
    logits: list[Tensor]
    gradients: list[list[Tensor]]
    state: dict[str, Tensor]


def _train(model: FineTuneModel, forwards: list[Callable[[], Tensor]]) -> _Training:
    optimizer = torch.optim.SGD(model.param_groups(lr=1e-3), momentum=0.9)
    logits, gradients = [], []
    torch.manual_seed(1)  # dropout draws the same in both
    for forward in forwards:
        optimizer.zero_grad()
        logits.append(forward())
        nn.functional.cross_entropy(logits[-1], torch.arange(IMAGES) % CLASSES).backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        optimizer.step()
    return _Training(logits, gradients, copy.deepcopy(model.state_dict()))


def _difference(some: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference of a value, in units of the largest value of its tensor."""
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in zip(some, others, strict=True))


def _share_of_step(model: FineTuneModel, batch: Tensor, frontier: Frontier, record: tuple[Tensor, ...]) -> float:
    """Median over turns of the CPU time of forward and backward on the frontier, of that of the whole network."""

    def seconds(forward: Callable[[], Tensor]) -> float:
        model.zero_grad()
        started = time.process_time()
        forward().square().sum().backward()  # type: ignore[no-untyped-call]
        return time.process_time() - started

    shares = []
    for turn in range(REPEATS + 1):
        whole = seconds(lambda: model(batch))
        cached = seconds(lambda: frontier.replay(record))
        if turn:  # the first warms up
            shares.append(cached / whole)
    return statistics.median(shares)


def _native_size(network: str, kept: tuple[KeptTensor, ...]) -> str:
    """What is kept at the network's own image size, told by shapes on the meta device."""
    with torch.device("meta"):
        model = FineTuneModel.from_timm(network, num_classes=CLASSES)
        batch = torch.empty(1, *model.pretrained_cfg["input_size"])
    calls: dict[str, list[Any]] = {}
    handles = []
    for tensor in kept:
        if tensor.path not in calls:
            seen = calls.setdefault(tensor.path, [])
            hook = model.get_submodule(tensor.path).register_forward_hook
            handles.append(hook(lambda _module, _inputs, output, seen=seen: seen.append(output)))
    with torch.no_grad():
        model.eval()(batch)
    shapes = []
    for tensor in kept:
        output = calls[tensor.path][tensor.call]
        shapes.append(output if tensor.index is None else output[tensor.index])
    kilobytes = sum(shape.numel() * tensor.dtype.itemsize for shape, tensor in zip(shapes, kept, strict=True)) / 1000
    return f"{kilobytes:.0f} at {batch.shape[-1]}"
