"""Bytes are counted exactly, and out-of-memory errors reduce the batch size."""

from __future__ import annotations

import pytest
import torch
from harness import cuda, memory
from torch import Tensor, nn


def test_saved_bytes_of_a_linear_head_are_exact() -> None:
    head, features, labels = nn.Linear(32, 10), torch.randn(8, 32), torch.zeros(8, dtype=torch.int64)

    def forward() -> Tensor:
        return nn.functional.cross_entropy(head(features), labels)

    # The features for the weight's gradient; for the loss the log-softmax (8, 10), the labels and its total weight ().
    assert memory.count_saved_bytes(forward, head.parameters()) == 8 * 32 * 4 + 8 * 10 * 4 + 8 * 8 + 4

    features.requires_grad_(True)  # now backward also needs the weight, which exists anyway
    assert memory.count_saved_bytes(forward, head.parameters()) == 8 * 32 * 4 + 8 * 10 * 4 + 8 * 8 + 4
    assert memory.count_saved_bytes(forward, []) == 8 * 32 * 4 + 8 * 10 * 4 + 8 * 8 + 4 + 10 * 32 * 4


def test_saved_bytes_count_each_storage_once_and_completely() -> None:
    tokens = torch.randn(2, 100, 16)
    head, other = nn.Linear(16, 4), nn.Linear(16, 4)

    def view() -> Tensor:
        return nn.functional.linear(tokens[:, 0], head.weight)

    def twice() -> Tensor:
        return view() + nn.functional.linear(tokens[:, 1], other.weight)

    parameters = [*head.parameters(), *other.parameters()]
    assert memory.count_saved_bytes(view, parameters) == tokens.numel() * 4
    assert memory.count_saved_bytes(twice, parameters) == tokens.numel() * 4
    assert memory.count_saved_bytes(lambda: head(tokens[:, 0].clone()), parameters) == 2 * 16 * 4


def test_out_of_memory_halves_the_batch_until_it_fits() -> None:
    said: list[str] = []

    def fit(batch_size: int) -> int:
        if batch_size > 3:
            raise torch.OutOfMemoryError
        return batch_size

    assert memory.at_largest_batch(fit, 13, said.append) == 3
    assert said == ["out of memory: going on with batch size 6", "out of memory: going on with batch size 3"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_all_forms_of_out_of_memory_errors(error: RuntimeError) -> None:
    tried: list[int] = []

    def fit(batch_size: int) -> int:
        tried.append(batch_size)
        if batch_size > 2:
            raise error
        return batch_size

    assert memory.at_largest_batch(fit, 4, lambda text: None) == 2
    assert tried == [4, 2]


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        ValueError("out of memory"),
    ],
)
def test_other_errors_do_not_reduce_the_batch(error: Exception) -> None:
    tried: list[int] = []

    def fail(batch_size: int) -> None:
        tried.append(batch_size)
        raise error

    with pytest.raises(type(error), match=str(error)):
        memory.at_largest_batch(fail, 4, lambda text: None)
    assert tried == [4]


def test_a_single_image_that_does_not_fit_raises() -> None:
    def never_fit(batch_size: int) -> None:
        raise torch.OutOfMemoryError(f"batch of {batch_size}")

    with pytest.raises(torch.OutOfMemoryError, match="batch of 1"):
        memory.at_largest_batch(never_fit, 2, lambda text: None)


class _CountedBytes:
    """A stand-in for `torch.cuda`: bytes allocated and reserved now, and their peaks since the last reset."""

    def __init__(self) -> None:
        self.allocated = self.reserved = self.most_allocated = self.most_reserved = 0

    def use(self, count: int) -> None:
        self.allocated += count
        self.reserved = max(self.reserved, self.allocated)
        self.most_allocated = max(self.most_allocated, self.allocated)
        self.most_reserved = max(self.most_reserved, self.reserved)

    def synchronize(self, device: torch.device) -> None: ...

    def empty_cache(self) -> None:
        self.reserved = self.allocated

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.most_allocated, self.most_reserved = self.allocated, self.reserved

    def memory_allocated(self, device: torch.device) -> int:
        return self.allocated

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.most_allocated

    def max_memory_reserved(self, device: torch.device) -> int:
        return self.most_reserved


class _Leftover:
    """Garbage that only the cyclic collector finds, with 30 bytes on the device."""

    def __init__(self, device: _CountedBytes) -> None:
        self.device, self.own = device, self
        device.use(30)

    def __del__(self) -> None:
        self.device.use(-30)


def test_a_peak_is_that_of_the_call_only(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _CountedBytes()
    for name in vars(_CountedBytes):
        if hasattr(torch.cuda, name) and not name.startswith("_"):
            monkeypatch.setattr(torch.cuda, name, getattr(device, name))
    device.use(900)  # allocated before, and freed
    device.use(-800)
    _Leftover(device)

    def call() -> None:
        device.use(50)
        device.use(-50)

    assert memory.peak_memory(call, torch.device("cuda")) == cuda.PeakMemory(before=100, allocated=150, reserved=150)


def test_a_cpu_has_no_peak() -> None:
    assert memory.peak_memory(lambda: None, torch.device("cpu")) is None


@pytest.mark.cuda
def test_the_peak_on_a_gpu() -> None:
    large = torch.randn(4096, 4096, device="cuda")
    peak = memory.peak_memory(lambda: large @ large, large.device)
    assert peak is not None
    assert peak.before >= large.nbytes
    assert peak.allocated >= peak.before + large.nbytes
    assert peak.reserved >= peak.allocated
