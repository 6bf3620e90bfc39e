"""Fixtures of every test: a fixed seed, a separate current folder, one thread."""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Test processes that share the cores have one thread each; torch reads this when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Programs that tests run in other processes: they have no doctests, and some import the libraries of the extra clients.
collect_ignore = ["helpers"]


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a temporary folder, so that a user's files in the current folder are neither read nor changed."""
    monkeypatch.chdir(tmp_path)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests that are marked ``cuda`` where there is no CUDA device."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Run a test on the CPU, and on a CUDA device if there is one: there convolutions are in float32, not in TF32."""
    if request.param == "cuda":
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # on torch 2.9, reading it warns
    yield torch.device(request.param)
    if request.param == "cuda":
        # accelerate has one device per process, which accelerators of other tests share.
        importlib.import_module("backbone_finetune.recipes").make_accelerator(torch.device("cpu"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run on one thread: small networks are slow on several threads of a busy machine."""
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = benchmark
