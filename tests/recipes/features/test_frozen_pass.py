"""The pass of a frozen backbone: smaller batches when memory runs out, compiled if the output is correct."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import TrainerConfig, extract_features, make_accelerator
from backbone_finetune.recipes.features.compiled import COMPILERS, compile_checked, compile_openvino
from backbone_finetune.recipes.features.dataset import module_inputs
from backbone_finetune.recipes.features.frozen_pass import FrozenPass, autocast_dtype, front_of_backbone
from backbone_finetune.recipes.sending import send
from backbone_finetune.recipes.training.phase_data import prepare_data

CPU = torch.device("cpu")
DATA = TensorDataset(torch.randn(13, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(13))


class Small(nn.Module):
    """A backbone on a device with memory for ``most`` images."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).requires_grad_(False)
        self.most = most
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.sizes.append(len(images))
        features = self.conv(images)
        return features.mean((2, 3)), features.amax((2, 3))


def extract(backbone: nn.Module, compiler: Any = None, device: torch.device = CPU) -> tuple[Tensor, ...]:
    model = FineTuneModel(backbone, nn.Linear(4, 2)).to(device)
    loader = DataLoader(DATA, batch_size=5)
    return extract_features(model, loader, device=device, compile=compiler, autocast=False).tensors


def test_out_of_memory_halves_the_batch_and_logs_it(caplog: pytest.LogCaptureFixture, device: torch.device) -> None:
    backbone = Small(most=2)
    found = extract(backbone, device=device)
    assert backbone.sizes == [2, 2, 1, 2, 2, 1, 2, 1]  # for batches of 5, 5 and 3
    assert [message for message in caplog.messages if "out of memory" in message] == [
        f"out of memory: the backbone runs on {size} images at a time from here on" for size in (3, 2)
    ]
    backbone.most = 100
    for one, other in zip(found, extract(backbone.cpu()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_too_little_memory_for_one_image_raises() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        extract(Small(most=0))


def test_a_compiled_backbone_runs_on_batches_of_one_size(
    caplog: pytest.LogCaptureFixture, device: torch.device
) -> None:
    sizes: list[int] = []

    def compiler(module: nn.Module) -> Any:
        def run(inputs: Tensor) -> Any:
            sizes.append(len(inputs))
            return module(inputs)

        return run

    backbone = Small(most=100)
    found = extract(backbone, compiler, device)
    assert sizes == [5, 5, 5]  # the check, then the batches; the backbone itself runs on the last one, of 3
    assert not caplog.messages
    for one, other in zip(found, extract(backbone.cpu()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (
            lambda module, inputs: tuple(slot * 1.01 for slot in module(inputs)),
            r"AssertionError: Tensor-likes are not close! Mismatched elements",
        ),
        (lambda module, inputs: tuple(slot / 0 for slot in module(inputs)), r"Tensor-likes are not close"),
        (lambda module, inputs: module(inputs)[0], r"ValueError: zip\(\) argument 2 is longer"),
        (lambda module, inputs: 1 / 0, r"ZeroDivisionError: division by zero"),
    ],
)
def test_a_compiler_with_other_outputs_is_not_used(run: Any, expected: str, caplog: pytest.LogCaptureFixture) -> None:
    backbone = Small(most=100)
    found = extract(backbone, lambda module: lambda inputs: run(module, inputs))
    (message,) = caplog.messages
    assert message.startswith("features: not compiled, the backbone itself runs (")
    assert re.search(expected, message)
    assert all(map(torch.equal, found, extract(backbone)))


def test_missing_openvino_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"openvino is not installed; run: pip install 'backbone-finetune\[open"
    ):
        extract(Small(most=100), compile_openvino)


def test_openvino_gives_the_features() -> None:
    pytest.importorskip("openvino")
    backbone = Small(most=100)
    run = compile_checked(COMPILERS["openvino"], backbone, [DATA.tensors[0][:5]], tolerance=1e-3)
    assert run is not backbone
    for one, other in zip(run(DATA.tensors[0][:3]), backbone(DATA.tensors[0][:3]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Views(nn.Module):
    """A network that takes contiguous images alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.first(images)).view(len(images), -1)


@pytest.mark.parametrize("trainable_groups", [0, 1])
def test_a_network_that_takes_contiguous_images_alone_is_cached(trainable_groups: int, device: torch.device) -> None:
    model = FineTuneModel(Views(), nn.Linear(64, 2))
    data = TensorDataset(DATA.tensors[0], DATA.tensors[1] % 2)
    config = TrainerConfig(make_accelerator(device), batch_size=5, autocast_features=False, show_progress=False)
    model.freeze_backbone(trainable_groups=trainable_groups)
    prepared = prepare_data(model, data, None, config)
    assert prepared.why_uncached is None
    prepared.module.cpu().eval()
    logits = prepared.module(*module_inputs(prepared.train, prepared.train.tensors[:-1]))
    torch.testing.assert_close(logits, model.eval()(data.tensors[0]), rtol=1e-5, atol=1e-6)


def test_other_errors_of_a_network_in_channels_last_are_raised() -> None:
    class Faulty(Small):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        extract(Faulty(most=100))


class Copies(TorchDispatchMode):
    """Records copies from a CUDA device, and whether the host waits for them."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "_to_copy" and args[0].device.type == "cuda" != result.device.type:
            self.log.append("queued" if (kwargs or {}).get("non_blocking") else "waited")
        return result


def test_cuda_computes_the_next_batch_while_the_host_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have a device and a shape, without a GPU and without values."""
    log: list[str] = []

    class Event:
        def record(self, stream: str) -> None:
            log.append(f"event on {stream}")

        def synchronize(self) -> None:
            log.append("waited for")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", str)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode(), Copies(log):
        with torch.device("cuda", 1):
            backbone = Small(most=100)
        device = torch.device("cuda", 1)
        run = FrozenPass(front_of_backbone(FineTuneModel(backbone, nn.Linear(4, 2))), device, None)
        batches = [(torch.randn(5, 3, 8, 8), torch.zeros(5, dtype=torch.long).to(device)) for _ in range(3)]
        found = list(run.over(batches))
    queued = [*["queued"] * 3, "event on cuda:1"]  # two features and the targets
    assert log == [*queued, *queued, "waited for", *queued, "waited for", "waited for"]
    assert {tensor.device.type for features in found for tensor in features.tensors} == {"cpu"}


def test_a_copy_from_cuda_to_the_cpu_is_complete_when_it_is_sent() -> None:
    log: list[str] = []
    with FakeTensorMode(), Copies(log):
        send(torch.empty(2, device="cuda"), torch.device("cpu"))
    assert log == ["waited"]


def test_the_precision_of_a_pass_is_that_of_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = {torch.device("cuda", 0): SimpleNamespace(major=8), torch.device("cuda", 1): SimpleNamespace(major=7)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    assert [autocast_dtype(nn.Linear(2, 2), card) for card in cards] == [torch.bfloat16, None]
