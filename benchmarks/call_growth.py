"""The wrapper's own calls as networks grow, on networks without weights: milliseconds, and by which power they grow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from measure import Interval, interval_of_median, take_turns
from networks import NUM_CLASSES
from results import median, table
from torch.utils.benchmark import Timer

from backbone_finetune import FineTuneModel


class Rung(NamedTuple):
    """A network of a ladder: timm's architecture of that name, or one that is deeper than any that timm names."""

    architecture: str
    depth: int | None = None

    def __str__(self) -> str:
        return self.architecture if self.depth is None else f"{self.architecture}, depth {self.depth}"

    def build(self) -> FineTuneModel:
        """Build it without weights, which the calls do not touch."""
        arguments: dict[str, Any] = {} if self.depth is None else {"depth": self.depth}
        with torch.device("meta"):
            return FineTuneModel.from_timm(self.architecture, num_classes=NUM_CLASSES, **arguments)


# Up to the largest that timm has. Those ViTs differ by no more than four in their tensors, too little to tell a power
# from the processor's caches, which the small ones fit and the large do not: so on to ten times as many.
LADDERS = {
    "ResNet": (
        Rung("resnet18"),
        Rung("resnet34"),
        Rung("resnet50"),
        Rung("resnet101"),
        Rung("resnet152"),
        Rung("resnetv2_152x4_bit"),
    ),
    "ViT": (
        Rung("vit_base_patch16_224"),
        Rung("vit_large_patch16_224"),
        Rung("vit_huge_patch14_224"),
        Rung("vit_giant_patch14_224"),
        Rung("vit_gigantic_patch14_224"),
        *(Rung("vit_gigantic_patch14_224", depth) for depth in (96, 192, 384)),
    ),
}
LINEAR_GROWTH = 1.1  # a little above 1: small networks leave a call's constant cost to be seen
SAMPLE_SECONDS = 0.03


@dataclass(frozen=True)
class CallTime:
    """Milliseconds of one call of the wrapper on one network; those at the same place come from the same pass."""

    family: str
    model: str
    call: str
    parameter_tensors: int
    parameters: int
    milliseconds: list[float] = field(default_factory=list)


def time_calls(family: str, ladder: Sequence[Rung], repeats: int, times: list[CallTime]) -> None:
    """Time the wrapper's own calls on a family in turns, into `times`: an interruption leaves all whole passes there.

    By turns, as a machine that slows down would otherwise show as growth.
    """
    own: list[CallTime] = []
    visits: list[Callable[[], float]] = []
    for rung in ladder:
        model = rung.build()
        tensors = list(model.parameters())
        count = sum(tensor.numel() for tensor in tensors)
        for label, call in calls_of(model).items():
            own.append(CallTime(family, str(rung), label, len(tensors), count))
            visits.append(sampler(model, call))
    times += own
    for turn in take_turns(visits, repeats):
        for time, elapsed in zip(own, turn, strict=True):
            time.milliseconds.append(elapsed)


def calls_of(model: FineTuneModel) -> dict[str, Callable[[], object]]:
    """Name the calls that a training script makes."""
    return {
        "freeze_backbone()": model.freeze_backbone,
        "unfreeze_backbone()": model.unfreeze_backbone,
        "param_groups(lr)": partial(model.param_groups, lr=1e-3),
        "param_groups(lr, layer_decay)": partial(model.param_groups, lr=1e-3, layer_decay=0.75),
        "train()": model.train,
    }


def sampler(model: FineTuneModel, call: Callable[[], object]) -> Callable[[], float]:
    """Make what takes one sample of a call, in milliseconds: the mean of as many as fill SAMPLE_SECONDS."""
    timer = Timer("call()", globals={"call": call})
    model.unfreeze_backbone()
    number = max(1, round(SAMPLE_SECONDS / timer.timeit(3).mean))

    def sample() -> float:
        model.unfreeze_backbone()
        return float(timer.timeit(number).mean * 1e3)

    return sample


def growth(times: Sequence[CallTime]) -> Interval:
    """Exponent by which a call's time grows with the number of parameter tensors: 1 is linear. A fit for each pass."""
    sizes = [math.log(time.parameter_tensors) for time in times]
    passes = zip(*(time.milliseconds for time in times), strict=True)
    slopes = [statistics.linear_regression(sizes, [math.log(ms) for ms in taken]).slope for taken in passes]
    return interval_of_median(slopes)


def calls_table(times: Sequence[CallTime]) -> str:
    """Lay out a family's calls, and how they grow: not linear where more than chance says so."""
    calls = list(dict.fromkeys(time.call for time in times))
    lines = []
    for name in dict.fromkeys(time.model for time in times):
        own = {time.call: time for time in times if time.model == name}
        first = next(iter(own.values()))
        lines.append([name, str(first.parameter_tensors), f"{first.parameters / 1e6:,.0f} M"])
        lines[-1] += [f"{median(own[call].milliseconds):.3g} ms" for call in calls]
    if len(lines) > 1:
        exponents = [growth([time for time in times if time.call == call]) for call in calls]
        verdicts = [f"{exponent}{' (not linear)' if exponent.low > LINEAR_GROWTH else ''}" for exponent in exponents]
        lines.append(["growth exponent (1 = linear)", "", "", *verdicts])
    return table(["", "tensors", "parameters", *calls], lines)
