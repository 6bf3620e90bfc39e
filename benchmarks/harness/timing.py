"""Timing of training steps, for all benchmarks.

What is measured:

- The graph is rebuilt and gradients are set to None before the backward clock starts; it measures `.backward()` only.
- Forward (with the loss), optimizer step and the whole step are measured separately.
- On a GPU, where the host may be slower, steps are also timed back to back, as in a training loop.
- Variants take turns, A B B A, in one process on the same tensors, so that a slower machine affects all of them.
- Results are medians of paired ratios with a bootstrap interval, and an A/A row shows the noise.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from harness import cuda

Result = TypeVar("Result")


class Clock(Protocol):
    """Times a call; returns its result and the milliseconds on the device."""

    def time(self, call: Callable[[], Result]) -> tuple[Result, float]: ...


class WallClock:
    """The monotonic clock of the host, for work that is finished when the call returns."""

    def time(self, call: Callable[[], Result]) -> tuple[Result, float]:
        start = time.perf_counter_ns()
        result = call()
        return result, (time.perf_counter_ns() - start) / 1e6


class ProcessClock:
    """The CPU time of this process with all threads, for work on a shared CPU."""

    def time(self, call: Callable[[], Result]) -> tuple[Result, float]:
        start = time.process_time_ns()
        result = call()
        return result, (time.process_time_ns() - start) / 1e6


def milliseconds_of(call: Callable[[], object], clock: Clock) -> float:
    """Return the milliseconds of a call."""
    return clock.time(call)[1]


class Event(Protocol):
    """The part of `torch.cuda.Event` that a device clock uses."""

    def record(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float: ...


class EventClock:
    """A pair of device events around each call, on an idle device.

    The device is idle when the first event is recorded, so earlier work is not counted; it has finished when the pair
    is read, so all work is counted. In between, the device waits for the host to launch each kernel: if kernels
    are shorter than their launches, as in a frozen backward, the interval is the host's time. `cuda.device_work` has
    the device's alone. `flush` empties the second-level cache before the first event.
    """

    def __init__(
        self,
        new_event: Callable[[], Event],
        synchronize: Callable[[], object],
        *,
        flush: Callable[[], object] | None = None,
    ) -> None:
        self._new_event = new_event
        self._synchronize = synchronize
        self._flush = flush

    def time(self, call: Callable[[], Result]) -> tuple[Result, float]:
        if self._flush is not None:
            self._flush()
        start, end = self._new_event(), self._new_event()
        self._synchronize()
        start.record()
        result = call()
        end.record()
        self._synchronize()
        return result, start.elapsed_time(end)


def clock_for(device: torch.device, *, flush_l2: bool = False) -> Clock:
    """Return the clock that is right on this device; `flush_l2` clears a GPU's second-level cache before each call."""
    if device.type != "cuda":
        if flush_l2:
            raise ValueError(f"flush_l2: only a CUDA device has the cache that this clears, not {device}.")
        return WallClock()
    flush: Callable[[], None] | None = None
    if flush_l2:
        # Twice the cache, as one pass over exactly its size may leave some of the old lines in place.
        size = 2 * cuda.second_level_cache_bytes(device)

        def flush() -> None:
            # Freed at once, so that it is not counted as memory of the measured work.
            torch.empty(size, dtype=torch.uint8, device=device).zero_()

    return EventClock(cuda.new_event, lambda: cuda.synchronize(device), flush=flush)


def resolve_device(name: str) -> torch.device:
    """Turn `auto`, `cpu` or `cuda` into a device that is there; `auto` is CUDA where torch sees it, else the CPU."""
    if name == "auto":
        name = "cuda" if cuda.is_available() else "cpu"
    if name == "cuda" and not cuda.is_available():
        raise ValueError(
            f"--device cuda: torch {torch.__version__} sees no CUDA device here; "
            "pass --device cpu, or install a CUDA build of torch and a driver."
        )
    return torch.device(name)


@dataclass(frozen=True)
class TrainingStep:
    """One variant's training step, in the parts that are timed.

    `enter` puts the shared tensors into this variant's state; `forward` returns the (scaled) loss.
    """

    enter: Callable[[], object]
    forward: Callable[[], Tensor]
    update: Callable[[], object]
    clear_gradients: Callable[[], object]

    def run(self) -> None:
        """Run the whole step, as in a training loop."""
        self.clear_gradients()
        self.forward().backward()  # type: ignore[no-untyped-call]
        self.update()


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of one repetition; `step` is a separate run, not the sum of the other three.

    `loop` is the mean of several steps back to back; `backward_host` and `step_host` are the host's times to
    queue a backward and a step. None on a CPU.
    """

    forward: float
    backward: float
    optimizer: float
    step: float
    loop: float | None = None
    backward_host: float | None = None
    step_host: float | None = None


def loop_steps_on(device: torch.device) -> int:
    """Return the number of steps to time back to back: none on a CPU, where the host does all the work."""
    return 5 if device.type == "cuda" else 0


def time_step(step: TrainingStep, clock: Clock, loop_steps: int = 0) -> StepTimes:
    """Time one repetition of a variant: its parts one by one, the whole step, then `loop_steps` steps back to back."""
    step.enter()
    step.clear_gradients()
    host: list[float] = []
    loss, forward = clock.time(step.forward)
    _, backward = clock.time(noting_host(loss.backward, host))
    _, optimizer = clock.time(step.update)
    del loss
    step.clear_gradients()
    _, whole = clock.time(noting_host(step.run, host))
    times = StepTimes(forward, backward, optimizer, whole)
    if loop_steps:

        def run_back_to_back() -> None:
            for _ in range(loop_steps):
                step.run()

        loop = milliseconds_of(run_back_to_back, clock) / loop_steps
        times = replace(times, loop=loop, backward_host=host[0], step_host=host[1])
    # Otherwise the next variant's clock would include freeing these gradients.
    step.clear_gradients()
    return times


def noting_host(call: Callable[[], Result], taken: list[float]) -> Callable[[], Result]:
    """Wrap a call to record the host's milliseconds until it returns; a device may still be running queued work."""

    def run() -> Result:
        result, elapsed = WallClock().time(call)
        taken.append(elapsed)
        return result

    return run


def warm_up(call: Callable[[], object], clock: Clock, *, at_most: int = 20, at_least_ms: float = 0.0) -> int:
    """Call until two calls in a row are not faster than the best before; return the number of calls.

    During compilation, cuDNN's search for algorithms, allocator growth and clock ramps, calls still get faster.
    A clock ramp is longer than three short calls, so calls take at least `at_least_ms`, even beyond `at_most`.
    """
    best = float("inf")
    steady = count = 0
    spent = 0.0
    while (steady < 2 and count < at_most) or spent < at_least_ms:
        _, elapsed = clock.time(call)
        count += 1
        spent += elapsed
        steady = steady + 1 if elapsed >= 0.95 * best else 0
        best = min(best, elapsed)
    return count


def least_warm_up(device: torch.device) -> float:
    """Return the milliseconds of work after which a device has full speed: a GPU raises its clock rate gradually."""
    return 200.0 if device.type == "cuda" else 20.0


def take_turns(visits: Sequence[Callable[[], Result]], repeats: int) -> Iterator[tuple[Result, ...]]:
    """Visit A B B A A B B A ...: yield one result per visit for each complete pass, in the order of `visits`.

    A pass that is interrupted yields nothing, so what was yielded is always paired.
    """
    positions = range(len(visits))
    for repetition in range(repeats):
        results = {
            position: visits[position]() for position in (positions if repetition % 2 == 0 else reversed(positions))
        }
        yield tuple(results[position] for position in positions)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Turn off the cyclic garbage collector during measurements, like `timeit`."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# With fewer, all samples are on one side of the median in more than 5 % of runs by chance: 2 / 2^n.
FEWEST_PASSES = 6


@dataclass(frozen=True)
class Interval:
    """A median with the bounds of its 95 % bootstrap interval, and from how many passes; None where it is exact."""

    median: float
    low: float
    high: float
    passes: int | None = None

    def __str__(self) -> str:
        if self.passes is not None and self.passes < FEWEST_PASSES:
            return f"{_three_figures(self.median)} [too few passes]"
        return f"{_three_figures(self.median)} [{_three_figures(self.low)}, {_three_figures(self.high)}]"


def _three_figures(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float], *, resamples: int = 4000) -> Interval:
    """Median of the ratios of samples taken in the same pass, with its 95 % bootstrap interval over passes."""
    if len(numerator) != len(denominator) or not numerator:
        raise ValueError(
            f"paired_ratio: {len(numerator)} and {len(denominator)} samples; pass as many of each, and one at least."
        )
    ratios = torch.tensor(numerator, dtype=torch.float64) / torch.tensor(denominator, dtype=torch.float64)
    return interval_of_median(ratios.tolist(), resamples=resamples)


def interval_of_median(samples: Sequence[float], *, resamples: int = 4000) -> Interval:
    """Median of samples, one from each pass, with its 95 % bootstrap interval over passes."""
    values = torch.tensor(samples, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)  # the same samples always give the same interval
    picks = torch.randint(len(values), (resamples, len(values)), generator=generator)
    medians = values[picks].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(values.quantile(0.5).item(), low, high, len(values))


def interquartile_range(samples: Sequence[float]) -> float:
    """Third quartile less the first; 0 for a single sample."""
    if len(samples) < 2:
        return 0.0
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return third - first
