"""`peers.py` and `targets.py`: no row is dropped, what moved is named, and a verdict says what its ratio says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

# The benchmarks are scripts, which find each other through the folder that they stand in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import backward_time
import measure
import peer_methods
import peers
import target_report
import targets


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _blueprint() -> peer_methods.Blueprint:
    return peer_methods.make_blueprint("test_resnet", 10, 32, {})


def _batch() -> peers.Batch:
    return peers.Batch(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))


def _method(freeze: Callable[[peer_methods.Blueprint, nn.Module], nn.Module]) -> peer_methods.Method:
    return next(method for method in peer_methods.METHODS if method.freeze is freeze)


def test_what_each_method_moves_is_named() -> None:
    methods = [
        _method(freeze)
        for freeze in (
            peer_methods.unfrozen,
            peer_methods.article_recipe,
            peer_methods.timm_freeze,
            peer_methods.ours,
        )
    ]
    rows: list[peers.PeerRow] = []
    peers.compare_methods(_blueprint(), _batch(), methods, 2, rows)
    unfrozen, recipe, timm_freeze, ours, limit = rows
    assert unfrozen.moved["parameters"]
    assert unfrozen.moved["buffers"]
    # The recipe freezes parameters alone: running statistics go on.
    assert not recipe.moved["parameters"]
    assert "conv1.1.running_mean" in recipe.moved["buffers"]
    # timm swaps BatchNorms for modules without the counter.
    assert timm_freeze.moved["gone"]
    assert all(name.endswith("num_batches_tracked") for name in timm_freeze.moved["gone"])
    assert ours.moved == {"parameters": [], "buffers": [], "gone": []}
    assert ours.trainable_parameters == recipe.trainable_parameters == limit.trainable_parameters == 96 * 10 + 10
    assert ours.saved_bytes == limit.saved_bytes
    assert ours.saved_bytes is not None
    assert unfrozen.saved_bytes is not None
    assert ours.saved_bytes < unfrozen.saved_bytes
    assert all(len(row.step_ms) == len(row.backward_ms) == 2 for row in rows)
    table = peers.model_table(rows)
    assert "the same, bit for bit" in table
    assert f"{len(recipe.moved['buffers'])} buffers moved" in table


def _cannot(blueprint: peer_methods.Blueprint, network: nn.Module) -> nn.Module:
    raise ModuleNotFoundError("No module named 'rare'")


def test_a_method_that_cannot_do_a_case_keeps_its_row() -> None:
    rows: list[peers.PeerRow] = []
    methods = [peer_methods.Method("rare", _cannot, "no-such-package"), _method(peer_methods.ours)]
    peers.compare_methods(_blueprint(), _batch(), methods, 1, rows)
    assert [(row.method, row.error) for row in rows[:2]] == [
        ("rare", "ModuleNotFoundError: No module named 'rare'"),
        ("ours", None),
    ]
    assert not rows[0].step_ms
    first_line = peers.model_table(rows).splitlines()[2]
    assert "not installed" in first_line
    assert "No module named 'rare'" in first_line


def test_the_command_writes_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--device", "cpu", "--threads", "1", "--batch-size", "2", "--image-size", "32", "--repeats", "1"]
    assert peers.main([*small, "--models", "test_resnet", "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "peers.json").read_text())
    assert [row["method"] for row in content["rows"]] == [method.label for method in peer_methods.METHODS] + [
        peers.LIMIT
    ]
    assert all(row["error"] or row["step_ms"] for row in content["rows"])
    assert content["command"] in (tmp_path / "peers.md").read_text()
    assert "| ours" in capsys.readouterr().out


def test_a_network_whose_classifier_is_no_single_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"levit_128s: its classifier is \(.*freeze all but a single layer"):
        peer_methods.make_blueprint("levit_128s", 10, 224, {})


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (measure.Interval(0.9, 0.8, 1.2), "met"),
        (measure.Interval(1.1, 0.9, 1.2), "within the noise"),
        (measure.Interval(1.2, 1.1, 1.3), "missed"),
        (None, "not measured"),
    ],
)
def test_a_verdict_says_what_its_ratio_says(ratio: measure.Interval | None, verdict: str) -> None:
    assert target_report.Target("net", "ours / theirs", 1.0, ratio).verdict == verdict


def _setup() -> backward_time.Setup:
    return backward_time.Setup(
        device=torch.device("cpu"),
        clock=measure.WallClock(),
        batch_size=2,
        image_size=32,
        precision="off",
        channels_last=False,
        compiled=False,
        repeats=2,
    )


def test_the_frozen_network_keeps_as_much_as_the_bare_head() -> None:
    backward, step, saved = targets.against_the_limit("test_vit", _setup())
    assert saved.ratio == measure.Interval(1.0, 1.0, 1.0)
    assert saved.verdict == "met"
    assert backward.ratio is not None
    assert step.noise is not None


def test_depths_are_compared_pair_by_pair() -> None:
    compared = list(targets.falls_with_depth("test_resnet", _setup()))
    assert [target.what for target in compared][-1] == "backward, top 0 groups train / top 1"
    assert len(compared) == 5
    assert all(target.at_most >= 1 and "FLOPs predict 0." in target.remark for target in compared)


def test_a_method_that_is_not_there_is_said_not_to_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = [
        peer_methods.Method("rare", _cannot, "no-such-package"),
        _method(peer_methods.article_recipe),
        _method(peer_methods.ours),
    ]
    monkeypatch.setattr(targets, "METHODS", methods)
    recipe, rare = targets.against_methods("test_resnet", {"the article's recipe": 1e3, "rare": 1.0}, _setup())
    assert recipe.verdict == "met"
    assert (rare.verdict, rare.remark) == ("not measured", "ModuleNotFoundError: No module named 'rare'")


@pytest.mark.parametrize("instructions", [True, False])
def test_half_precision_is_measured_where_there_are_instructions(
    monkeypatch: pytest.MonkeyPatch, instructions: bool
) -> None:
    monkeypatch.setattr(targets, "has_bf16_instructions", lambda device: instructions)
    target = targets.half_precision("test_resnet", _setup())
    assert (target.ratio is not None) == instructions
    assert instructions == ("no bf16 instructions" not in target.remark)


def test_the_report_shows_each_verdict() -> None:
    report = target_report.TargetReport({"torch": "2"}, "python benchmarks/targets.py", {})
    met = target_report.Target("net", "ours / theirs", 0.6, measure.Interval(0.5, 0.4, 0.6))
    report.targets = [met, replace(met, at_most=0.3)]
    page = target_report.as_markdown(report)
    assert "0.500 [0.400, 0.600]" in page
    assert [line.count("missed") for line in page.splitlines() if line.startswith("| net")] == [0, 1]
