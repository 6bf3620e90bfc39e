"""`wrapper_overhead.py`: paired comparisons and growth exponents."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import wrapper_overhead
from harness import call_growth
from harness.timing import WallClock
from torch import nn

from backbone_finetune import FineTuneModel

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ladders = {"ViT": ("test_vit", "test_vit2")}
    small = ["--device", "cpu", "--threads", "1", "--batch-size", "2", "--image-size", "32", "--repeats", "3"]
    small += ["--models", "test_resnet", "--output", str(tmp_path)]
    assert wrapper_overhead.main([*small, "--ladder", "ViT"], ladders=ladders) == 0
    content = json.loads((tmp_path / "wrapper_overhead.json").read_text())
    assert [comparison["what"] for comparison in content["comparisons"]] == ["forward", "construction"]
    for comparison in content["comparisons"]:
        assert all(len(comparison[name]) == 3 for name in ("wrapped_ms", "bare_ms", "again_ms"))
    assert {time["call"] for time in content["calls"]} == {
        "freeze_backbone()",
        "unfreeze_backbone()",
        "param_groups(lr)",
        "param_groups(lr, layer_decay)",
        "train()",
    }
    assert {time["model"] for time in content["calls"]} == {"test_vit", "test_vit2"}
    assert all(time["function_calls"] > time["parameter_tensors"] for time in content["calls"])
    assert all(len(time["milliseconds"]) == 3 and min(time["milliseconds"]) > 0 for time in content["calls"])
    page = (tmp_path / "wrapper_overhead.md").read_text()
    assert "growth of functions called" in page
    assert page in capsys.readouterr().out


@pytest.mark.parametrize("exponent", [1, 2])
def test_growth_is_the_exponent(exponent: int) -> None:
    times = [
        call_growth.CallTime("ViT", f"vit{size}", "train()", size, size, size**exponent, [0.01 * size**3] * 10)
        for size in (100, 200, 400)
    ]
    assert call_growth.growth(times).median == pytest.approx(3)
    assert call_growth.growth_of_function_calls(times) == pytest.approx(exponent)
    report = wrapper_overhead.OverheadReport({}, "python", {}, calls=times)
    assert ("(not linear)" in wrapper_overhead.as_markdown(report)) == (exponent > 1)


def test_the_wrappers_work_is_linear_in_the_number_of_tensors() -> None:
    with torch.device("meta"):
        shallow, deep = (FineTuneModel.from_timm("test_vit", num_classes=3, depth=depth) for depth in (12, 96))
    tensors = [len(list(model.parameters())) for model in (shallow, deep)]
    for label, call in call_growth.calls_of(shallow).items():
        calls = [
            call_growth.count_function_calls(shallow, call),
            call_growth.count_function_calls(deep, call_growth.calls_of(deep)[label]),
        ]
        assert calls[1] / calls[0] <= 1.02 * tensors[1] / tensors[0], label


class _Shifted(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(images)
        return logits + 1


def test_a_wrapper_with_other_outputs_raises() -> None:
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        wrapper_overhead.compare_forward(
            "test_resnet", batch_size=2, image_size=32, device=torch.device("cpu"), repeats=1, wrap=_Shifted
        )


def test_each_call_is_timed_under_its_own_name() -> None:
    called: list[str] = []

    def call(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            called.append(name)
            time.sleep(seconds)

        return run

    compared = wrapper_overhead.compare("net", "forward", call("wrapped", 0.03), call("bare", 0.001), WallClock(), 3)
    assert min(compared.wrapped_ms) >= 30
    assert max(min(compared.bare_ms), min(compared.again_ms)) < 30
    assert called[-9:] == ["wrapped", "bare", "bare", "bare", "bare", "wrapped", "wrapped", "bare", "bare"]


class _Interrupted(tuple[str, ...]):
    """Names of networks that are interrupted when they are read."""

    def __iter__(self) -> Iterator[str]:
        raise KeyboardInterrupt


def test_an_interrupt_keeps_earlier_measurements(tmp_path: Path) -> None:
    small = ["--device", "cpu", "--threads", "1", "--batch-size", "2", "--image-size", "32", "--repeats", "1"]
    arguments = [*small, "--models", "test_resnet", "--output", str(tmp_path)]
    assert wrapper_overhead.main(arguments, ladders={"ViT": _Interrupted()}) == 130
    content = json.loads((tmp_path / "wrapper_overhead.json").read_text())
    assert len(content["comparisons"]) == 2


def test_an_unknown_architecture_is_a_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        wrapper_overhead.main(["--models", "resnet5000"])
    assert "--models resnet5000: timm" in capsys.readouterr().err
