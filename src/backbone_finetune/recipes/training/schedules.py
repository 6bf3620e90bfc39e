"""The rates of a phase from step to step: warm-up, then level or a cosine."""

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.step_lr import StepLRScheduler

from .phases import Phase

__all__ = ["make_schedule"]


def make_schedule(optimizer: torch.optim.Optimizer, phase: Phase, steps_per_epoch: int) -> Scheduler:
    """Make the schedule of a phase's rates, step by step: they are a function of the step's number alone.

    >>> optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0)
    >>> schedule, rates = make_schedule(optimizer, Phase(epochs=4, warmup_epochs=1, cosine=True), 2), []
    >>> for step in range(1, 9):
    ...     schedule.step_update(step)
    ...     rates.append(round(optimizer.param_groups[0]["lr"], 2))
    >>> rates
    [0.5, 1.0, 0.95, 0.81, 0.61, 0.39, 0.19, 0.05]
    """
    steps, warmup = phase.epochs * steps_per_epoch, round(phase.warmup_epochs * steps_per_epoch)
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper around it
    if phase.cosine:  # one step longer than there are, so that the last one still learns
        return CosineLRScheduler(
            inner, steps - warmup + 1, warmup_t=warmup, warmup_lr_init=0, warmup_prefix=True, t_in_epochs=False
        )
    return StepLRScheduler(inner, steps + 1, decay_rate=1, warmup_t=warmup, warmup_lr_init=0, t_in_epochs=False)
