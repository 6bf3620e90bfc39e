"""`targets.py`: verdicts follow the ratios, and every target is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import backward_time
import pytest
import targets
import torch
from harness import ratios, results, timing
from subjects import equality, peer_methods
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


def _method(freeze: Callable[[peer_methods.Blueprint, nn.Module], nn.Module]) -> peer_methods.Method:
    return next(method for method in peer_methods.METHODS if method.freeze is freeze)


def _cannot(blueprint: peer_methods.Blueprint, network: nn.Module) -> nn.Module:
    raise ModuleNotFoundError("No module named 'rare'")


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (timing.Interval(0.9, 0.8, 1.2), "met"),
        (timing.Interval(1.1, 0.9, 1.2), "within the noise"),
        (timing.Interval(1.2, 1.1, 1.3), "missed"),
        (None, "not measured"),
    ],
)
def test_a_verdict_follows_its_ratio(ratio: timing.Interval | None, verdict: str) -> None:
    assert ratios.Target("net", "ours / theirs", 1.0, ratio).verdict == verdict


def _setup() -> backward_time.Setup:
    return backward_time.Setup(
        device=torch.device("cpu"),
        clock=timing.WallClock(),
        batch_size=2,
        image_size=32,
        precision="off",
        channels_last=False,
        compiled=False,
        repeats=2,
    )


def test_the_frozen_network_saves_as_many_bytes_as_the_bare_head() -> None:
    backward, step, saved = targets.against_the_limit("test_vit", _setup())
    assert saved.ratio == timing.Interval(1.0, 1.0, 1.0)
    assert saved.verdict == "met"
    assert backward.ratio is not None
    assert step.noise is not None


def test_depths_are_compared_in_pairs() -> None:
    compared = list(targets.falls_with_depth("test_resnet", _setup()))
    assert [target.what for target in compared][-1] == "backward, top 0 groups train / top 1"
    assert len(compared) == 5
    assert all(target.at_most == 1 and "FLOPs predict 0." in target.remark for target in compared)


def test_a_method_that_is_not_installed_is_not_measured() -> None:
    methods = [
        peer_methods.Method("rare", _cannot, "no-such-package"),
        _method(peer_methods.article_recipe),
        _method(peer_methods.ours),
    ]
    limits = {"the article's recipe": 1e3, "rare": 1.0}
    recipe, rare = targets.against_methods("test_resnet", limits, _setup(), methods)
    assert recipe.verdict == "met"
    assert (rare.verdict, rare.remark) == ("not measured", "ModuleNotFoundError: No module named 'rare'")


@pytest.mark.parametrize("instructions", [True, False])
def test_half_precision_is_measured_with_bf16_instructions(monkeypatch: pytest.MonkeyPatch, instructions: bool) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: instructions)
    (target,) = targets.half_precision("test_resnet", _setup())
    assert (target.ratio is not None) == instructions
    assert instructions == ("no bf16 instructions" not in target.remark)


def test_the_report_shows_each_verdict() -> None:
    report = ratios.TargetReport({"torch": "2"}, "python benchmarks/targets.py", {})
    met = ratios.Target("net", "ours / theirs", 0.6, timing.Interval(0.5, 0.4, 0.6))
    report.targets = [met, replace(met, at_most=0.3)]
    page = ratios.as_markdown(report)
    assert "0.500 [0.400, 0.600]" in page
    assert [line.count("missed") for line in page.splitlines() if line.startswith("| net")] == [0, 1]


def _missed(model: str = "net") -> ratios.Target:
    return ratios.compared(model, "ours / theirs", 0.5, ratios.Paired([2.0] * 6, [1.0] * 6))


def test_a_ratio_keeps_its_samples() -> None:
    (wrapped,) = targets.wrapper_forward("test_vit", _setup())
    for ratio, samples in ((wrapped.ratio, wrapped.samples), (wrapped.noise, wrapped.noise_samples)):
        assert samples is not None
        assert len(samples.numerator) == 2
        assert ratio == timing.paired_ratio(samples.numerator, samples.denominator)


def test_a_deeper_freeze_that_costs_more_is_missed_despite_noise() -> None:
    def row(variant: str, groups: int, backward: list[float]) -> results.Row:
        return results.Row("net", variant, groups, 2, 32, 1, 1, None, None, backward_ms=backward)

    rows = [row("unfrozen", 1, [10.0] * 8), row("frozen", 0, [11.0] * 8)]
    again = [row("unfrozen", 1, [8.0, 12.0] * 4)]
    (target,) = targets.compare_depths("net", backward_time.Measured(rows, again, []))
    assert target.noise is not None
    assert target.noise.high > 1.1
    assert target.verdict == "missed"


def _run(folder: Path, *answers: Callable[[], Iterator[ratios.Target]]) -> int:
    questions = [targets.Question(f"net{place}", "a question", answer) for place, answer in enumerate(answers)]
    arguments = ["--device", "cpu", "--threads", "1", "--output", str(folder)]
    return targets.main(arguments, ask=lambda models, setup: questions)


def _saved(folder: Path) -> dict[str, list[dict[str, object]]]:
    content: dict[str, list[dict[str, object]]] = json.loads((folder / "targets.json").read_text())
    return content


@pytest.mark.parametrize(("at_most", "code"), [(0.5, 1), (3.0, 0)])
def test_a_missed_target_ends_the_command_with_1(tmp_path: Path, at_most: float, code: int) -> None:
    assert _run(tmp_path, lambda: iter([replace(_missed(), at_most=at_most)])) == code
    (saved,) = _saved(tmp_path)["targets"]
    assert saved["samples"] == {"numerator": [2.0] * 6, "denominator": [1.0] * 6}


def test_an_interrupt_keeps_earlier_targets(tmp_path: Path) -> None:
    def interrupted() -> Iterator[ratios.Target]:
        yield _missed("first")
        assert [target["model"] for target in _saved(tmp_path)["targets"]] == ["first"], "saved at once"
        yield _missed("second")
        raise KeyboardInterrupt

    assert _run(tmp_path, interrupted) == 130
    assert [target["model"] for target in _saved(tmp_path)["targets"]] == ["first", "second"]


def test_an_error_in_one_question_does_not_affect_others(tmp_path: Path) -> None:
    def wrong() -> Iterator[ratios.Target]:
        raise equality.WrongVariantError("logits: off by 1")

    right = [replace(_missed(), at_most=3.0)]
    assert _run(tmp_path, wrong, lambda: iter(right)) == 1
    content = _saved(tmp_path)
    reason = "WrongVariantError: logits: off by 1"
    assert content["refused"] == [{"model": "net0", "what": "a question", "reason": reason}]
    assert len(content["targets"]) == 1
    assert f"Refused: net0, a question: {reason}" in (tmp_path / "targets.md").read_text()


def test_the_questions_for_each_model() -> None:
    asked = [(question.model, question.what) for question in targets.list_questions(["resnet18", "test_vit"], _setup())]
    every = {"against the limit", "the wrapper's forward", "depth by depth"}
    assert {what for model, what in asked if model == "test_vit"} == every
    assert {what for model, what in asked if model == "resnet18"} == {
        *every,
        "against other methods",
        "in half precision",
    }


class LoopClock(timing.WallClock):
    """A clock that shows 300 ms for the steps that run back to back."""

    def time(self, call: Callable[[], Any]) -> tuple[Any, float]:
        result, elapsed = super().time(call)
        return result, 300.0 if getattr(call, "__name__", "") == "run_back_to_back" else elapsed


def test_a_gpu_is_compared_by_steps_back_to_back_and_launch_bound_is_reported() -> None:
    backward, step, _ = targets.against_the_limit("test_vit", replace(_setup(), clock=LoopClock(), loop_steps=3))
    assert backward.remark == "launch-bound"  # on a CPU, the host is the device
    assert step.samples is not None
    assert step.samples.numerator == step.samples.denominator == [100.0, 100.0]
