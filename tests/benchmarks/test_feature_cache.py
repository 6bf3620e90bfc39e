"""`feature_cache.py`: complete rows, correct comparisons, and memory measurements that detect growth."""

from __future__ import annotations

import copy
import importlib.metadata
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import feature_cache
import pytest
import torch
from caching import heads, size, training, transfer
from harness import timing
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CLOCK = timing.WallClock()
SMALL = ["--device", "cpu", "--threads", "1", "--model", "test_resnet", "--image-size", "32", "--seeds", "0"]
SMALL += ["--pictures", "8", "--features", "16", "--batch-size", "4", "--epochs", "2", "--repeats", "2"]


# Small caches, built in this process.
JUDGE_MEMORY = partial(size.judge_memory, 40, 80, build=size.build)


@pytest.fixture
def peers_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make fastai and Lightning count as not installed."""
    find = importlib.metadata.Distribution.from_name

    def find_others(name: str) -> importlib.metadata.Distribution:
        if name in {"fastai", "lightning"}:
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", find_others)


class _Clock:
    """A clock that shows 10 ms for each call, which makes a warm-up of two calls.

    It records the precisions of the convolutions in each call, and is interrupted after a number of calls.
    """

    def __init__(self, calls: int) -> None:
        self.calls = calls
        self.precisions: list[set[torch.dtype]] = []

    def time(self, call: Callable[[], Any]) -> tuple[Any, float]:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        self.precisions.append(set())
        return call(), 10.0

    def record(self, module: nn.Module, inputs: object, output: Any) -> None:
        if isinstance(module, nn.Conv2d) and self.precisions:
            self.precisions[-1].add(output.dtype)


@pytest.mark.usefixtures("peers_missing")
def test_a_small_run_writes_every_row(tmp_path: Path) -> None:
    assert feature_cache.main([*SMALL, "--output", str(tmp_path)], judge=JUDGE_MEMORY) in {
        0,
        1,
    }  # so small a run misses its targets
    content = json.loads((tmp_path / "feature_cache.json").read_text())
    assert content["command"].startswith("python benchmarks/feature_cache.py --device cpu")
    assert content["environment"]["torch"] == torch.__version__.partition("+")[0]
    taken = content["milliseconds"]
    expected = {"ours, float32", "one pass, float32", "one pass again", "the article's recipe", "heads together"}
    assert expected | {"cached epoch", "plain epoch", "heads one by one"} <= set(taken)
    assert all(len(samples) == 2 and min(samples) > 0 for samples in taken.values())
    by_name = {target["what"]: target for target in content["targets"]}
    assert len(by_name) == len(content["targets"]) == 2 + 2 * 3 + 2 + 1 + 1
    for what, target in by_name.items():
        if "fastai" in what or "Lightning" in what:
            assert target["ratio"] is None
            assert "is not installed" in target["remark"]
    recipe = by_name["2 epochs, ours, float32 / the article's recipe"]["ratio"]["median"]
    pairs = zip(taken["ours, float32"], taken["the article's recipe"], strict=True)
    assert recipe == pytest.approx(sum(own / (2 * epoch) for own, epoch in pairs) / 2)
    page = (tmp_path / "feature_cache.md").read_text()
    assert all(what in page for what in by_name)
    with Image.open(tmp_path / "feature_cache.png") as picture:
        assert len(picture.convert("L").getcolors()) > 10


@pytest.mark.usefixtures("peers_missing")
def test_an_interrupt_keeps_complete_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _set_bf16(monkeypatch, False)
    clock = _Clock(4 * 2 + 4)  # four rows: their warm-up, and the first turn
    assert feature_cache.main([*SMALL, "--output", str(tmp_path)], clock=clock) == 130
    content = json.loads((tmp_path / "feature_cache.json").read_text())
    assert content["interrupted"]
    assert len(content["milliseconds"]["ours, float32"]) == 1
    assert (tmp_path / "feature_cache.png").stat().st_size > 0


@pytest.mark.usefixtures("peers_missing")
def test_an_error_late_in_a_run_keeps_earlier_measurements(tmp_path: Path) -> None:
    def fail() -> Any:
        raise RuntimeError("no more memory to watch")

    with pytest.raises(RuntimeError, match="no more memory to watch"):
        feature_cache.main([*SMALL, "--output", str(tmp_path)], judge=fail)
    content = json.loads((tmp_path / "feature_cache.json").read_text())
    assert len(content["milliseconds"]["ours, float32"]) == 2
    assert len(content["targets"]) == 2 + 2 * 3 + 1


@pytest.mark.parametrize(
    ("model", "message"), [("resnet5000", "--models resnet5000: timm"), ("levit_128s", "levit_128s: its classifier is")]
)
def test_an_unsupported_architecture_raises(model: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        feature_cache.main(["--model", model])
    assert message in capsys.readouterr().err


def test_ours_runs_each_image_once_and_the_recipe_in_every_epoch() -> None:
    task = training.make_task("test_resnet", 8, 32, 4, 3, CPU)
    blueprint = task.blueprint
    model = training.FineTuneModel.from_timm(copy.deepcopy(blueprint.network)).freeze_backbone()
    seen: list[torch.dtype] = []
    model.backbone.conv1.register_forward_hook(
        lambda _module, _inputs, output: seen.extend([output.dtype] * len(output))
    )
    before = model.classifier.weight.detach().clone()
    training.run_ours(model, task, own_way=False)
    # Eight images of each dataset first, for the layout of the features; then each image once, and the test's batch.
    assert seen == [torch.float32] * (8 + 4 + 8 + 4)
    assert not torch.equal(before, model.classifier.weight)
    seen.clear()
    training.run_backbone(model, task, own_way=False)
    assert len(seen) == 8 + 4

    method = next(method for method in training.METHODS if method.label == "the article's recipe")
    kept: list[nn.Module] = []

    def freeze(network: nn.Module) -> nn.Module:
        kept.append(method.freeze(blueprint, network))
        return kept[0]

    epoch = training.epoch_of(method, blueprint.network, freeze, task)
    kept[0].conv1.register_forward_hook(lambda _module, _inputs, output: seen.extend([output.dtype] * len(output)))  # type: ignore[operator, union-attr]
    statistics = kept[0].bn1.running_mean.clone()  # type: ignore[operator, union-attr]
    seen.clear()
    epoch()
    epoch()
    assert len(seen) == 2 * 8
    assert not torch.equal(kept[0].bn1.running_mean, statistics)  # type: ignore[arg-type, union-attr]


@pytest.mark.usefixtures("peers_missing")
def test_each_row_runs_in_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    _set_bf16(monkeypatch, True)
    samples, clock = training.Samples(), _Clock(100)
    handle = register_module_forward_hook(clock.record)
    try:
        training.time_runs(training.make_task("test_resnet", 4, 32, 4, 1, CPU), 1, clock, samples)
    finally:
        handle.remove()
    rows = list(samples.milliseconds)
    named = ["ours, float32", "one pass, float32", "ours, bf16", "one pass, bf16", "one pass again"]
    assert rows[:5] == named
    computed = dict(zip(rows, clock.precisions[-len(rows) :], strict=True))
    assert {name for name in rows if computed[name] == {torch.bfloat16}} == {"ours, bf16", "one pass, bf16"}
    assert all(computed[name] == {torch.float32} for name in rows if "bf16" not in name)


def _set_bf16(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: supported)


def test_an_epoch_on_the_cache_is_timed() -> None:
    task = heads.make_head_task("net", 16, 6, 4, 2, CPU)
    assert torch.equal(task.cached.tensors[0], task.in_memory.tensors[0])
    samples = training.Samples()
    heads.time_epochs(task, 2, CLOCK, samples)
    assert {len(taken) for taken in samples.milliseconds.values()} == {2}
    (target,) = heads.judge_epochs(task, samples)
    assert target.at_most == 1.05
    assert target.ratio is not None


def test_the_same_heads_are_trained_together_and_one_by_one() -> None:
    task = heads.make_head_task("net", 8, 6, 4, 2, CPU)
    stepped: set[tuple[float, float]] = set()

    def record(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        stepped.update((group["lr"], group["weight_decay"]) for group in optimizer.param_groups)

    handle = register_optimizer_step_post_hook(record)
    try:
        heads.train_one_by_one(task)
    finally:
        handle.remove()
    assert len(stepped) == heads.HEADS == 32
    samples = training.Samples({"heads together": [1.0, 1.0], "heads one by one": [4.0, 2.0]})
    (target,) = heads.judge_heads(task, samples, 3000.0)
    assert target.ratio is not None
    assert (target.ratio.median, target.verdict) == (0.375, "within the noise")
    assert "32 x 3.0 s" in target.remark


def test_memory_that_grows_with_the_images_is_detected() -> None:
    few, many = (size.build(count, on_disk=False) for count in (100, 1500))
    assert many["memory"] - few["memory"] > 0.5 * (many["features"] - few["features"])
    on_disk = size.build(1500, on_disk=True)
    assert on_disk["memory"] < 0.5 * many["memory"]
    assert 1 <= on_disk["files"] / on_disk["features"] < 1.01


def test_four_ways_to_train_on_one_split() -> None:
    plan = transfer.Plan(frozen_epochs=1, fine_tuning_epochs=1, image_size=32, rates=(1e-3,))
    outcomes = list(transfer.compare_methods(1, plan, CPU))
    assert [outcome.method for outcome in outcomes] == [
        transfer.RECIPE,
        transfer.BEST_HEAD,
        transfer.LP_FT,
        transfer.PLAIN,
    ]
    assert all(0.1 < outcome.accuracy < 1 and outcome.seconds > 0 for outcome in outcomes)
    *_, head_first, plain = outcomes
    assert head_first.epochs == 2
    assert plain.epochs >= 2  # with the time of the head's epoch
    page = transfer.describe_outcomes(outcomes)
    assert all(outcome.method in page for outcome in outcomes)


def test_splits_are_disjoint() -> None:
    folder = transfer.find_images(transfer.CLIPART)
    numbered = torch.arange(len(folder.paths), dtype=torch.float32)
    drawn = transfer.draw_split(folder, numbered, seed=1)
    fit, validation, both, test = (
        set(part.tensors[0].tolist()) for part in (drawn.fit, drawn.validation, drawn.both, drawn.test)
    )
    assert fit | validation == both
    assert both | test == set(numbered.tolist())
    assert not fit & validation
    assert not both & test
    targets = torch.tensor(folder.targets)
    assert torch.equal(targets[drawn.test.tensors[0].long()], drawn.test.tensors[1])


def test_a_verdict_on_two_methods_follows_their_splits() -> None:
    def outcomes(method: str, *accuracies: float) -> list[transfer.Outcome]:
        return [transfer.Outcome(method, seed, value, 1.0, 1, 0.1) for seed, value in enumerate(accuracies)]

    mixed = outcomes("new", 0.5, 0.9, 0.7) + outcomes("old", 0.6, 0.6, 0.6)
    assert transfer.judge(mixed, "new", "old") == "(+0.100 on average, 2 of 3 splits won) beats"
    assert transfer.judge(outcomes("lucky", 0.5, 0.5, 0.9) + mixed, "lucky", "old").endswith("does not beat")
    assert transfer.judge(mixed, "old", "new").endswith("does not beat")
    assert transfer.judge(mixed, "new", "absent") == "was not compared with"
