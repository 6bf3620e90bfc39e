"""The loop on several processes: the same weights as one process, and communication."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import failing_worker
import processes_worker
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from torchrun import torchrun

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes.training.batches import LocalBatch, epoch_batches, load_batches, local_batch
from backbone_finetune.recipes.training.config import TrainerConfig
from backbone_finetune.recipes.training.epoch import train_step
from backbone_finetune.recipes.training.phase_state import prepared_phase
from backbone_finetune.recipes.training.phases import Phase
from backbone_finetune.recipes.training.processes import (
    communicated_bytes,
    find_device,
    make_accelerator,
    prepare,
    release,
)

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")


def launch(folder: Path, *, processes: int, device: str = "cpu", **environment: str) -> str:
    """Start the worker with torchrun; return what it printed."""
    folder.mkdir()
    finished = torchrun(str(Path(processes_worker.__file__)), str(folder), device, processes=processes, **environment)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def outcome(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    weights = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    return json.loads((folder / "told.json").read_text()), weights


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("one")
    processes_worker.main(str(folder))
    return outcome(folder)


@pytest.fixture(scope="module")
def printed_by_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("two") / "run"
    return launch(folder, processes=2), folder


@pytest.mark.long
@needs_gloo
def test_two_processes_give_the_weights_of_one(one: Any, printed_by_two: tuple[str, Path]) -> None:
    (told, weights), (told_by_two, weights_of_two) = one, outcome(printed_by_two[1])
    assert (told["processes"], told_by_two["processes"]) == (1, 2)
    for name in ("cached", "from zero", "uncached", "accumulated", "weighted", "everything", "monitored", "resumed"):
        torch.testing.assert_close(weights_of_two[name], weights[name], rtol=1e-5, atol=1e-6, msg=name)
        assert told_by_two[name] == pytest.approx(told[name], rel=1e-5)
        assert told_by_two[f"{name} test"] == told[f"{name} test"]
        outputs = (torch.tensor(each[f"{name} outputs"]) for each in (told_by_two, told))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5, msg=f"{name}, in the order of the images")
    torch.testing.assert_close(weights["accumulated"], weights["uncached"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights["resumed"], weights["monitored"], rtol=1e-5, atol=1e-6)
    assert told["weighted"] != pytest.approx(told["accumulated"], rel=1e-2)


@pytest.mark.long
@needs_gloo
@pytest.mark.parametrize(
    ("kind", "metrics"), [("soft", []), ("labels", ["mean_average_precision", "macro_f1"]), ("values", ["r2"])]
)
def test_two_processes_do_as_one_on_targets_of_every_kind(
    one: Any, printed_by_two: tuple[str, Path], kind: str, metrics: list[str]
) -> None:
    (told, weights), (told_by_two, weights_of_two) = one, outcome(printed_by_two[1])
    for name in (f"{kind} cached", f"{kind} uncached"):
        torch.testing.assert_close(weights_of_two[name], weights[name], rtol=1e-5, atol=1e-6, msg=name)
        assert told_by_two[name] == pytest.approx(told[name], rel=1e-5)
        assert set(metrics) <= told[name].keys()
    torch.testing.assert_close(weights[f"{kind} cached"], weights[f"{kind} uncached"], rtol=1e-5, atol=1e-6)
    cached, uncached = told[f"{kind} cached"], told[f"{kind} uncached"]
    assert (cached.pop("cached"), uncached.pop("cached")) == (True, False)
    assert cached == pytest.approx(uncached, rel=1e-5)


@pytest.mark.long
@needs_gloo
def test_trainable_statistics_on_two_processes(one: Any, printed_by_two: tuple[str, Path]) -> None:
    (told, weights), (told_by_two, weights_of_two) = one, outcome(printed_by_two[1])
    assert told["statistics test"] > 0.8
    assert told_by_two["statistics test"] > 0.8
    assert told_by_two["statistics"][-1] < told_by_two["statistics"][0]
    # Each process had half of the images; the statistics are averaged.
    name = "backbone.last.1.running_mean"
    ours, theirs = weights_of_two["statistics"][name], weights["statistics"][name]
    assert torch.corrcoef(torch.stack((ours, theirs)))[0, 1] > 0.9


@pytest.mark.long
@needs_gloo
def test_statistics_are_averaged_over_processes(printed_by_two: tuple[str, Path]) -> None:
    folder = printed_by_two[1] / "buffers"
    (before, other), (after, other_after) = (
        [load_file(folder / f"{when}-{process}.safetensors") for process in (0, 1)] for when in ("before", "after")
    )
    for part in ("mean", "var"):
        name = f"backbone.last.1.running_{part}"
        assert not torch.allclose(before[name], other[name])
        torch.testing.assert_close(after[name], (before[name] + other[name]) / 2)
        assert torch.equal(before[f"backbone.stem.1.running_{part}"], after[f"backbone.stem.1.running_{part}"])
    assert all(torch.equal(after[name], other_after[name]) for name in after)


@pytest.mark.long
@needs_gloo
def test_only_one_process_logs_and_reports_the_bytes_sent(printed_by_two: tuple[str, Path]) -> None:
    lines = [line for line in printed_by_two[0].splitlines() if line.startswith("2 processes: ")]
    head = (16 * 3 + 3) * 4
    group = 8 * 16 * 9 + 16 + 2 * 16
    # One line for each training of the worker's loop; the trainings after it have show_progress=False.
    sent = dict.fromkeys(("statistics", "monitored", "resumed"), head + group * 4)
    names = ("cached", "from zero", "uncached", "accumulated", "statistics", "weighted", "monitored", "resumed")
    expected = [f"2 processes: each sends {sent.get(name, head):,} bytes of gradients per step" for name in names]
    del lines[6]  # "everything" trains two groups
    assert lines == expected


GPUS = torch.cuda.device_count()
ON_CPUS = [pytest.mark.long, needs_gloo]
ON_GPUS = [pytest.mark.cuda, pytest.mark.skipif(not GPUS, reason="no GPU")]


@pytest.mark.parametrize(
    ("device", "precision", "tolerance"),
    [
        pytest.param("cpu", "no", 1e-6, marks=ON_CPUS),
        pytest.param("cpu", "bf16", 3e-2, marks=ON_CPUS),
        pytest.param("cuda", "no", 1e-3, marks=ON_GPUS),
        pytest.param("cuda", "bf16", 3e-2, marks=ON_GPUS),
    ],
)
def test_fully_sharded_training_gives_the_weights_of_one_process(
    device: str, precision: str, tolerance: float, one: Any, tmp_path: Path
) -> None:
    launched = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    launched["ACCELERATE_MIXED_PRECISION"] = precision
    launch(tmp_path / "sharded", processes=GPUS if device == "cuda" else 2, device=device, **launched)
    (_, weights), (_, sharded) = one, outcome(tmp_path / "sharded")
    for name in weights.keys() - {"statistics"}:  # of which each process has its own in a step
        torch.testing.assert_close(sharded[name], weights[name], rtol=10 * tolerance, atol=tolerance, msg=name)
    errors = [float((sharded["uncached"][key] - own).abs().max()) for key, own in weights["uncached"].items()]
    assert max(errors) > 1e-5 or precision == "no"


def test_fsdp_1_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr(Accelerator, "is_fsdp2", False)
    with pytest.raises(ValueError, match="pass --fsdp_version 2"):
        make_accelerator(torch.device("cpu"))


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@needs_gloo
def test_the_reported_bytes_are_those_that_the_wrapper_sends(group_of_one: None) -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=5).freeze_backbone(trainable_groups=1)
    wrapped = DistributedDataParallel(model)
    handed: list[int] = []

    def count_bytes(state, bucket):  # torch checks the annotations of a hook
        handed.append(bucket.buffer().nbytes)
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, count_bytes)
    wrapped(torch.randn(2, 3, 32, 32)).sum().backward()
    assert sum(handed) == communicated_bytes(model)
    model.freeze_backbone()
    assert communicated_bytes(model) == communicated_bytes(model.classifier) == (96 * 5 + 5) * 4


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
def test_shares_have_equal_length_and_count_each_image_once(size: int, processes: int) -> None:
    batch = torch.arange(size) + 100
    shares = [local_batch(batch, process=process, processes=processes) for process in range(processes)]
    assert len({len(share.indices) for share in shares}) == 1
    assert processes == 1 or len(shares[0].indices) >= 2
    assert sorted(index for share in shares for index in share.indices[: share.num_real].tolist()) == batch.tolist()
    assert set(torch.cat([share.indices for share in shares]).tolist()) <= set(batch.tolist())


@pytest.mark.parametrize("num_real", [2, 4])
def test_images_of_other_processes_have_no_weight_in_any_part_of_a_step(num_real: int) -> None:
    data: Any = TensorDataset(torch.randn(6, 3), torch.arange(6) % 2)
    share, start = LocalBatch(torch.tensor([4, 1, 0, 5, 2]), num_real), nn.Linear(3, 2)
    gradients: list[Any] = []
    sums = []
    for accumulation in (1, 2):
        model = FineTuneModel(nn.Identity(), copy.deepcopy(start))
        config = TrainerConfig(make_accelerator(torch.device("cpu")), accumulation=accumulation, show_progress=False)
        with prepared_phase(model, data, None, phase=Phase(lr=0.1), changed=set(), config=config) as state:
            sums.append(train_step(state, share, next(load_batches(data, [share])), 5, config))
            gradients.append(model.classifier.weight.grad)
    assert sums[0][2] == num_real
    assert torch.allclose(sums[0], sums[1])
    assert torch.allclose(gradients[0], gradients[1])


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat(epoch_batches(50, 8, seed=seed, epoch=epoch)).tolist()

    assert order(0, 1) == order(0, 1)
    assert sorted(order(0, 1)) == list(range(50))
    assert len({tuple(order(seed, epoch)) for seed in (0, 1, 12) for epoch in (1, 2, 21)}) == 9


def test_a_released_module_can_be_prepared_again() -> None:
    accelerator = make_accelerator(torch.device("cpu"))
    layer = nn.Linear(2, 2)
    forward = layer.forward
    for _ in range(2):
        prepared, _ = prepare(accelerator, layer, torch.optim.SGD(layer.parameters()))
        assert prepared._is_accelerate_prepared
        release(accelerator, prepared)
        assert set(vars(layer)) == set(vars(nn.Linear(2, 2)))
        assert layer.forward == forward


@pytest.mark.parametrize("kept_out", [False, True])
def test_a_release_on_a_cpu_runs_no_full_garbage_collection(kept_out: bool) -> None:
    """Other garbage is left for a later collection, and objects that the caller froze stay frozen."""
    accelerator = make_accelerator(torch.device("cpu"))
    layer = nn.Linear(2, 2)
    prepared, optimizer = prepare(accelerator, layer, torch.optim.SGD(layer.parameters()))
    held = weakref.ref(optimizer)
    garbage = nn.Linear(2, 2)
    garbage.itself = [garbage]
    collected = weakref.ref(garbage)
    gc.collect()
    gc.disable()
    try:
        if kept_out:
            gc.freeze()
        del optimizer, garbage
        release(accelerator, prepared)
        assert accelerator._models == accelerator._optimizers == []
        assert collected() is not None
        assert (gc.get_freeze_count() > 0) == kept_out
        gc.unfreeze()
        gc.collect()
        assert held() is None
        assert collected() is None
    finally:
        gc.unfreeze()
        gc.enable()


def test_auto_is_the_best_available_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, names in (
        (None, {"cpu"}),
        ("cuda", {"cpu", "cuda", "cuda:0", "cuda:1"}),
        ("mps", {"cpu", "mps", "mps:0"}),
    ):
        device = None if kind is None else torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda device=device, **_: device)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda names=names: max(len(names) - 2, 0))
        assert find_device("auto") == torch.device(kind or "cpu")
        for name in ("cpu", "cuda", "cuda:0", "cuda:1", "cuda:2", "mps", "mps:0", "xpu"):
            with nullcontext() if name in names else pytest.raises(ValueError, match=f"{name}': not on this machine"):
                assert find_device(name) == torch.device(name)


def test_an_accelerator_on_another_device_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    make_accelerator(torch.device("cpu"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match=r"device mps: accelerate computes on cpu here.*ACCELERATE_USE_CPU"):
        make_accelerator(torch.device("mps"))
    make_accelerator(torch.device("cpu"))


def test_a_device_can_be_chosen_after_a_run_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate uses the device of its first accelerator for the whole process."""
    make_accelerator(torch.device("cpu"))
    monkeypatch.setattr(PartialState, "default_device", torch.device("meta"))
    monkeypatch.setattr(PartialState, "set_device", lambda state: setattr(state, "device", torch.device("meta")))
    assert make_accelerator(torch.device("meta")).device.type == "meta"
    monkeypatch.undo()
    assert make_accelerator(torch.device("cpu")).device.type == "cpu"


@needs_gloo
@pytest.mark.long
@pytest.mark.parametrize("where", ["step", "main", "move", "evaluation"])
def test_all_processes_end_if_one_runs_out_of_memory(where: str) -> None:
    """They do not wait for the six hours after which a collective fails."""
    finished = torchrun(failing_worker.__file__, where)
    assert finished.returncode != 0
    assert "CUDA out of memory" in finished.stderr
    assert ("pass a larger accumulation" in finished.stderr) == (where == "step")
    if where in {"move", "evaluation"}:  # the other process gets the error too, and could go on
        assert "MemoryError: process 1: OutOfMemoryError: CUDA out of memory" in finished.stderr
