"""Freezing in several processes: DistributedDataParallel, FSDP2, and unfreezing after wrapping."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from backbone_finetune import FineTuneModel
from backbone_finetune.distributed import active_wrapper

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")

WORKER = Path(__file__).parents[1] / "helpers" / "distributed_worker.py"
SECONDS = 300


@pytest.mark.long
@pytest.mark.parametrize(
    "scenario",
    ["data_parallel", "fully_sharded", "after_a_forward_without_gradients", "drift"],
)
def test_two_processes(scenario: str, tmp_path: Path) -> None:
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, str(WORKER), scenario, str(rank), "2", str(tmp_path / "store")]
            with log.open("w") as opened:
                processes.append(subprocess.Popen(command, stdout=opened, stderr=subprocess.STDOUT))
        statuses = [process.wait(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert statuses == [0, 0], "\n".join(log.read_text() for log in logs)


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Larger(nn.Module):
    """A user's module that contains the model."""

    def __init__(self, model: FineTuneModel) -> None:
        super().__init__()
        self.colours = nn.Conv2d(3, 3, 1)
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.colours(images))


def frozen_model() -> FineTuneModel:
    return FineTuneModel.from_timm("test_resnet", num_classes=5).freeze_backbone()


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_torch_has_the_attribute_that_active_wrapper_reads(group_of_one: None) -> None:
    """If this fails, torch has removed the attribute, and the check needs another way to find the wrapper."""
    seen: list[object] = []
    model = frozen_model()
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(active_wrapper()))
    wrapped = DistributedDataParallel(model)
    wrapped(IMAGES)
    model(IMAGES)
    assert seen == [wrapped, None]


def test_unfreezing_after_wrapping_raises_until_wrapped_again(group_of_one: None) -> None:
    model = frozen_model()
    wrapped = DistributedDataParallel(model)
    wrapped(IMAGES).sum().backward()
    model.freeze_backbone(trainable_groups=1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"backbone\.layer4\.0\.conv1\.weight, .* and \d+ more .*Wrap again"):
            wrapped(IMAGES)
    model(IMAGES)
    DistributedDataParallel(model)(IMAGES).sum().backward()
    model.freeze_backbone()
    wrapped(IMAGES)


def test_unfreezing_before_the_first_forward_raises(group_of_one: None) -> None:
    model = frozen_model()
    wrapped = DistributedDataParallel(model)
    model.unfreeze_backbone()
    with pytest.raises(RuntimeError, match="Wrap again"):
        wrapped(IMAGES)


def test_unfreezing_one_part_and_freezing_another_raises(group_of_one: None) -> None:
    model = frozen_model()
    wrapped = DistributedDataParallel(model)
    model.classifier.bias.requires_grad_(False)
    model.backbone.layer4[0].bn1.bias.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r": backbone\.layer4\.0\.bn1\.bias were frozen"):
        wrapped(IMAGES)


def test_a_wrapped_backbone_raises(group_of_one: None) -> None:
    wrapped = DistributedDataParallel(nn.Linear(4, 4))
    with pytest.raises(
        ValueError, match=r"backbone is wrapped in .*; pass the network itself \(its \.module\), and wrap"
    ):
        FineTuneModel(wrapped, nn.Linear(4, 2))


def test_forwards_without_gradients_are_not_checked(group_of_one: None) -> None:
    model = frozen_model()
    wrapped = DistributedDataParallel(model)
    model.unfreeze_backbone().eval()
    with torch.no_grad():
        assert torch.equal(wrapped(IMAGES), model(IMAGES))


def test_no_sync_is_checked_too(group_of_one: None) -> None:
    model = frozen_model()
    wrapped = DistributedDataParallel(model)
    model.unfreeze_backbone()
    with wrapped.no_sync(), pytest.raises(RuntimeError, match="Wrap again"):
        wrapped(IMAGES)


def test_a_model_in_a_larger_wrapped_module(group_of_one: None) -> None:
    model = frozen_model()
    wrapped = DistributedDataParallel(Larger(model))
    wrapped(IMAGES).sum().backward()
    model.freeze_backbone(trainable_groups=1)
    with pytest.raises(RuntimeError, match=r": model\.backbone\.layer4"):
        wrapped(IMAGES)


class CallsTheParts(nn.Module):
    """A user's module that calls backbone and classifier, but not the model."""

    def __init__(self, model: FineTuneModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.classifier(self.model.backbone(images))


def test_a_module_that_calls_the_parts_is_checked(group_of_one: None) -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=5).freeze_backbone()
    wrapped = DistributedDataParallel(CallsTheParts(model))
    for _ in range(2):
        wrapped.train()
        wrapped(IMAGES).sum().backward()
    model.freeze_backbone(trainable_groups=1)
    with pytest.raises(RuntimeError, match=r": model\.backbone\.layer4\..*Wrap again"):
        wrapped(IMAGES)
    model.freeze_backbone()
    model.classifier.requires_grad_(False)
    wrapped = DistributedDataParallel(CallsTheParts(model.unfreeze_backbone()))
    model.classifier.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r": model\.classifier\.weight"):
        wrapped(IMAGES)
    assert len(model.backbone._forward_pre_hooks) == 1
    copy.deepcopy(model)(IMAGES)


def test_a_single_process_registers_no_hooks() -> None:
    model = frozen_model().train()
    assert not model.backbone._forward_pre_hooks


def test_parameters_that_the_wrapper_ignores_are_not_checked(group_of_one: None) -> None:
    larger = Larger(frozen_model())
    ignored = [name for name, _ in larger.named_parameters() if name.startswith("model.backbone.layer4")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(larger, ignored)
    wrapped = DistributedDataParallel(larger)
    larger.model.freeze_backbone(trainable_groups=1)
    wrapped(IMAGES).sum().backward()
    larger.model.freeze_backbone(trainable_groups=2)
    with pytest.raises(RuntimeError, match=r": model\.backbone\.layer3"):
        wrapped(IMAGES)


# The compiler warns about a graph break in the wrapper's code, and torch about its profiler marks.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*Profiler.*")
def test_compiled_around_or_within_the_wrapper(group_of_one: None) -> None:
    for compile_around in (True, False):
        torch.compiler.reset()
        model = frozen_model()
        if compile_around:
            wrapped = torch.compile(DistributedDataParallel(model), backend="aot_eager")
        else:
            wrapped = DistributedDataParallel(torch.compile(model, backend="aot_eager"))
        torch.testing.assert_close(wrapped(IMAGES), model(IMAGES))
        wrapped(IMAGES).sum().backward()
        model.freeze_backbone(trainable_groups=1)
        with pytest.raises(RuntimeError, match="Wrap again"):
            wrapped(IMAGES)


@pytest.mark.filterwarnings("ignore:.*Profiler.*")
def test_fullgraph_in_the_wrapper_raises_with_the_reason(group_of_one: None) -> None:
    torch.compiler.reset()
    wrapped = DistributedDataParallel(torch.compile(frozen_model(), backend="aot_eager", fullgraph=True))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="each forward in DistributedDataParallel checks for"):
        wrapped(IMAGES)
