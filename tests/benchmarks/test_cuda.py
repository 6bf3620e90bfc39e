"""`harness/cuda.py` without a GPU, with stand-ins for torch, the profiler and nvidia-smi."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import cuda, environment
from torch.autograd import DeviceType

CARD = torch.device("cuda")


@pytest.fixture
def _a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch report one GPU."""
    properties = SimpleNamespace(
        name="NVIDIA Test", major=9, minor=0, total_memory=2**36, uuid="12-34", L2_cache_size=1
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": 3})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setenv("TEARDOWN_CUPTI", "0")  # the profiler would set this for all later tests


def _nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a program named nvidia-smi first in PATH."""
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


# Prints the name of each field as its value, so that values cannot be mixed up; of one field, only the old name works.
_OLD_DRIVER = """
[ "$1" = "--id=GPU-12-34" ] || { echo "No devices were found"; exit 6; }
case "$2" in
  *clocks_event_reasons*) echo "Field \\"clocks_event_reasons.active\\" is not a valid field to query."; exit 2;;
  --query-compute-apps*) printf "100\\n101\\n";;
  *) echo "${2#--query-gpu=}" | sed "s/,/, /g";;
esac
"""


@pytest.mark.usefixtures("_a_card")
def test_the_driver_is_queried_for_the_right_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _nvidia_smi(tmp_path, monkeypatch, _OLD_DRIVER)
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    facts = environment.describe_environment(CARD)
    assert (facts["device_name"], facts["compute_capability"]) == ("NVIDIA Test", "9.0")
    for field in (
        "power.limit",
        "clocks.sm",
        "clocks.max.mem",
        "ecc.mode.current",
        "mig.mode.current",
        "driver_version",
    ):
        assert facts[field] == field
    assert facts["throttle_reasons"] == "clocks_throttle_reasons.active"
    assert facts["processes_on_card"] == 2
    assert facts["CUDA_LAUNCH_BLOCKING"] == "1"
    before = dict(facts)
    environment.note_end(facts, CARD)
    added = {name: facts[name] for name in facts.keys() - before.keys()}
    assert added["clocks.sm_at_end"] == "clocks.sm"
    assert added["allocation_retries_at_end"] == 3
    assert "power.limit_at_end" not in added
    assert before.items() <= facts.items()


@pytest.mark.usefixtures("_a_card")
@pytest.mark.parametrize(
    ("script", "answer"),
    [("echo Insufficient Permissions; exit 4", "failed: Insufficient Permissions"), (None, "not found")],
)
def test_a_failing_driver_query_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, answer: str
) -> None:
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        _nvidia_smi(tmp_path, monkeypatch, script)
    assert cuda.describe_card(CARD)["nvidia-smi"] == answer


def test_a_cpu_has_no_gpu_facts() -> None:
    facts = environment.describe_environment(torch.device("cpu"))
    before = dict(facts)
    environment.note_end(facts, torch.device("cpu"))
    assert facts == before
    assert "device_name" not in facts


@pytest.fixture
def _float32_as_it_was() -> Iterator[None]:
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = (convolutions.fp32_precision, products.fp32_precision)
    yield
    convolutions.fp32_precision, products.fp32_precision = before


@pytest.mark.usefixtures("_float32_as_it_was")
def test_the_meaning_of_float32_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.describe_precision("bf16", CARD) == "bf16 autocast"
    assert environment.describe_precision("off", torch.device("cpu")) == "float32"
    # torch's defaults; then set with the new names, after which the old ones raise.
    assert environment.describe_precision("off", CARD) == "float32: TF32 convolutions, IEEE matrix products"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert environment.describe_precision("off", CARD) == "float32: IEEE convolutions, TF32 matrix products"
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert environment.describe_precision("off", CARD) == "float32: IEEE convolutions, IEEE matrix products"


def _event(kind: DeviceType, count: int, microseconds: float, *, annotation: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        device_type=kind, count=count, self_device_time_total=microseconds, is_user_annotation=annotation
    )


class _Profiler:
    """A stand-in for the profiler: a call has two kernels of given microseconds, and other events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[SimpleNamespace] = []
        monkeypatch.setattr(cuda, "profile", self.watch)

    @contextmanager
    def watch(self, activities: object, acc_events: bool) -> Iterator[SimpleNamespace]:
        self.events = []
        yield SimpleNamespace(key_averages=lambda: self.events)

    def launch(self, microseconds: float) -> None:
        self.events += [_event(DeviceType.CUDA, 1, microseconds), _event(DeviceType.CUDA, 1, microseconds)]
        self.events += [_event(DeviceType.CPU, 2, 0.0), _event(DeviceType.CUDA, 1, 99.0, annotation=True)]


@pytest.mark.usefixtures("_a_card")
def test_kernels_are_summed_and_the_median_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    profiler = _Profiler(monkeypatch)
    elapsed = iter([50.0, 10.0, 12.0])

    def make_call() -> Callable[[], object]:
        profiler.launch(1000.0)  # before the call: not counted
        return lambda: profiler.launch(next(elapsed))

    assert cuda.device_work(make_call, CARD) == cuda.DeviceWork(kernels=2, milliseconds=0.024)


@pytest.mark.usefixtures("_a_card")
def test_a_profiler_without_kernels_gives_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    _Profiler(monkeypatch)  # as if the driver's counters were restricted to the administrator
    assert cuda.device_work(lambda: lambda: None, CARD) is None
    assert cuda.device_work(lambda: lambda: None, torch.device("cpu")) is None


@pytest.mark.cuda
def test_the_time_of_kernels_on_a_gpu() -> None:
    large = torch.randn(2048, 2048, device=CARD)
    work = cuda.device_work(lambda: lambda: large @ large, CARD)
    assert work is not None
    assert work.kernels == 1
    assert 0 < work.milliseconds < 100
    facts = cuda.describe_card(CARD)
    assert "nvidia-smi" not in facts
    assert facts["name"] == torch.cuda.get_device_name()
