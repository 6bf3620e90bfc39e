"""Timing: what is measured, what is not, and ratios."""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from harness import timing
from torch import Tensor, nn


def test_a_known_sleep_is_measured_correctly() -> None:
    clock = timing.WallClock()
    timed = [clock.time(lambda: time.sleep(0.02)) for _ in range(5)]
    assert [result for result, _ in timed] == [None] * 5
    # Never shorter than the sleep; the best of five is without other load on the machine.
    assert 20 <= min(elapsed for _, elapsed in timed) < 30


class _Slow(torch.autograd.Function):
    """Takes a known time, different in forward and backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor) -> Tensor:
        time.sleep(0.01)
        return weight * 1

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        time.sleep(0.03)
        return gradient


def _slow_step(weight: nn.Parameter, events: list[str]) -> timing.TrainingStep:
    def forward() -> Tensor:
        events.append("forward")
        loss: Tensor = _Slow.apply(weight).sum()
        loss.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: events.append(f"backward, gradient {weight.grad}")
        )
        return loss

    def update() -> None:
        events.append("update")
        time.sleep(0.02)

    def clear_gradients() -> None:
        weight.grad = None

    def enter() -> None:
        events.append("enter")
        time.sleep(0.04)

    return timing.TrainingStep(enter, forward, update, clear_gradients)


def test_each_part_of_a_step_is_timed_separately() -> None:
    weight = nn.Parameter(torch.ones(1))
    events: list[str] = []
    step = _slow_step(weight, events)
    times = []
    for _ in range(4):
        weight.grad = torch.ones(1)  # from an earlier step
        times.append(timing.time_step(step, timing.WallClock()))
    assert 10 <= min(t.forward for t in times) < 20
    assert 30 <= min(t.backward for t in times) < 40
    assert 20 <= min(t.optimizer for t in times) < 30
    assert 60 <= min(t.step for t in times) < 90
    # Adding to an existing gradient is other work; entering a variant is not timed.
    once = ["forward", "backward, gradient None", "update"]
    assert events == ["enter", *once, *once] * 4
    assert weight.grad is None


def test_steps_back_to_back_are_one_measurement() -> None:
    weight = nn.Parameter(torch.ones(1))
    step = timing.TrainingStep(
        lambda: None, lambda: weight.sum() * 2, lambda: None, lambda: setattr(weight, "grad", None)
    )
    times = timing.time_step(step, _ScriptedClock(1.0, 2.0, 3.0, 6.0, 20.0), loop_steps=4)
    assert times == timing.StepTimes(1.0, 2.0, 3.0, 6.0, 5.0, times.backward_host, times.step_host)
    assert times.backward_host
    assert times.step_host
    assert weight.grad is None
    assert timing.time_step(step, _ScriptedClock(1.0, 2.0, 3.0, 6.0)).loop is None
    assert timing.loop_steps_on(torch.device("cuda")) > 1
    assert timing.loop_steps_on(torch.device("cpu")) == 0


def test_the_host_is_timed_until_the_work_is_queued() -> None:
    device = _Device()
    clock = timing.EventClock(device.new_event, device.synchronize)
    host: list[float] = []
    _, elapsed = clock.time(timing.noting_host(lambda: device.work("long on the device", 1e6), host))
    assert elapsed == 1e6
    assert host[0] < 1e3  # queued without waiting


def test_variants_take_turns_a_b_b_a() -> None:
    visited: list[str] = []

    def visit(name: str) -> Callable[[], str]:
        return lambda: visited.append(name) or name  # type: ignore[func-returns-value]

    passes = list(timing.take_turns([visit("A"), visit("B"), visit("C")], 3))
    assert visited == ["A", "B", "C", "C", "B", "A", "A", "B", "C"]
    assert passes == [("A", "B", "C")] * 3


def test_an_interrupted_pass_yields_nothing() -> None:
    answers = iter([1, 2, 3])

    def visit() -> int:
        for answer in answers:
            return answer
        raise KeyboardInterrupt

    turns = timing.take_turns([visit, visit], 5)
    assert next(turns) == (1, 2)
    with pytest.raises(KeyboardInterrupt):
        next(turns)


def test_the_interval_of_an_a_against_a_ratio_contains_1() -> None:
    generator = random.Random(0)

    def noisy(drift: float) -> float:
        return 100 * drift * generator.lognormvariate(0, 0.1)

    covered = 0
    for _ in range(100):
        drifts = [1 + repetition / 10 for repetition in range(20)]
        ratio = timing.paired_ratio([noisy(d) for d in drifts], [noisy(d) for d in drifts], resamples=500)
        covered += ratio.low <= 1 <= ratio.high
    # For a 95 % interval, with the uncertainty of a hundred trials; 100 % would be too wide.
    assert 88 <= covered <= 99


def test_an_interval_excludes_the_tails() -> None:
    samples = [float(place) for place in range(1, 22)]
    ratio = timing.paired_ratio(samples, [1.0] * 21)
    # The median of 21 lies between the 6th and the 16th with 97 %, by the binomial distribution.
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((6, 11, 16), abs=1)
    # The extremes of four thousand draws are further out.
    assert ratio.high - ratio.low <= 11


@pytest.mark.parametrize(("passes", "text"), [(5, "2.000 [too few passes]"), (6, "2.000 [2.000, 2.000]")])
def test_an_interval_needs_six_passes(passes: int, text: str) -> None:
    ratio = timing.paired_ratio([2.0] * passes, [1.0] * passes)
    assert str(ratio) == text
    assert (ratio.low, ratio.high) == (2.0, 2.0)
    assert str(timing.Interval(1.0, 1.0, 1.0)) == "1.000 [1.000, 1.000]"  # counted, not timed


def test_a_machine_that_slows_down_does_not_change_a_paired_ratio() -> None:
    drift = [1 + repetition for repetition in range(12)]
    ratio = timing.paired_ratio([2.0 * d for d in drift], [1.0 * d for d in drift])
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)
    assert str(ratio) == "2.000 [2.000, 2.000]"


@pytest.mark.parametrize(("numerator", "denominator"), [([1.0], [1.0, 2.0]), ([], [])])
def test_a_ratio_needs_pairs(numerator: list[float], denominator: list[float]) -> None:
    with pytest.raises(ValueError, match=r"paired_ratio: .* pass as many of each, and one at least"):
        timing.paired_ratio(numerator, denominator)


def test_interquartile_range() -> None:
    assert timing.interquartile_range([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
    assert timing.interquartile_range([7.0]) == 0.0


class _ScriptedClock:
    """A clock that shows the next of the given times for each call."""

    def __init__(self, *elapsed: float) -> None:
        self.elapsed = list(elapsed)

    def time(self, call: Callable[[], timing.Result]) -> tuple[timing.Result, float]:
        return call(), self.elapsed.pop(0)


@pytest.mark.parametrize(
    ("elapsed", "calls"),
    [([9.0, 1.0, 1.0, 1.0, 1.0], 4), ([9.0, 8.0, 4.0, 2.0, 2.0, 1.0, 1.0, 1.0], 8), ([9.0, 9.0, 9.0], 3)],
)
def test_warm_up_ends_when_calls_no_longer_get_faster(elapsed: list[float], calls: int) -> None:
    done: list[int] = []
    assert timing.warm_up(lambda: done.append(1), _ScriptedClock(*elapsed)) == calls == len(done)


def test_warm_up_of_short_calls_has_a_minimum_time() -> None:
    assert timing.warm_up(lambda: None, _ScriptedClock(*[1.0] * 99), at_least_ms=50) == 50
    assert timing.least_warm_up(torch.device("cuda")) > timing.least_warm_up(torch.device("cpu")) > 0


def test_warm_up_ends_on_a_noisy_machine() -> None:
    assert timing.warm_up(lambda: None, _ScriptedClock(*[0.9**n for n in range(99)]), at_most=6) == 6


class _Device:
    """A stand-in for a GPU: the host queues work, and the device runs it in order at its own speed."""

    def __init__(self) -> None:
        self.now = 0.0
        self.queue: list[Callable[[], None]] = []
        self.log: list[str] = []

    def work(self, name: str, milliseconds: float) -> None:
        def do() -> None:
            self.log.append(name)
            self.now += milliseconds

        self.queue.append(do)

    def synchronize(self) -> None:
        self.log.append("idle")
        while self.queue:
            self.queue.pop(0)()

    def new_event(self) -> _Event:
        return _Event(self)


class _Event:
    def __init__(self, device: _Device) -> None:
        self.device = device
        self.at: float | None = None

    def record(self) -> None:
        def do() -> None:
            self.at = self.device.now

        self.device.queue.append(do)

    def elapsed_time(self, end_event: _Event) -> float:
        assert self.at is not None, "read before the device came to it"
        assert end_event.at is not None, "read before the device came to it"
        return end_event.at - self.at


def test_an_event_clock_times_only_the_call() -> None:
    device = _Device()
    device.work("earlier", 1000)
    clock = timing.EventClock(device.new_event, device.synchronize, flush=lambda: device.work("flush", 500))
    result, elapsed = clock.time(lambda: device.work("call", 7))
    assert result is None
    assert elapsed == 7
    # The flush is queued before waiting for the device, so it is finished when the first event is recorded.
    assert device.log == ["idle", "earlier", "flush", "idle", "call"]


def test_the_flush_buffer_is_freed_before_the_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _Device()
    buffers: list[weakref.ref[Tensor]] = []

    def empty(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer = torch.ones(size, dtype=dtype)
        buffers.append(weakref.ref(buffer))
        return buffer

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1000))
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: device.new_event())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: device.synchronize())
    monkeypatch.setattr(torch, "empty", empty)
    clock = timing.clock_for(torch.device("cuda"), flush_l2=True)
    alive, _ = clock.time(lambda: [buffer() is not None for buffer in buffers])
    assert alive == [False]


def test_an_event_clock_without_a_flush() -> None:
    device = _Device()
    clock = timing.EventClock(device.new_event, device.synchronize)
    assert clock.time(lambda: device.work("call", 3)) == (None, 3)
    assert "flush" not in device.log


def test_a_missing_device_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"--device cuda: torch .* sees no CUDA device here; pass --device cpu"):
        timing.resolve_device("cuda")
    assert timing.resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert timing.resolve_device("auto") == torch.device("cuda")


def test_a_cpu_has_the_hosts_clock_and_no_flush() -> None:
    cpu = torch.device("cpu")
    assert isinstance(timing.clock_for(cpu), timing.WallClock)
    with pytest.raises(ValueError, match="flush_l2: only a CUDA device has the cache that this clears, not cpu"):
        timing.clock_for(cpu, flush_l2=True)


@pytest.mark.cuda
def test_a_gpu_is_timed_by_its_events() -> None:
    device = torch.device("cuda")
    clock = timing.clock_for(device, flush_l2=True)
    small, large = (torch.randn(n, n, device=device) for n in (64, 4096))
    timing.warm_up(lambda: large @ large, clock)
    assert clock.time(lambda: large @ large)[1] > clock.time(lambda: small @ small)[1] > 0
