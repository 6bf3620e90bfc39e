"""`wrapper_overhead.py`: its comparisons are paired, its growth exponents right."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# The benchmarks are scripts, which find each other through the folder that they stand in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import wrapper_overhead


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(wrapper_overhead, "LADDERS", {"ViT": ("test_vit", "test_vit2")})
    small = ["--device", "cpu", "--threads", "1", "--batch-size", "2", "--image-size", "32", "--repeats", "3"]
    small += ["--models", "test_resnet", "--output", str(tmp_path)]
    assert wrapper_overhead.main([*small, "--ladder", "ViT"]) == 0
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
    assert all(time["milliseconds"] > 0 for time in content["calls"])
    page = (tmp_path / "wrapper_overhead.md").read_text()
    assert "growth exponent" in page
    assert page in capsys.readouterr().out


@pytest.mark.parametrize("exponent", [1, 2])
def test_growth_is_the_exponent(exponent: int) -> None:
    times = [wrapper_overhead.CallTime("ViT", f"vit{n}", "train()", n, n, 0.01 * n**exponent) for n in (100, 200, 400)]
    assert wrapper_overhead.growth(times) == pytest.approx(exponent)
    report = wrapper_overhead.OverheadReport({}, "python", {}, calls=times)
    assert ("(not linear)" in wrapper_overhead.as_markdown(report)) == (exponent > 1)


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(family: str, name: str) -> list[wrapper_overhead.CallTime]:
        raise KeyboardInterrupt

    monkeypatch.setattr(wrapper_overhead, "time_calls", interrupt)
    small = ["--device", "cpu", "--threads", "1", "--batch-size", "2", "--image-size", "32", "--repeats", "1"]
    assert wrapper_overhead.main([*small, "--models", "test_resnet", "--output", str(tmp_path)]) == 130
    content = json.loads((tmp_path / "wrapper_overhead.json").read_text())
    assert len(content["comparisons"]) == 2


def test_an_unknown_architecture_is_a_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        wrapper_overhead.main(["--models", "resnet5000"])
    assert "--models resnet5000: timm" in capsys.readouterr().err
