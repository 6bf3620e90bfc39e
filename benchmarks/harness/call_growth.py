"""The wrapper's own calls as networks grow, on networks without weights: milliseconds, and by which power they grow."""

from __future__ import annotations

import cProfile
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from subjects.networks import NUM_CLASSES
from torch.utils.benchmark import Timer

from backbone_finetune import FineTuneModel
from harness.results import median, table
from harness.timing import Interval, interval_of_median, take_turns

# Families whose members differ in depth, up to the largest that timm has: built without weights, on the meta device.
LADDERS = {
    "ResNet": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnetv2_152x4_bit"),
    "ViT": (
        "vit_base_patch16_224",
        "vit_large_patch16_224",
        "vit_huge_patch14_224",
        "vit_giant_patch14_224",
        "vit_gigantic_patch14_224",
    ),
}
LINEAR_GROWTH = 1.1  # a little above 1: small networks leave a call's constant cost to be seen
SAMPLE_SECONDS = 0.03


@dataclass(frozen=True)
class CallTime:
    """Milliseconds of one call of the wrapper on one network; those at the same place come from the same pass.

    `function_calls` are those that it makes, of Python's and of C's: what it does, however long the memory takes.
    """

    family: str
    model: str
    call: str
    parameter_tensors: int
    parameters: int
    function_calls: int
    milliseconds: list[float] = field(default_factory=list)


def time_calls(family: str, names: Sequence[str], repeats: int, times: list[CallTime]) -> None:
    """Time the wrapper's own calls on a family in turns, into `times`: an interruption leaves all whole passes there.

    By turns, as a machine that slows down would otherwise show as growth.
    """
    own: list[CallTime] = []
    visits: list[Callable[[], float]] = []
    for name in names:
        # Without weights, which the calls do not touch.
        with torch.device("meta"):
            model = FineTuneModel.from_timm(name, num_classes=NUM_CLASSES)
        tensors = list(model.parameters())
        count = sum(tensor.numel() for tensor in tensors)
        for label, call in calls_of(model).items():
            own.append(CallTime(family, name, label, len(tensors), count, count_function_calls(model, call)))
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


def count_function_calls(model: FineTuneModel, call: Callable[[], object]) -> int:
    """Count the functions that a call calls, directly and below."""
    model.unfreeze_backbone()
    profile = cProfile.Profile()
    profile.runcall(call)
    return sum(entry.callcount for entry in profile.getstats())


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
    passes = zip(*(time.milliseconds for time in times), strict=True)
    return interval_of_median([_exponent(times, taken) for taken in passes])


def growth_of_function_calls(times: Sequence[CallTime]) -> float:
    """Exponent by which the functions that a call calls grow with the number of parameter tensors: 1 is linear."""
    return _exponent(times, [time.function_calls for time in times])


def _exponent(times: Sequence[CallTime], measured: Sequence[float]) -> float:
    sizes = [math.log(time.parameter_tensors) for time in times]
    return statistics.linear_regression(sizes, [math.log(value) for value in measured]).slope


def calls_table(times: Sequence[CallTime]) -> str:
    """Format a family's calls, and how they grow: in what they do, and in the time that it takes."""
    calls = list(dict.fromkeys(time.call for time in times))
    lines = []
    for name in dict.fromkeys(time.model for time in times):
        own = {time.call: time for time in times if time.model == name}
        first = next(iter(own.values()))
        lines.append([name, str(first.parameter_tensors), f"{first.parameters / 1e6:,.0f} M"])
        lines[-1] += [f"{median(own[call].milliseconds):.3g} ms" for call in calls]
    if len(lines) > 1:
        own_times = [[time for time in times if time.call == call] for call in calls]
        exponents = [growth_of_function_calls(its_times) for its_times in own_times]
        verdicts = [f"{exponent:.3f}{' (not linear)' if exponent > LINEAR_GROWTH else ''}" for exponent in exponents]
        lines.append(["growth of functions called (1 = linear)", "", "", *verdicts])
        lines.append(["growth of time", "", "", *(str(growth(its_times)) for its_times in own_times)])
    return table(["", "tensors", "parameters", *calls], lines)
