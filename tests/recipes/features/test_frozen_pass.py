"""The pass of a frozen backbone: smaller batches when memory runs out, compiled if the output is correct."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import extract_features
from backbone_finetune.recipes.features.compiled import COMPILERS, compile_checked, compile_openvino

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


def extract(backbone: nn.Module, compiler: Any = None) -> tuple[Tensor, ...]:
    model = FineTuneModel(backbone, nn.Linear(4, 2))
    loader = DataLoader(DATA, batch_size=5)
    return extract_features(model, loader, device=CPU, compile=compiler, autocast=False).tensors


def test_out_of_memory_halves_the_batch_and_logs_it(caplog: pytest.LogCaptureFixture) -> None:
    backbone = Small(most=2)
    found = extract(backbone)
    assert backbone.sizes == [2, 2, 1, 2, 2, 1, 2, 1]  # for batches of 5, 5 and 3
    assert [message for message in caplog.messages if "out of memory" in message] == [
        f"out of memory: the backbone runs on {size} images at a time from here on" for size in (3, 2)
    ]
    backbone.most = 100
    for one, other in zip(found, extract(backbone), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_too_little_memory_for_one_image_raises() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        extract(Small(most=0))


def test_a_compiled_backbone_runs_on_batches_of_one_size(caplog: pytest.LogCaptureFixture) -> None:
    sizes: list[int] = []

    def compiler(module: nn.Module) -> Any:
        def run(inputs: Tensor) -> Any:
            sizes.append(len(inputs))
            return module(inputs)

        return run

    backbone = Small(most=100)
    found = extract(backbone, compiler)
    assert sizes == [5, 5, 5]  # the check, then the batches; the backbone itself runs on the last one, of 3
    assert not caplog.messages
    for one, other in zip(found, extract(backbone), strict=True):
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
