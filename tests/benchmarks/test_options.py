"""`backward_time.py`: the effect of each option on the timed work."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backward_time
import pytest
import torch
from harness import cuda, results
from subjects import networks
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")


def _run(output: Path, *arguments: str, **keywords: Any) -> int:
    small = ["--device", "cpu", "--batch-size", "2", "--repeats", "3", "--threads", "1"]
    return backward_time.main([*small, "--output", str(output), *arguments], **keywords)


class _Spy:
    """Builds networks that record dtypes and memory formats in their forward."""

    def __init__(self) -> None:
        self.logits: set[torch.dtype] = set()
        self.channels_last: set[bool] = set()

    def build(self, name: str, **arguments: Any) -> networks.Network:
        network = networks.build_network(name, **arguments)
        network.model.classifier.register_forward_hook(lambda layer, given, output: self.logits.add(output.dtype))
        network.model.backbone.get_submodule("conv1.0").register_forward_hook(self.note_format)
        return network

    def note_format(self, layer: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        for tensor in (*given, *layer.parameters()):
            self.channels_last.add(tensor.is_contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize(
    ("arguments", "logits", "channels_last"),
    [
        ([], torch.float32, False),
        (["--channels-last"], torch.float32, True),
        (["--amp", "bf16", "--channels-last"], torch.bfloat16, True),
        (["--amp", "fp16"], torch.float16, False),
    ],
)
def test_precision_and_memory_format(
    tmp_path: Path, arguments: list[str], logits: torch.dtype, channels_last: bool
) -> None:
    spy = _Spy()
    small = ["--models", "test_resnet", "--image-size", "32", "--repeats", "1"]
    assert _run(tmp_path, *small, *arguments, build=spy.build) == 0
    report = results.read_report(tmp_path / "backward_time.json")
    assert report.settings["amp"] == (arguments[1] if "--amp" in arguments else "off")
    assert report.settings["channels_last"] == channels_last
    assert report.row("test_resnet", "frozen") is not None
    assert spy.logits == {logits}
    assert spy.channels_last == {channels_last}


class _WatchingClock:
    """A clock that shows 10 ms for each call, which makes a warm-up of 3 calls, and records what `watch` returns."""

    def __init__(self, watch: Callable[[], bool]) -> None:
        self.watch = watch
        self.seen: list[bool] = []

    def time(self, call: Callable[[], Any]) -> tuple[Any, float]:
        result = call()
        self.seen.append(self.watch())
        return result, 10.0


def test_compile_compiles_all_that_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[nn.Module] = []

    def compile_in_name(module: nn.Module, options: object = None) -> Callable[[Tensor], Tensor]:
        def run(images: Tensor) -> Tensor:
            ran.append(module)
            answer: Tensor = module(images)
            return answer

        return run

    def ran_compiled() -> bool:
        answer = bool(ran)
        ran.clear()
        return answer

    clock = _WatchingClock(ran_compiled)
    monkeypatch.setattr(torch, "compile", compile_in_name)
    with torch._dynamo.config.patch(recompile_limit=8):
        assert _run(tmp_path, "--models", "ConvModel", "--compile", clock=clock) == 0
        assert torch._dynamo.config.recompile_limit == 256
    # Seven rows: warm-ups, then forward, backward, optimizer step and whole step of each visit.
    assert clock.seen == [True] * 3 * 7 + [True, False, False, True] * 7 * 3
    report = results.read_report(tmp_path / "backward_time.json")
    assert report.settings["compile"] is True
    assert [row.backward_flops for row in report.rows] == [None] * 5


def test_no_garbage_is_collected_inside_a_clock(tmp_path: Path) -> None:
    clock = _WatchingClock(gc.isenabled)
    assert gc.isenabled()
    assert _run(tmp_path, "--models", "ConvModel", clock=clock) == 0
    assert clock.seen
    assert not any(clock.seen)
    assert gc.isenabled()


def test_gpu_measurements_are_in_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    retries = iter([1, 3])
    monkeypatch.setattr(backward_time, "loop_steps_on", lambda device: 2)
    monkeypatch.setattr(backward_time, "allocation_retries", lambda device: next(retries))
    monkeypatch.setattr(results, "device_work", _kernels_of)
    assert _run(tmp_path, "--models", "ConvModel") == 0
    report = results.read_report(tmp_path / "backward_time.json")
    assert all(len(row.loop_ms) == 3 and row.allocation_retries == 2 for row in report.rows)
    assert all((row.backward_kernels, row.step_kernels) == (3, 3) for row in report.rows)
    # On a CPU the host is the device, so everything is launch-bound.
    assert all("backward" in row.launch_bound for row in report.rows)
    assert "launch-bound" in capsys.readouterr().out
    assert "freed its cache 2 times" in (tmp_path / "backward_time.md").read_text()


def _kernels_of(make_call: Callable[[], Callable[[], object]], device: torch.device) -> cuda.DeviceWork:
    """A stand-in for the profiler: runs the call as often, and reports three kernels that take no time."""
    for _ in range(3):
        call = make_call()
        call()
    return cuda.DeviceWork(3, 0.0)


def test_kernels_are_counted_after_the_last_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def note() -> bool:
        done.append("timed")
        return True

    def fail(make_call: object, device: torch.device) -> cuda.DeviceWork:
        done.append("counted")
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(backward_time, "loop_steps_on", lambda device: 2)
    monkeypatch.setattr(results, "device_work", fail)
    small = ["--models", "ConvModel", "test_vit", "--image-size", "32", "--repeats", "1"]
    assert _run(tmp_path, *small, clock=_WatchingClock(note)) == 0
    assert done.index("counted") == done.count("timed")
    # Rows are kept if kernels cannot be counted.
    report = results.read_report(tmp_path / "backward_time.json")
    assert report.models() == ["ConvModel", "test_vit"]
    assert all(row.step_ms and row.backward_kernels is None for row in report.rows)
