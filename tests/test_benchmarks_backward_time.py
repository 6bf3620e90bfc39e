"""`backward_time.py` end to end on small networks: rows, files, refusals, interruptions."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

# The benchmarks are scripts, which find each other through the folder that they stand in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import backward_time
import measure
import networks
import plots
import results
import variants

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _global_settings() -> Iterator[None]:
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(1)  # threads that wait for a busy machine would make small networks slow
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = benchmark


def _network(name: str, batch_size: int = 2) -> networks.Network:
    size = None if name in networks.ARTICLE_NETWORKS else 32
    return networks.build_network(name, batch_size=batch_size, image_size=size, device=CPU)


def _variant(network: networks.Network, kind: str) -> variants.Variant:
    return next(variant for variant in variants.variants_of(network) if variant.kind == kind)


def _run(output: Path, *arguments: str) -> int:
    small = ["--device", "cpu", "--batch-size", "2", "--repeats", "3", "--threads", "1"]
    return backward_time.main([*small, "--output", str(output), *arguments])


def test_a_small_run_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tmp_path, "--models", "ConvModel", "test_vit", "--image-size", "32") == 0
    content = json.loads((tmp_path / "backward_time.json").read_text())
    assert content["environment"]["threads"] == 1
    assert content["environment"]["torch"] == torch.__version__.partition("+")[0]
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
        assert row["peak_bytes"] is None  # torch counts no bytes on a CPU
    assert [row["image_size"] for row in content["rows"]] == [64] * 5 + [32] * (len(content["rows"]) - 5)
    for model in ("ConvModel", "test_vit"):
        by_variant = {row["variant"]: row for row in content["rows"] if row["model"] == model}
        assert by_variant["frozen"]["saved_bytes"] == by_variant["limit"]["saved_bytes"]
        assert by_variant["frozen"]["saved_bytes"] < by_variant["unfrozen"]["saved_bytes"]
        assert by_variant["frozen"]["trainable_parameters"] == by_variant["limit"]["trainable_parameters"]
        assert [row["variant"] for row in content["noise"] if row["model"] == model] == ["unfrozen", "frozen"]
    flops = [row["backward_flops"] for row in content["rows"] if row["model"] == "test_vit"]
    assert flops == sorted(flops, reverse=True)
    with Image.open(tmp_path / "backward_time.png") as picture:
        assert picture.convert("L").getextrema() == (0, 255)
        assert min(picture.size) > 300
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


def test_a_report_comes_back_from_its_file(tmp_path: Path) -> None:
    report = _report()
    results.write_report(report, tmp_path / "again")
    assert asdict(results.read_report(tmp_path / "again.json")) == asdict(report)


def _report() -> results.Report:
    samples = {"optimizer_ms": [1.0, 1.5], "step_ms": [40.0, 44.0]}
    unfrozen = results.Row("net", "unfrozen", 2, 8, 32, 900, 2**20, None, 100, [9.0, 9.5], [20.0, 22.0], **samples)
    rows = [unfrozen, replace(unfrozen, variant="partial", trainable_groups=1, backward_ms=[9.0, 9.9])]
    rows.append(replace(unfrozen, variant="frozen", trainable_groups=0, backward_ms=[0.002, 0.002]))
    rows.append(replace(unfrozen, variant="limit", trainable_groups=None, backward_ms=[0.001, 0.001]))
    report = results.start_report(CPU, "python benchmarks/backward_time.py", {"amp": "off"})
    report.rows, report.noise = rows, [replace(unfrozen, backward_ms=[22.0, 20.0])]
    return report


def test_ratios_are_taken_pass_by_pass() -> None:
    report = _report()
    frozen, limit = report.row("net", "frozen"), report.row("net", "limit")
    assert frozen is not None
    assert limit is not None
    assert results.ratio_of(frozen, limit, "backward_ms").median == 2.0
    page = results.as_markdown(report)
    # Unfrozen over frozen: 20 and 22 ms over 0.002 ms.
    assert "10,500 [10,000, 11,000]" in page
    assert "| top 1 groups train |" in page


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        results.write_file(path, fail)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("result.txt", "old")]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    with path.open() as reader:
        results.write_text(path, "new")
        assert reader.read() == "old"  # moved into place beside the old file, not written into it
    assert path.read_text() == "new"


def test_a_scale_is_logarithmic_where_bars_are_far_apart() -> None:
    figure = Figure()
    near, far = figure.subplots(1, 2)
    plots.draw_bars(far, _report(), "net", "backward_ms", "backward")
    plots.draw_bars(near, _report(), "net", "step_ms", "step")
    assert (far.get_yscale(), near.get_yscale()) == ("log", "linear")


@pytest.mark.parametrize("kind", ["unfrozen", "partial", "frozen", "limit"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_right_variants_are_proved(name: str, kind: str) -> None:
    network = _network(name)
    variants.prove_equal(_variant(network, kind), network)


def _other_logits(network: networks.Network, variant: variants.Variant) -> variants.Variant:
    return replace(variant, logits=lambda: variant.logits() * 1.05)


def _statistics_that_move(network: networks.Network, variant: variants.Variant) -> variants.Variant:
    def enter() -> None:
        variant.enter()
        # What a trainer's own train() does to a backbone that was frozen by requires_grad alone.
        for module in network.model.modules():
            module.training = True

    def logits() -> Tensor:
        # The features come from before the statistics move, so that the buffers alone tell.
        network.model.backbone.eval()
        answer = variant.logits()
        nn.Module.train(network.model.backbone, True)
        with torch.no_grad():
            network.model.backbone(network.images)
        return answer

    return replace(variant, enter=enter, logits=logits)


def _another_gradient(network: networks.Network, variant: variants.Variant) -> variants.Variant:
    def logits() -> Tensor:
        answer = variant.logits()
        if answer.requires_grad:
            answer.register_hook(lambda gradient: gradient * 2)  # type: ignore[no-untyped-call]
        return answer

    return replace(variant, logits=logits)


def _nothing_frozen(network: networks.Network, variant: variants.Variant) -> variants.Variant:
    def logits() -> Tensor:
        network.model.backbone.get_parameter("conv1.0.weight").requires_grad_(True)
        return variant.logits()

    return replace(variant, logits=logits)


def _no_graph(network: networks.Network, variant: variants.Variant) -> variants.Variant:
    return replace(variant, logits=lambda: variant.logits().detach())


def _not_a_number(network: networks.Network, variant: variants.Variant) -> variants.Variant:
    return replace(variant, logits=lambda: variant.logits() * float("nan"))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_other_logits, "logits: off by"),
        (_not_a_number, "logits: off by nan"),
        (_statistics_that_move, r"\d+ buffers of frozen layers moved: backbone.conv1.1.running_mean"),
        (_another_gradient, r"gradient of classifier.\w+: off by"),
        (_no_graph, "nothing trains: the logits have no graph"),
        (_nothing_frozen, "a gradient where none belongs, .*: backbone.conv1.0.weight"),
    ],
)
def test_a_wrong_variant_is_refused(
    spoil: Callable[[networks.Network, variants.Variant], variants.Variant], complaint: str
) -> None:
    network = _network("test_resnet")
    right = _variant(network, "frozen")
    with pytest.raises(variants.WrongVariantError, match=complaint):
        variants.prove_equal(spoil(network, right), network)
    variants.prove_equal(right, network)


def test_a_wrong_fast_row_is_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_a_fast_wrong_one(network: networks.Network, *, compiled: bool) -> list[variants.Variant]:
        right = variants.variants_of(network, compiled=compiled)
        return [replace(v, logits=right[-1].logits) if v.kind == "partial" else v for v in right]

    monkeypatch.setattr(backward_time, "variants_of", with_a_fast_wrong_one)
    assert _run(tmp_path, "--models", "ConvModel") == 1
    report = results.read_report(tmp_path / "backward_time.json")
    assert [row.variant for row in report.rows] == ["unfrozen", "frozen", "limit"]
    assert [entry["variant"] for entry in report.refused] == ["2 trainable groups", "1 trainable groups"]
    assert all("a gradient where none belongs" in str(entry["reason"]) for entry in report.refused)
    assert "Refused: ConvModel, 1 trainable groups: a gradient" in (tmp_path / "backward_time.md").read_text()


def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = 7 * 2 + 3  # two passes over the seven rows of ConvModel, its two A/A rows among them, and a part

    def visit(step: measure.TrainingStep, clock: measure.Clock, bar: object) -> measure.StepTimes:
        nonlocal times
        times -= 1
        if times < 0:
            raise KeyboardInterrupt
        return measure.StepTimes(1.0, 2.0, 3.0, 6.0)

    monkeypatch.setattr(backward_time, "visit", visit)
    assert _run(tmp_path, "--models", "ConvModel", "PretrainedResNet") == 130
    report = results.read_report(tmp_path / "backward_time.json")
    assert report.interrupted
    assert report.models() == ["ConvModel"]
    assert all(row.backward_ms == [2.0, 2.0] for row in report.rows)
    assert "Interrupted" in (tmp_path / "backward_time.md").read_text()
    assert f"interrupted: what was measured until then is in {tmp_path}" in capsys.readouterr().err


def test_ctrl_c_before_the_first_sample_keeps_earlier_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt_the_second(variant: variants.Variant, network: networks.Network, precision: str) -> None:
        if network.name == "PretrainedResNet":
            raise KeyboardInterrupt

    monkeypatch.setattr(backward_time, "prove_equal", interrupt_the_second)
    assert _run(tmp_path, "--models", "ConvModel", "PretrainedResNet") == 130
    assert results.read_report(tmp_path / "backward_time.json").models() == ["ConvModel"]


def test_out_of_memory_halves_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, *, batch_size: int, **arguments: Any) -> networks.Network:
        if batch_size > 1:
            raise torch.OutOfMemoryError
        return networks.build_network(name, batch_size=batch_size, **arguments)

    monkeypatch.setattr(backward_time, "build_network", build)
    assert _run(tmp_path, "--models", "ConvModel") == 0
    assert {row.batch_size for row in results.read_report(tmp_path / "backward_time.json").rows} == {1}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["--models", "resnet5000"],
            r"resnet5000: timm .* has no such architecture; .*, or ConvModel, or PretrainedResNet\.",
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


@pytest.mark.parametrize("arguments", [["--amp", "bf16", "--channels-last"], ["--amp", "fp16"]])
def test_precision_and_memory_format(tmp_path: Path, arguments: list[str]) -> None:
    assert _run(tmp_path, "--models", "test_resnet", "--image-size", "32", "--repeats", "1", *arguments) == 0
    report = results.read_report(tmp_path / "backward_time.json")
    assert report.settings["amp"] == arguments[1]
    assert report.row("test_resnet", "frozen") is not None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_small_run_on_a_gpu(tmp_path: Path) -> None:
    assert _run(tmp_path, "--device", "cuda", "--flush-l2", "--models", "ConvModel", "test_vit") == 0
    report = results.read_report(tmp_path / "backward_time.json")
    assert report.environment["device_name"] == torch.cuda.get_device_name()
    assert all(row.peak_bytes for row in report.rows)
