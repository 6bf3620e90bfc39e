"""Training on another device than the CPU, as far as it can be tested without one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from image_folders import make_folder
from second_device import META, HostWaitError, meta_accelerator, no_waits
from timm.data import create_transform
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_structure
from torch.utils.data import TensorDataset
from unknown_rows import UnknownRows

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import (
    MultiLabel,
    Phase,
    Regression,
    SingleLabel,
    SoftLabels,
    TrainerConfig,
    evaluate,
    find_images,
    fit_heads,
    fit_lbfgs,
    make_accelerator,
)
from backbone_finetune.recipes.commands.predict import predict
from backbone_finetune.recipes.data.images import ImageDataset
from backbone_finetune.recipes.data.transforms import split_transform
from backbone_finetune.recipes.features import dataset
from backbone_finetune.recipes.features.dataset import Features, on_device
from backbone_finetune.recipes.heads import grid
from backbone_finetune.recipes.heads.standardize import Standardization
from backbone_finetune.recipes.models.file import TrainedModel, build_transform
from backbone_finetune.recipes.objectives.objective import Objective
from backbone_finetune.recipes.precision import default_precision, products_in
from backbone_finetune.recipes.training.epoch import arrange_images, train_epoch
from backbone_finetune.recipes.training.mixing import Mixing, make_mixing
from backbone_finetune.recipes.training.phase_data import PhaseData
from backbone_finetune.recipes.training.phase_state import PhaseState
from backbone_finetune.recipes.training.phases import make_schedule
from backbone_finetune.recipes.training.processes import prepare, release
from backbone_finetune.recipes.training.progress import Progress

CPU = torch.device("cpu")


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    yield meta_accelerator(monkeypatch)
    monkeypatch.undo()
    make_accelerator(CPU)  # of which other tests hold accelerators


class Small(nn.Linear):
    """A network on a device with memory for ``most`` images."""

    most = 100

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(images)


def test_an_evaluation_without_memory_for_a_batch_runs_in_parts(caplog: pytest.LogCaptureFixture) -> None:
    data: Any = TensorDataset(torch.randn(13, 4), torch.arange(13) % 2)
    network, config = Small(4, 2), TrainerConfig(make_accelerator(CPU), batch_size=8, show_progress=False)
    whole = evaluate(network, data, config)
    network.most = 3
    in_parts = evaluate(network, data, config)
    assert torch.equal(in_parts.answers, whole.answers)
    assert in_parts.loss == pytest.approx(whole.loss)
    assert caplog.messages == [
        f"out of memory: the model runs on {size} images at a time from here on" for size in (4, 2)
    ]
    network.most = 0
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        evaluate(network, data, config)


class Waits(nn.Module):
    """A network that reads a number of the device in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs * (1.0 if float(inputs.sum()) > 0 else 2.0))


def train_on_meta(
    model: FineTuneModel, train: Any, objective: Objective, accelerator: Accelerator, mixing: Mixing | None = None
) -> int:
    """Train an epoch on the meta device until its sums are read; return the number of steps, where none waited."""
    model.to(META)
    module = model.classifier if isinstance(train, Features) else model
    config = TrainerConfig(accelerator, batch_size=4, objective=objective, accumulation=2, show_progress=False)
    prepared, optimizer = prepare(accelerator, module, torch.optim.AdamW(module.parameters(), lr=0.1, fused=True))
    schedule = make_schedule(optimizer, Phase(epochs=1, cosine=True), 3)
    data = PhaseData(train, None, module, on_features=isinstance(train, Features))
    state = PhaseState(model, prepared, optimizer, schedule, Phase(), set(), data, mixing=mixing)
    state.all_read = isinstance(train, Features)
    taken: list[Any] = []
    optimizer.register_step_post_hook(lambda *given: taken.append(given))
    with no_waits(), pytest.raises(RuntimeError, match="meta tensor"):
        train_epoch(state, Progress(), config, title="")
    return len(taken)


OBJECTIVES = [
    (SingleLabel(), torch.arange(12) % 2),
    (SingleLabel(class_weights=(1.0, 2.0), label_smoothing=0.1), torch.arange(12) % 2),
    (SoftLabels(), torch.full((12, 2), 0.5)),
    (MultiLabel(), torch.ones(12, 2)),
    (Regression((1.0, 2.0), (3.0, 4.0)), torch.randn(12, 2)),
]
CUSTOM_LOSS = (SingleLabel(loss=partial(nn.functional.cross_entropy, reduction="none")), torch.arange(12) % 2)


@pytest.mark.parametrize(("objective", "targets"), [*OBJECTIVES, CUSTOM_LOSS])
@pytest.mark.parametrize("resident", [True, False])
def test_no_step_on_features_waits_for_the_device(
    objective: Objective, targets: Tensor, resident: bool, on_meta: Accelerator
) -> None:
    rows = Features([torch.randn(12, 4), targets], tree_structure(0))
    model = FineTuneModel(nn.Identity(), nn.Linear(4, 2))
    train = on_device(rows, META) if resident else rows
    assert train_on_meta(model, train, objective, on_meta) == 3


@pytest.mark.parametrize(("objective", "targets"), [*OBJECTIVES, CUSTOM_LOSS])
def test_no_step_on_images_waits_for_the_device(objective: Objective, targets: Tensor, on_meta: Accelerator) -> None:
    images = [(torch.randn(3, 16, 16), target) for target in targets]
    model = FineTuneModel.from_timm("test_resnet", num_classes=2).freeze_backbone(trainable_groups=1)
    assert train_on_meta(model, images, objective, on_meta) == 3


def test_no_step_on_mixed_images_waits_for_the_device(on_meta: Accelerator) -> None:
    images = [(torch.randn(3, 16, 16), index % 2) for index in range(11)]
    model = FineTuneModel.from_timm("test_resnet", num_classes=2)
    mixing = make_mixing(Phase(mixup=0.5, cutmix=0.5), SingleLabel(), 2)
    assert train_on_meta(model, images, SingleLabel(), on_meta, mixing) == 3


@pytest.mark.parametrize(("objective", "targets"), OBJECTIVES)
def test_an_evaluation_waits_for_the_device_at_its_end(
    objective: Objective, targets: Tensor, on_meta: Accelerator
) -> None:
    images: Any = UnknownRows([(torch.randn(3, 16, 16), target) for target in targets])
    model, seen = FineTuneModel.from_timm("test_resnet", num_classes=2).to(META), []
    model.register_forward_hook(lambda module, inputs, outputs: seen.append(len(outputs)))
    config = TrainerConfig(on_meta, batch_size=4, objective=objective, show_progress=False)
    with no_waits(), pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        evaluate(model, images, config, keep_outputs=True)
    assert seen == [4, 4, 4]


@pytest.mark.parametrize("place", [1, 10])
def test_a_wrong_target_in_any_batch_of_an_evaluation_raises_before_its_loss(place: int) -> None:
    """On a GPU, the loss of a class that is not there would end the process."""
    images: Any = UnknownRows([(torch.randn(4), 5 if index == place else 0) for index in range(12)])
    computed: list[Tensor] = []
    objective = SingleLabel(loss=lambda outputs, targets: computed.append(targets) or torch.zeros(len(targets)))
    config = TrainerConfig(make_accelerator(CPU), batch_size=4, objective=objective, show_progress=False)
    with pytest.raises(ValueError, match=r"test: target 5 is outside the 2 classes"):
        evaluate(nn.Linear(4, 2), images, config, name="test")
    assert len(computed) == place // 4


def test_images_are_normalized_without_waiting_for_the_device() -> None:
    _, normalize = split_transform(create_transform(32))
    octets = torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=META)
    with no_waits():
        assert normalize(octets).device == META


def test_features_are_on_the_device_and_rows_of_a_frontier_are_not() -> None:
    rows = Features([torch.randn(12, 4), torch.arange(12)], tree_structure(0))
    for on_features, expected in ((True, "meta"), (False, "cpu")):
        data = PhaseData(rows, rows, nn.Linear(4, 2), on_features=on_features).on_device(META)
        assert {tensor.device.type for part in (data.train, data.validation) for tensor in part.tensors} == {expected}


def test_features_too_large_for_the_device_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = TensorDataset(torch.zeros(10, 4), torch.zeros(10))  # 200 bytes
    for free, expected in ((400, "meta"), (399, "cpu")):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert {tensor.device.type for tensor in on_device(rows, META).tensors} == {expected}


def test_free_memory_of_a_gpu_has_what_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("mem_get_info", (100, 1000)), ("memory_reserved", 50), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert dataset.free_memory(torch.device("cuda", 0)) == 130


def test_waits_for_the_device_are_seen(on_meta: Accelerator) -> None:
    """The tests above can fail."""
    values, index = torch.ones(4, 4, device=META), torch.tensor([1, 0])
    for waiting in (
        lambda: torch.ones(2).to(META),
        lambda: values.copy_(torch.ones(4, 4)),
        lambda: values[index],
        lambda: torch.tensor([1.0], device=META),
    ):
        with no_waits(), pytest.raises(HostWaitError):
            waiting()
    rows = Features([torch.randn(12, 4), torch.arange(12) % 2], tree_structure(0))
    model = FineTuneModel(nn.Identity(), Waits())
    assert train_on_meta(model, on_device(rows, META), SingleLabel(), on_meta) == 0


def test_a_grid_of_heads_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch, on_meta: Accelerator) -> None:
    monkeypatch.setattr(grid.StackedHeads, "validate", lambda heads, *_: ([0.5, 0.6], [1.0, 0.9]))
    data = TensorDataset(torch.randn(12, 4), torch.arange(12) % 2)
    rows = on_device(data, META)
    monkeypatch.setattr(grid, "on_device", lambda given, device: rows)
    heads: list[grid.StackedHeads] = []
    step = grid.StackedHeads.step

    def without_waits(self: grid.StackedHeads, loss: Tensor) -> None:
        heads.append(self)
        with no_waits():
            step(self, loss)

    monkeypatch.setattr(grid.StackedHeads, "step", without_waits)
    sent = grid.index_rows

    def indexed(tensors: Any, *others: Any) -> Any:
        assert {tensor.device for tensor in tensors} == {META}
        with no_waits():
            yield from sent(tensors, *others)

    monkeypatch.setattr(grid, "index_rows", indexed)
    fit_heads(
        nn.Linear(4, 2).to(META),
        data,
        data,
        learning_rates=[0.1, 0.2],
        epochs=2,
        batch_size=4,
        device=META,
        show_progress=False,
    )
    assert len(heads) == 6


class CountedCopies(TorchDispatchMode):
    """Counts the tensors that go from the CPU to the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "_to_copy":
            self.count += (args[0].device, result.device) == (CPU, META)
        return result


def test_lbfgs_sends_its_features_once() -> None:
    data = TensorDataset(torch.randn(6, 4), torch.arange(6) % 2)
    with CountedCopies() as copies, pytest.raises(RuntimeError, match="meta tensor"):  # when it reads the objective
        fit_lbfgs(nn.Linear(4, 2, device=META), data, chunk_size=2, device=META)
    assert copies.count == 2  # features and targets, not those of three chunks


def test_lbfgs_multiplies_without_tf32() -> None:
    matmul, seen = torch.backends.cuda.matmul, set[str]()
    layer = nn.Linear(4, 2)
    layer.register_forward_hook(lambda *_: seen.add(matmul.fp32_precision))
    try:
        matmul.fp32_precision = "tf32"
        fit_lbfgs(layer, TensorDataset(torch.randn(6, 4), torch.arange(6) % 2), max_iterations=2)
        assert (seen, matmul.fp32_precision) == ({"ieee"}, "tf32")
    finally:
        matmul.fp32_precision = "none"


class WithoutDoubles(TorchDispatchMode):
    """A device without float64, like MPS."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        if any(each.device.type == "cuda" and each.dtype == torch.float64 for each in tensors):
            raise TypeError("this device has no float64")
        return result


def test_features_are_standardized_on_a_device_without_float64() -> None:
    with FakeTensorMode(), WithoutDoubles():
        layer = nn.Linear(4, 2, device="cuda")
        values = torch.zeros(4, dtype=torch.float64)
        standardization = Standardization(values, values)
        standardization.enter(layer)
        standardization.leave(layer)
        rows = TensorDataset(torch.zeros(3, 4, device="cuda"), torch.zeros(3, device="cuda"))
        assert standardization.apply(rows).tensors[0].device.type == "cuda"
        with pytest.raises(TypeError, match="no float64"):
            layer.weight.double()


def test_the_default_precision_is_that_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    for major, precision in ((7, "no"), (8, "bf16"), (9, "bf16")):  # V100, A100, H100
        card = SimpleNamespace(major=major)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, card=card: card)
        assert default_precision(torch.device("cuda")) == precision
    assert default_precision(torch.device("mps")) == "no"


def test_tf32_is_for_a_block_and_not_against_the_users_choice() -> None:
    matmul = torch.backends.cuda.matmul
    assert matmul.fp32_precision == "none"
    with products_in("tf32"):
        assert matmul.allow_tf32
    assert (matmul.fp32_precision, matmul.allow_tf32) == ("none", False)
    try:
        matmul.fp32_precision = "ieee"
        with products_in("tf32"):
            assert matmul.fp32_precision == "ieee"
        matmul.fp32_precision = "tf32"
        with products_in("ieee"):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = "none"


def test_another_precision_than_that_of_an_earlier_run_is_used() -> None:
    """accelerate uses the precision of its first accelerator for the whole process, or raises."""
    for asked, expected in (("bf16", "bf16"), (None, "no"), ("bf16", "bf16"), ("no", "no")):
        assert make_accelerator(CPU, mixed_precision=asked).mixed_precision == expected


def test_the_launchers_precision_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert make_accelerator(CPU).mixed_precision == "bf16"
    monkeypatch.undo()
    assert make_accelerator(CPU).mixed_precision == "no"


@pytest.mark.parametrize(("autocast", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_module_is_prepared_without_autocast(autocast: bool, expected: torch.dtype) -> None:
    accelerator, seen = make_accelerator(CPU, mixed_precision="bf16"), []
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    network = nn.Sequential(layer)
    prepared, _ = prepare(accelerator, network, torch.optim.SGD(network.parameters()), autocast=autocast)
    prepared(torch.ones(1, 2))
    release(accelerator, prepared)
    assert seen == [expected]
    make_accelerator(CPU)


class Views(nn.Module):
    """A network that takes contiguous images alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).view(len(images), -1)


@pytest.mark.parametrize(
    ("network", "contiguous"), [(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()), False), (Views(), True)]
)
def test_images_are_in_channels_last_on_cuda_where_the_network_takes_that(network: nn.Module, contiguous: bool) -> None:
    model = FineTuneModel(network, nn.Flatten())
    images = [torch.randn(5, 3, 8, 8)]
    rng = torch.get_rng_state()
    for device, is_last in (("cpu", False), ("cuda", not contiguous)):
        accelerator: Any = SimpleNamespace(device=torch.device(device), is_fsdp2=False)
        state: Any = SimpleNamespace(model=model, data=PhaseData(images, None, model), channels_last=None)
        for _ in range(2):
            (arranged,) = arrange_images(state, images, accelerator)
            assert arranged.is_contiguous(memory_format=torch.channels_last) == is_last
            assert torch.equal(arranged, images[0])
    assert model.training
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_read_on_the_cpu_whatever_the_default_device_is(workers: int, tmp_path: Path) -> None:
    """In a forked worker, CUDA would raise; a tensor on "meta" has no values."""
    model = FineTuneModel.from_timm("test_resnet", num_classes=3)
    found = find_images(make_folder(tmp_path / "images"))
    results = []
    for default in ("cpu", "meta"):
        with torch.device(default):
            trained = TrainedModel(model, "test_resnet", found.class_names, resolve_model_data_config(model))
            images = ImageDataset(found, build_transform(trained.data_config))
            config = TrainerConfig(make_accelerator(CPU), batch_size=8, workers=workers, show_progress=False)
            score = evaluate(model, images, config)
            predicted = [prediction.classes for prediction in predict(trained, found.paths, workers=workers)]
        results.append((score.loss, score.answers.tolist(), predicted, images[0][0].tolist()))
    assert results[0] == results[1]
