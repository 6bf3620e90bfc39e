"""`peers.py`: every method has a row, wrong ones have no times, and changed tensors are listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peers
import pytest
import torch
from harness import timing
from subjects import peer_methods, peer_report
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


def _blueprint() -> peer_methods.Blueprint:
    return peer_methods.make_blueprint("test_resnet", 10, 32, {})


def _batch() -> peers.Batch:
    return peers.Batch(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))


def _method(freeze: Callable[[peer_methods.Blueprint, nn.Module], nn.Module]) -> peer_methods.Method:
    return next(method for method in peer_methods.METHODS if method.freeze is freeze)


def test_the_tensors_that_each_method_changes_are_listed() -> None:
    methods = [
        _method(freeze)
        for freeze in (
            peer_methods.unfrozen,
            peer_methods.article_recipe,
            peer_methods.timm_freeze,
            peer_methods.ours,
        )
    ]
    rows: list[peer_report.PeerRow] = []
    peers.compare_methods(_blueprint(), _batch(), methods, 2, rows)
    unfrozen, recipe, timm_freeze, ours, limit = rows
    assert unfrozen.moved["parameters"]
    assert unfrozen.moved["buffers"]
    # The recipe freezes parameters only: running statistics change.
    assert not recipe.moved["parameters"]
    assert "conv1.1.running_mean" in recipe.moved["buffers"]
    # timm replaces BatchNorms by modules without the counter.
    assert timm_freeze.moved["gone"]
    assert all(name.endswith("num_batches_tracked") for name in timm_freeze.moved["gone"])
    assert ours.moved == {"parameters": [], "buffers": [], "gone": []}
    assert ours.trainable_parameters == recipe.trainable_parameters == limit.trainable_parameters == 96 * 10 + 10
    assert ours.saved_bytes == limit.saved_bytes
    assert ours.saved_bytes is not None
    assert unfrozen.saved_bytes is not None
    assert ours.saved_bytes < unfrozen.saved_bytes
    assert all(len(row.step_ms) == len(row.backward_ms) == 2 for row in rows)
    table = peer_report.model_table(rows)
    assert "the same, bit for bit" in table
    assert f"{len(recipe.moved['buffers'])} buffers moved" in table


def _cannot(blueprint: peer_methods.Blueprint, network: nn.Module) -> nn.Module:
    raise ModuleNotFoundError("No module named 'rare'")


def test_a_method_that_fails_keeps_its_row() -> None:
    rows: list[peer_report.PeerRow] = []
    methods = [peer_methods.Method("rare", _cannot, "no-such-package"), _method(peer_methods.ours)]
    peers.compare_methods(_blueprint(), _batch(), methods, 1, rows)
    assert [(row.method, row.error) for row in rows[:2]] == [
        ("rare", "ModuleNotFoundError: No module named 'rare'"),
        ("ours", None),
    ]
    assert not rows[0].step_ms
    first_line = peer_report.model_table(rows).splitlines()[2]
    assert "not installed" in first_line
    assert "No module named 'rare'" in first_line


def test_the_command_writes_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--device", "cpu", "--threads", "1", "--batch-size", "2", "--image-size", "32", "--repeats", "1"]
    assert peers.main([*small, "--models", "test_resnet", "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "peers.json").read_text())
    assert [row["method"] for row in content["rows"]] == [method.label for method in peer_methods.METHODS] + [
        peer_report.LIMIT
    ]
    assert all(row["error"] or row["step_ms"] for row in content["rows"])
    assert content["command"] in (tmp_path / "peers.md").read_text()
    assert "| ours" in capsys.readouterr().out


def test_a_network_whose_classifier_is_not_a_single_layer_raises() -> None:
    with pytest.raises(ValueError, match=r"levit_128s: its classifier is \(.*freeze all but a single layer"):
        peer_methods.make_blueprint("levit_128s", 10, 224, {})


def _small(output: Path, *arguments: str) -> list[str]:
    small = ["--device", "cpu", "--threads", "1", "--batch-size", "2", "--image-size", "32", "--repeats", "2"]
    return [*small, "--output", str(output), *arguments]


def _rows(folder: Path) -> list[dict[str, object]]:
    content: dict[str, list[dict[str, object]]] = json.loads((folder / "peers.json").read_text())
    return content["rows"]


OURS_ALONE = [_method(peer_methods.ours)]


def test_a_network_that_cannot_be_compared_has_a_row_and_the_next_is_measured(tmp_path: Path) -> None:
    assert peers.main(_small(tmp_path, "--models", "levit_128s", "test_resnet"), methods=OURS_ALONE) == 1
    refused, *measured = _rows(tmp_path)
    assert (refused["model"], refused["method"]) == ("levit_128s", "every method")
    assert str(refused["error"]).startswith("ValueError: levit_128s: its classifier is (")
    assert [row["method"] for row in measured] == ["ours", peer_report.LIMIT]
    assert all(row["step_ms"] for row in measured)
    assert "every method" in (tmp_path / "peers.md").read_text()


def _double(blueprint: peer_methods.Blueprint, network: nn.Module) -> nn.Module:
    network.requires_grad_(False)
    network.get_submodule(blueprint.classifier).requires_grad_(True)
    with torch.no_grad():
        network.get_parameter("conv1.0.weight").mul_(2)
        network.get_buffer("conv1.1.running_mean").add_(1)
    return network


def test_a_method_with_other_outputs_has_a_reason_and_no_times() -> None:
    rows: list[peer_report.PeerRow] = []
    methods = [peer_methods.Method("fast and wrong", _double, "torch"), _method(peer_methods.ours)]
    peers.compare_methods(_blueprint(), _batch(), methods, 1, rows)
    wrong, ours, _ = rows
    assert wrong.error is not None
    assert wrong.error.startswith("WrongVariantError: logits in eval mode: off by")
    assert not wrong.step_ms
    assert ours.error is None
    assert len(ours.step_ms) == 1


class _FailsLater(nn.Module):
    """Runs in eval mode and a number of times in train mode, then raises."""

    def __init__(self, network: nn.Module, times: int, error: Exception) -> None:
        super().__init__()
        self.network = network
        self.times = times
        self.error = error

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.times -= self.training
        if self.times < 0:
            raise self.error
        logits: torch.Tensor = self.network(images)
        return logits


def _fails_after(times: int, error: Exception) -> peer_methods.Method:
    def freeze(blueprint: peer_methods.Blueprint, network: nn.Module) -> nn.Module:
        return _FailsLater(network, times, error)

    return peer_methods.Method("late", freeze, "torch", "network.")


class _FailsInTurn:
    """Two methods: ours, and one that fails when its turn comes after ours once too often.

    Its first turn is the check of what moves, its second the warm-up; then every other pass has one.
    """

    def __init__(self, turn: int, error: BaseException) -> None:
        self.turn = turn
        self.error = error
        self.others = 0  # forwards of ours since the last forward of the other
        self.turns = 0

    def methods(self) -> list[peer_methods.Method]:
        return [
            peer_methods.Method("ours", self.freeze_ours, "torch", "backbone."),
            peer_methods.Method("late", self.freeze_late, "torch"),
        ]

    def freeze_ours(self, blueprint: peer_methods.Blueprint, network: nn.Module) -> nn.Module:
        module = peer_methods.ours(blueprint, network)
        module.register_forward_pre_hook(lambda module, inputs: setattr(self, "others", self.others + module.training))
        return module

    def freeze_late(self, blueprint: peer_methods.Blueprint, network: nn.Module) -> nn.Module:
        module = peer_methods.article_recipe(blueprint, network)
        module.register_forward_pre_hook(self.count)
        return module

    def count(self, module: nn.Module, inputs: object) -> None:
        self.turns += self.others > 0 and module.training
        self.others = 0
        if self.turns > self.turn:
            raise self.error


@pytest.mark.parametrize("late", [0, 20])
def test_a_method_that_fails_later_does_not_affect_others(late: int) -> None:
    rows: list[peer_report.PeerRow] = []
    methods = _FailsInTurn(late, ValueError("too often")).methods()
    peers.compare_methods(_blueprint(), _batch(), methods, 40, rows)
    ours, late, limit = rows
    assert late.error == "ValueError: too often"
    assert not late.step_ms
    assert len(ours.step_ms) == len(limit.backward_ms) == 40
    assert ours.error is limit.error is None


@pytest.mark.parametrize("times", [0, 3, 5])
def test_out_of_memory_halves_the_batch_for_all_methods(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], times: int
) -> None:
    def freeze(blueprint: peer_methods.Blueprint, network: nn.Module) -> nn.Module:
        module = _FailsLater(network, times, torch.OutOfMemoryError("CUDA out of memory."))
        module.register_forward_pre_hook(lambda layer, given: _fit(module, given[0]))
        return module

    def _fit(module: _FailsLater, images: torch.Tensor) -> None:
        if len(images) == 1:
            module.times = 9  # a smaller batch fits

    methods = [_method(peer_methods.ours), peer_methods.Method("late", freeze, "torch", "network.")]
    # test_vit has no BatchNorm, which needs two images.
    assert peers.main(_small(tmp_path, "--models", "test_vit"), methods=methods) == 0
    rows = _rows(tmp_path)
    assert [(row["method"], row["error"]) for row in rows] == [
        ("ours", None),
        ("late", None),
        (peer_report.LIMIT, None),
    ]
    assert [row["batch_size"] for row in rows] == [1, 1, 1]
    assert "test_vit: out of memory: going on with batch size 1" in capsys.readouterr().out


def test_an_interrupt_keeps_complete_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = _FailsInTurn(2, KeyboardInterrupt()).methods()
    given = _small(tmp_path, "--models", "test_vit", "test_resnet", "--repeats", "3")
    assert peers.main(given, methods=methods) == 130
    rows = _rows(tmp_path)
    assert {row["model"] for row in rows} == {"test_vit"}
    assert [len(row["step_ms"]) for row in rows] == [2, 2, 2]  # type: ignore[arg-type]
    assert f"interrupted: what was measured until then is in {tmp_path}" in capsys.readouterr().err


def test_a_copy_is_in_train_mode() -> None:
    def leave_in_eval(blueprint: peer_methods.Blueprint, network: nn.Module) -> nn.Module:
        return network.eval()

    method = peer_methods.Method("in eval", leave_in_eval, "torch")
    assert all(module.training for module in peers.freeze_copy(_blueprint(), _batch(), method).modules())


@pytest.mark.parametrize(("arguments", "dtype"), [([], torch.float32), (["--amp", "bf16"], torch.bfloat16)])
def test_methods_run_in_the_given_precision_and_layout(
    tmp_path: Path, arguments: list[str], dtype: torch.dtype
) -> None:
    seen: set[tuple[torch.dtype, bool]] = set()

    def freeze(blueprint: peer_methods.Blueprint, network: nn.Module) -> nn.Module:
        network.get_submodule("conv1.0").register_forward_hook(note)
        return peer_methods.ours(blueprint, network)

    def note(layer: nn.Module, given: object, output: torch.Tensor) -> None:
        weight = layer.get_parameter("weight")
        if len(output) == 3:  # the wrapper runs a network with fewer images at construction
            seen.add((output.dtype, weight.is_contiguous(memory_format=torch.channels_last)))

    methods = [peer_methods.Method("ours", freeze, "torch", "backbone.")]
    layout = ["--channels-last"] if arguments else []
    given = _small(tmp_path, "--models", "test_resnet", "--batch-size", "3", *arguments, *layout)
    assert peers.main(given, methods=methods) == 0
    assert seen == {(dtype, bool(layout))}
    settings = json.loads((tmp_path / "peers.json").read_text())["settings"]
    assert settings["precision"] == ("bf16 autocast" if arguments else "float32")


def test_rows_of_a_gpu_are_compared_by_steps_back_to_back() -> None:
    ours, other = (
        peer_report.PeerRow("net", method, "1", trainable_parameters=1, saved_bytes=1)
        for method in (peer_report.OURS, "theirs")
    )
    for row, loop in ((ours, 2.0), (other, 6.0)):
        for _ in range(6):
            row.add(timing.StepTimes(1.0, 1.0, 1.0, 5.0, loop, backward_host=0.2, step_host=5.5))
    line = peer_report.model_table([ours, other]).splitlines()[-1]
    assert "3.000 [3.000, 3.000]" in line
    assert [cell.strip() for cell in line.split("|")][9:11] == ["6 ± 0", "step"]
