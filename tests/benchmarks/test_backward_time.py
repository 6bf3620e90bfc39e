"""`backward_time.py` end to end on small networks: rows, files, refusals, interruptions."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backward_time
import pytest
import torch
from harness import results
from PIL import Image
from subjects import networks
from torch import nn

import backbone_finetune

pytestmark = pytest.mark.usefixtures("one_thread")


def _run(output: Path, *arguments: str, **keywords: Any) -> int:
    small = ["--device", "cpu", "--batch-size", "2", "--repeats", "3", "--threads", "1"]
    return backward_time.main([*small, "--output", str(output), *arguments], **keywords)


def test_a_small_run_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tmp_path, "--models", "ConvModel", "test_vit", "--image-size", "32") == 0
    content = json.loads((tmp_path / "backward_time.json").read_text())
    assert content["environment"]["threads"] == 1
    assert content["environment"]["torch"] == torch.__version__.partition("+")[0]
    assert content["environment"]["backbone-finetune"] == backbone_finetune.__version__
    assert content["command"].startswith("python benchmarks/backward_time.py --device cpu")
    rows = [row for row in content["rows"] if row["model"] == "ConvModel"]
    assert [(row["variant"], row["trainable_groups"]) for row in rows] == [
        ("unfrozen", 3),
        ("partial", 2),
        ("partial", 1),
        ("frozen", 0),
        ("limit", None),
    ]
    for row in content["rows"] + content["noise"]:
        for clock in ("forward_ms", "backward_ms", "optimizer_ms", "step_ms"):
            assert len(row[clock]) == 3
            assert all(sample > 0 for sample in row[clock])
        assert row["peak_bytes"] is None  # torch does not count bytes on a CPU
    assert [row["image_size"] for row in content["rows"]] == [64] * 5 + [32] * (len(content["rows"]) - 5)
    for model in ("ConvModel", "test_vit"):
        by_variant = {row["variant"]: row for row in content["rows"] if row["model"] == model}
        assert by_variant["frozen"]["saved_bytes"] == by_variant["limit"]["saved_bytes"]
        assert by_variant["frozen"]["saved_bytes"] < by_variant["unfrozen"]["saved_bytes"]
        assert by_variant["frozen"]["trainable_parameters"] == by_variant["limit"]["trainable_parameters"]
        assert [row["variant"] for row in content["noise"] if row["model"] == model] == ["unfrozen", "frozen"]
    flops = [row["backward_flops"] for row in content["rows"] if row["model"] == "test_vit"]
    assert flops == sorted(flops, reverse=True)
    with Image.open(tmp_path / "backward_time.png") as image:
        assert image.convert("L").getextrema() == (0, 255)
        assert min(image.size) > 300
    table = (tmp_path / "backward_time.md").read_text()
    assert table.count("| A/A frozen") == 2
    assert content["command"] in table
    assert len((tmp_path / "backward_time.csv").read_text().splitlines()) == 1 + len(content["rows"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "backward_time.csv",
        "backward_time.json",
        "backward_time.md",
        "backward_time.png",
    ]
    assert "| unfrozen" in capsys.readouterr().out


def test_a_variant_with_wrong_gradients_has_no_row(tmp_path: Path) -> None:
    def build(name: str, **arguments: Any) -> networks.Network:
        network = networks.build_network(name, **arguments)
        network.model.backbone.register_forward_hook(detach_if_partly_frozen)
        return network

    def detach_if_partly_frozen(backbone: nn.Module, inputs: object, features: torch.Tensor) -> torch.Tensor:
        trains = [parameter.requires_grad for parameter in backbone.parameters()]
        return features.detach() if any(trains) and not all(trains) else features

    assert _run(tmp_path, "--models", "ConvModel", build=build) == 1
    report = results.read_report(tmp_path / "backward_time.json")
    assert [row.variant for row in report.rows] == ["unfrozen", "frozen", "limit"]
    assert [entry["variant"] for entry in report.refused] == ["2 trainable groups", "1 trainable groups"]
    assert all("a gradient where none belongs" in str(entry["reason"]) for entry in report.refused)
    assert (
        "Refused: ConvModel, 1 trainable groups: WrongVariantError: a gradient"
        in (tmp_path / "backward_time.md").read_text()
    )


class _Interrupted:
    """A clock that shows 10 ms for each call, which makes a warm-up of 3 calls, and is interrupted after some."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def time(self, call: Callable[[], Any]) -> tuple[Any, float]:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return call(), 10.0


def test_an_interrupt_keeps_complete_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # ConvModel has seven rows, with its two A/A rows; each of them is warmed up, and each visit has four clocks.
    clock = _Interrupted(7 * 3 + 4 * (7 * 2 + 3))
    assert _run(tmp_path, "--models", "ConvModel", "PretrainedResNet", clock=clock) == 130
    report = results.read_report(tmp_path / "backward_time.json")
    assert report.interrupted
    assert report.models() == ["ConvModel"]
    assert all(row.backward_ms == [10.0, 10.0] for row in report.rows)
    assert "Interrupted" in (tmp_path / "backward_time.md").read_text()
    assert f"interrupted: what was measured until then is in {tmp_path}" in capsys.readouterr().err


def test_an_interrupt_before_the_first_sample_keeps_earlier_models(tmp_path: Path) -> None:
    def build(name: str, **arguments: Any) -> networks.Network:
        if name == "PretrainedResNet":
            raise KeyboardInterrupt
        return networks.build_network(name, **arguments)

    assert _run(tmp_path, "--models", "ConvModel", "PretrainedResNet", build=build) == 130
    assert results.read_report(tmp_path / "backward_time.json").models() == ["ConvModel"]


def _memory_for(largest: int) -> Callable[..., networks.Network]:
    """Return a builder for a device with memory for a batch of `largest` in ConvModel."""

    def build(name: str, *, batch_size: int, **arguments: Any) -> networks.Network:
        if batch_size > largest and name == "ConvModel":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return networks.build_network(name, batch_size=batch_size, **arguments)

    return build


def test_out_of_memory_halves_the_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tmp_path, "--models", "ConvModel", build=_memory_for(1)) == 0
    assert {row.batch_size for row in results.read_report(tmp_path / "backward_time.json").rows} == {1}
    assert "ConvModel: out of memory: going on with batch size 1" in capsys.readouterr().out


def test_out_of_memory_in_a_variant_halves_the_batch_for_all(tmp_path: Path) -> None:
    def build(name: str, **arguments: Any) -> networks.Network:
        network = networks.build_network(name, **arguments)
        network.model.backbone.register_forward_pre_hook(check_memory)
        return network

    def check_memory(backbone: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if len(inputs[0]) > 1 and all(parameter.requires_grad for parameter in backbone.parameters()):
            raise torch.OutOfMemoryError

    assert _run(tmp_path, "--models", "ConvModel", build=build) == 0
    report = results.read_report(tmp_path / "backward_time.json")
    assert [row.batch_size for row in report.rows] == [1] * 5


def test_a_model_that_does_not_fit_is_refused_and_the_next_is_measured(tmp_path: Path) -> None:
    assert _run(tmp_path, "--models", "ConvModel", "test_vit", "--image-size", "32", build=_memory_for(0)) == 1
    report = results.read_report(tmp_path / "backward_time.json")
    assert report.models() == ["test_vit"]
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. (batch size 1)"
    assert report.refused == [{"model": "ConvModel", "variant": "all", "reason": reason}]


def test_a_model_that_cannot_be_built_is_refused_and_the_next_is_measured(tmp_path: Path) -> None:
    def build(name: str, **arguments: Any) -> networks.Network:
        if name == "test_vit":
            raise ValueError("test_vit: it has no classifier.\nThe second line is for a terminal.")
        return networks.build_network(name, **arguments)

    assert _run(tmp_path, "--models", "test_vit", "ConvModel", build=build) == 1
    report = results.read_report(tmp_path / "backward_time.json")
    assert report.models() == ["ConvModel"]
    reason = "ValueError: test_vit: it has no classifier. (batch size 2)"
    assert report.refused == [{"model": "test_vit", "variant": "all", "reason": reason}]
    assert f"Refused: test_vit, all: {reason}" in (tmp_path / "backward_time.md").read_text()


def test_a_run_without_measurements_writes_the_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tmp_path, "--models", "test_vit", "--image-size", "30") == 1
    report = results.read_report(tmp_path / "backward_time.json")
    assert not report.rows
    assert {entry["model"] for entry in report.refused} == {"test_vit"}
    assert "backward_time.png" not in [path.name for path in tmp_path.iterdir()]
    assert ".md\n" in capsys.readouterr().out


def test_a_variant_that_cannot_run_does_not_affect_others(tmp_path: Path) -> None:
    small = ["--models", "test_resnet", "--image-size", "32", "--batch-size", "1"]
    assert _run(tmp_path, *small) == 1
    report = results.read_report(tmp_path / "backward_time.json")
    assert [row.variant for row in report.rows][-2:] == ["frozen", "limit"]
    assert report.refused[0]["variant"] == "unfrozen"
    assert "Expected more than 1 value per channel when training" in str(report.refused[0]["reason"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["--models", "resnet5000"],
            r"resnet5000: timm .* has no such architecture; .*, or ConvModel, .*, or PretrainedResNetVariation\.",
        ),
        (["--device", "cuda"], "--device cuda: torch .* sees no CUDA device here"),
        (["--flush-l2"], "flush_l2: only a CUDA device has the cache"),
        (["--repeats", "0"], "--repeats: 0: pass 1 or more"),
    ],
)
def test_bad_input_is_a_clear_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        _run(tmp_path / "out", *arguments)
    error = capsys.readouterr().err
    assert re.search(complaint, error), error
    assert not (tmp_path / "out").exists()


def test_the_command_runs_as_a_script(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "backward_time.py"
    small = ["--device", "cpu", "--threads", "1", "--models", "test_vit", "--image-size", "32", "--batch-size", "2"]
    answer = subprocess.run(
        [sys.executable, str(script), *small, "--repeats", "2", "--output", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert "written to out: backward_time.json, .csv, .md, .png" in answer.stdout
    report = results.read_report(tmp_path / "out" / "backward_time.json")
    assert [row.variant for row in report.rows][-2:] == ["frozen", "limit"]
    assert all(len(row.step_ms) == 2 for row in report.rows)
    assert report.command.startswith("python benchmarks/backward_time.py --device cpu")
    assert "| A/A frozen" in (tmp_path / "out" / "backward_time.md").read_text()
    assert len((tmp_path / "out" / "backward_time.csv").read_text().splitlines()) == 1 + len(report.rows)
    with Image.open(tmp_path / "out" / "backward_time.png") as image:
        assert image.convert("L").getextrema() == (0, 255)


@pytest.mark.cuda
def test_a_small_run_on_a_gpu(tmp_path: Path) -> None:
    assert _run(tmp_path, "--device", "cuda", "--flush-l2", "--models", "ConvModel", "test_vit") == 0
    report = results.read_report(tmp_path / "backward_time.json")
    assert report.environment["device_name"] == torch.cuda.get_device_name()
    assert all(row.peak_bytes and row.peak_reserved_bytes for row in report.rows)
    assert all(len(row.loop_ms) == 3 and row.backward_kernels for row in report.rows)
    frozen, limit = report.row("ConvModel", "frozen"), report.row("ConvModel", "limit")
    assert frozen is not None
    assert limit is not None
    assert frozen.backward_kernels == limit.backward_kernels
    assert frozen.launch_bound == ["backward", "step"]
    assert report.environment["processes_on_card_at_end"]
