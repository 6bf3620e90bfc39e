"""`frontier.py`: complete rows, steps that do the work of their name, and correct ratios."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import frontier
import pytest
import torch
from harness.ratios import Target
from harness.timing import ProcessClock
from PIL import Image
from reading.batch import JpegBatch
from subjects import frontier_memory
from subjects.equality import WrongVariantError
from subjects.frontier_report import FrontierReport
from subjects.frontier_steps import BLUEPRINTS, FrontierWork, build_partly_frozen, names_take_more, recipe_step
from subjects.networks import Network
from subjects.variants import Precision
from targets import has_bf16_instructions

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--threads", "1", "--models", "test_resnet", "--image-size", "32", "--batch-size", "4"]
SMALL += ["--images", "40", "--epochs", "3", "--repeats", "2"]


@pytest.fixture
def network() -> Network:
    return build_partly_frozen("test_resnet", 1, 4, 32, CPU)


def make_work(network: Network, precision: Precision = "off") -> FrontierWork:
    return FrontierWork(network, BLUEPRINTS["test_resnet"].rest, precision, ProcessClock())


def test_a_small_run_writes_every_row(tmp_path: Path) -> None:
    assert frontier.main([*SMALL, "--output", str(tmp_path)]) in {0, 1}  # a small run may miss its targets
    content = json.loads((tmp_path / "frontier.json").read_text())
    assert content["refused"] == []
    assert content["command"].startswith("python benchmarks/frontier.py --device cpu")
    by_name = {(target["model"], target["what"]): target for target in content["targets"]}
    assert len(by_name) == (4 + 4 + 1 if has_bf16_instructions(CPU) else 4 + 1 + 1)
    taken = content["milliseconds"]["test_resnet"]
    assert all(min(samples) > 0 for samples in taken.values())
    (find,) = taken["find, float32"]
    pairs = zip(taken["record, float32"], taken["cached step, float32"], taken["the article's recipe"], strict=True)
    of_the_recipe = by_name["test_resnet, float32", "3 epochs on the frontier / the article's recipe"]
    assert of_the_recipe["ratio"]["median"] == pytest.approx(
        sum((find + record + 3 * step) / (3 * recipe) for record, step, recipe in pairs) / 2
    )
    page = (tmp_path / "frontier.md").read_text()
    assert all(f"{model}: {what}" in page for model, what in by_name)
    assert "backbone.layer3" in page
    with Image.open(tmp_path / "frontier.png") as figure:
        assert len(figure.convert("L").getcolors()) > 10


def test_a_network_that_cannot_be_measured_is_recorded(tmp_path: Path) -> None:
    report = FrontierReport({"cpu": "this", "threads": 1, "torch": "2", "date": "now"}, "python", {"epochs": 3})

    def too_few() -> list[Target]:
        network = build_partly_frozen("test_resnet", 1, 2, 32, CPU)
        make_work(network)
        return []

    frontier.answer(report, "test_resnet", too_few)
    (refused,) = report.refused
    report.write(tmp_path / "frontier")
    assert "pass a batch of 3 or more images" in str(refused["reason"])
    assert "Refused: test_resnet" in (tmp_path / "frontier.md").read_text()


def test_a_network_without_a_handwritten_rest_is_a_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        frontier.main(["--models", "resnet18", "resnet50"])
    assert "--models resnet18: pass some of PretrainedResNetVariation, resnet50" in capsys.readouterr().err


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_the_handwritten_rest_equals_the_rest_of_the_network(name: str) -> None:
    blueprint = BLUEPRINTS[name]
    network = build_partly_frozen(blueprint.network, blueprint.trainable_groups, 3, 32, CPU)
    work = FrontierWork(network, blueprint.rest, "off", ProcessClock())  # checked at construction
    assert work.find_ms > 0
    assert len(work.ready) == 1


def test_a_rest_with_other_outputs_raises(network: Network) -> None:
    def rest(model: Any, features: torch.Tensor) -> torch.Tensor:
        return BLUEPRINTS["test_resnet"].rest(model, features.flip(1))

    with pytest.raises(WrongVariantError, match="the rest by hand, logits"):
        FrontierWork(network, rest, "off", ProcessClock())


def test_cached_steps_train_the_rest_and_not_the_front(network: Network) -> None:
    front, rest = [0], [0]
    work = make_work(network)
    backbone = network.model.backbone
    for module, count in ((backbone.conv1, front), (backbone.layer4, rest)):
        module.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
    ran = {}
    for name, call in {
        "whole": work.whole.run,
        "cached": work.cached.run,
        "rest": work.rest.run,
        "record": work.record_and_store,
    }.items():
        front[0] = rest[0] = 0
        network.model.zero_grad(set_to_none=True)
        call()
        trained = {path for path, parameter in network.model.named_parameters() if parameter.grad is not None}
        ran[name] = (front[0], rest[0], len(trained))
    of_the_rest = sum(parameter.requires_grad for parameter in network.model.parameters())
    steps = {"whole": (1, 1, of_the_rest), "cached": (0, 1, of_the_rest), "rest": (0, 1, of_the_rest)}
    assert ran == {**steps, "record": (1, 0, 0)}


def test_a_batch_is_read_from_the_recorded_store(network: Network) -> None:
    work = make_work(network)
    (stored,) = work.store
    (ready,) = work.ready
    assert len(stored) == 8 * 4
    stored.zero_()
    work.record_and_store()
    assert torch.equal(stored[:4], ready)
    stored.copy_(torch.arange(32.0).view(-1, 1, 1, 1).expand_as(stored))
    (drawn,) = work.draw_batch()
    numbers = drawn[:, 0, 0, 0].tolist()
    assert drawn.shape == ready.shape
    assert len(set(numbers)) == 4
    assert numbers != [0.0, 1.0, 2.0, 3.0]


def test_the_recipe_is_float32_in_train_mode_with_the_same_parameters_frozen(network: Network) -> None:
    model = network.model
    statistics = model.backbone.bn1.running_mean.clone()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    seen: list[tuple[bool, torch.dtype, bool]] = []

    def look(module: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        seen.append((module.training, output.dtype, output.requires_grad))

    # The recipe runs a copy of the network, with its hooks.
    handles = [module.register_forward_hook(look) for module in (model.backbone.bn1, model.backbone.layer4)]
    step = recipe_step(network)
    for handle in handles:
        handle.remove()
    step.run()
    assert seen == [(True, torch.float32, False), (True, torch.float32, True)]
    assert torch.equal(model.backbone.bn1.running_mean, statistics), "it runs on a copy"
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_bf16_needs_half_the_bytes(network: Network) -> None:
    single, half = make_work(network), make_work(network, "bf16")
    assert half.ready[0].dtype == torch.bfloat16
    assert single.bytes_per_image == 2 * half.bytes_per_image == single.ready[0][0].numel() * 4


def test_epochs_are_computed_as_described() -> None:
    work = {"whole step": [40.0] * 6, "cached step": [10.0] * 6, "cached step again": [11.0] * 6}
    work |= {"rest by hand": [8.0] * 6, "record": [30.0] * 6, "find": [20.0]}
    work |= {"the article's recipe": [50.0] * 6, "read and transform": [5.0] * 6}
    step, recipe, reading, whole = frontier.judge("net", work, 3.0, 20, "kept")
    assert step.ratio is not None
    assert step.ratio.median == pytest.approx(1.25)
    assert (step.at_most, step.verdict) == (1.05, "missed")
    assert step.noise is not None
    assert step.noise.median == pytest.approx(1.1)
    for target, ours, theirs in ((recipe, 250, 1000), (reading, 255, 1100), (whole, 250, 800)):
        assert target.ratio is not None
        assert target.ratio.median == pytest.approx(ours / theirs)
        assert target.verdict == "met"
    assert recipe.at_most == reading.at_most == pytest.approx(1 / 3)
    assert recipe.remark == "4.00 times faster, 3 wanted; kept"


def test_memory_that_grows_with_the_images_is_detected() -> None:
    # In separate processes, because memory that earlier tests have freed would be reused.
    few, many = (frontier_memory.build_apart(count, on_disk=False) for count in (40, 1200))
    assert many["kept"] == 30 * few["kept"]
    assert many["memory"] - few["memory"] > 0.5 * (many["kept"] - few["kept"])
    on_disk = frontier_memory.build_apart(1200, on_disk=True)
    assert on_disk["memory"] - few["memory"] < 0.5 * (many["kept"] - few["kept"])


def test_a_batch_of_files_is_read_each_time(tmp_path: Path) -> None:
    batch = JpegBatch(tmp_path / "images", 3, 32)
    first = batch.read()
    assert first.shape == (3, 3, 32, 32)
    assert torch.equal(first, batch.read())
    next((tmp_path / "images").rglob("*.jpg")).unlink()
    with pytest.raises(FileNotFoundError):
        batch.read()


def test_process_time_does_not_include_waiting() -> None:
    answer, waited = ProcessClock().time(lambda: time.sleep(0.3) or "slept")
    _, worked = ProcessClock().time(lambda: sum(range(3_000_000)))
    assert answer == "slept"
    assert waited < 200  # CPU milliseconds
    assert worked > 1


def test_names_that_match_more_parameters_are_detected() -> None:
    network = build_partly_frozen("test_resnet", 1, 4, 32, CPU)
    assert not names_take_more(network, ("fc", "layer4"))
    assert names_take_more(network, ("fc", "layer4", "bn2"))
    efficientnet = BLUEPRINTS["tf_efficientnet_lite0"]
    built = build_partly_frozen(efficientnet.network, efficientnet.trainable_groups, 4, 32, CPU)
    assert names_take_more(built, efficientnet.words)
    without_bn2 = [word for word in efficientnet.words if word != "bn2."]
    norm = {"backbone.bn2.weight", "backbone.bn2.bias"}
    trains = {name for name, parameter in built.model.named_parameters() if parameter.requires_grad}
    assert {name for name in trains if not any(word in name for word in without_bn2)} == norm
