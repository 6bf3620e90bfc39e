"""A process that test_distributed.py starts: python distributed_worker.py SCENARIO RANK WORLD STORE_FILE."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torture import settle

from backbone_finetune import FineTuneModel

PHASES = (0, 1, 5)  # trainable layer groups of test_resnet, which has five


def whole(tensor: Tensor) -> Tensor:
    """Return the full values of a tensor that may be sharded."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def build(architecture: str) -> FineTuneModel:
    torch.manual_seed(0)  # the same on every process
    # Running statistics of a trainable BatchNorm differ between processes; here gradients are compared.
    model = FineTuneModel.from_timm(architecture, num_classes=5, norm_eval=True)
    settle(model, batch(0)[0])
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return the images of all processes, and their labels."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 5


def own_share(tensor: Tensor) -> Tensor:
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def backward(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    nn.functional.cross_entropy(network(images), labels).backward()


def validate(network: nn.Module) -> None:
    """Run the calls that every loop makes between its epochs."""
    with torch.no_grad():
        network.eval()(own_share(batch(0)[0]))


def assert_replicas_equal(model: FineTuneModel) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        mine = whole(tensor)
        first = mine.clone()
        dist.broadcast(first, src=0)
        assert torch.equal(mine, first), f"{name} differs between processes"


def assert_same_gradients(model: FineTuneModel, single: FineTuneModel) -> None:
    """Return the gradients of a single process with all images."""
    expected = {name: parameter.grad for name, parameter in single.named_parameters()}
    for name, parameter in model.named_parameters():
        gradient = expected[name]
        if not parameter.requires_grad or gradient is None:
            assert parameter.grad is None, name
            assert gradient is None, name
        else:
            assert parameter.grad is not None, name
            torch.testing.assert_close(whole(parameter.grad), gradient, rtol=1e-4, atol=1e-6)


def train_phases(architecture: str, prepare: Callable[[FineTuneModel], nn.Module], *, sharded: bool) -> None:
    """Train in phases that unfreeze more and more, with one optimizer; `prepare` wraps the model in each phase."""
    model = build(architecture)
    single = copy.deepcopy(model)
    if sharded:
        prepare(model)
    optimizer, its_optimizer = (
        torch.optim.SGD(one.param_groups(lr=0.05, weight_decay=0.1, include_frozen=True), momentum=0.9)
        for one in (model, single)
    )
    network: nn.Module = model
    for phase, trainable_groups in enumerate(PHASES):
        validate(network)  # the following freezing must not change unsharded parameters, which the next step drops
        model.freeze_backbone(trainable_groups=trainable_groups)
        single.freeze_backbone(trainable_groups=trainable_groups)
        network = model if sharded else prepare(model)
        frozen = {name: whole(p).clone() for name, p in model.named_parameters() if not p.requires_grad}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        trained = {name: whole(p).clone() for name, p in model.named_parameters() if p.requires_grad}
        assert frozen or trainable_groups == PHASES[-1]
        with model.assert_frozen():
            for step in range(2):
                images, labels = batch(10 * phase + step)
                network.train()
                optimizer.zero_grad()
                its_optimizer.zero_grad()
                backward(network, own_share(images), own_share(labels))
                backward(single.train(), images, labels)
                assert_same_gradients(model, single)
                optimizer.step()
                its_optimizer.step()
            validate(network)
        now = dict(model.named_parameters())
        assert all(torch.equal(whole(now[name]), was) for name, was in frozen.items())
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
        assert not any(torch.equal(whole(now[name]), was) for name, was in trained.items())
        assert_replicas_equal(model)


def data_parallel() -> None:
    """DistributedDataParallel, wrapped again in each phase."""
    train_phases("test_resnet", DistributedDataParallel, sharded=False)


def fully_sharded() -> None:
    """FSDP2, wrapped once: it follows later freezing."""

    train_phases("test_resnet", shard, sharded=True)


def shard(model: FineTuneModel) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for stage in (model.backbone.layer3, model.backbone.layer4, model):
        fully_shard(stage, mesh=mesh)
    return model


def after_a_forward_without_gradients() -> None:
    """FSDP2's root then keeps unsharded parameters, and changes to these are lost at the next step."""
    model = build("test_resnet")
    shard(model)
    images, labels = (own_share(tensor) for tensor in batch(0))

    def forward_without_gradients() -> None:
        with torch.no_grad():
            model(images)
        assert not isinstance(model.backbone.bn1.weight, DTensor)

    backward(model, images, labels)
    stem = model.backbone.bn1.weight
    assert isinstance(stem, DTensor)
    assert stem.grad is not None
    model.backbone.bn1.requires_grad_(False)  # set by hand; the next train() drops its gradient
    forward_without_gradients()
    model.train()
    assert stem.grad is None

    fingerprint = model.freeze_backbone(trainable_groups=1).frozen_fingerprint()
    forward_without_gradients()
    assert model.frozen_fingerprint() == fingerprint

    forward_without_gradients()
    groups = model.param_groups(lr=0.1, include_frozen=True)
    assert all(isinstance(parameter, DTensor) for group in groups for parameter in group["params"])


def drift() -> None:
    """Unfreezing after wrapping raises; without the error, the replicas would drift apart."""
    model = build("test_resnet").freeze_backbone()
    network = DistributedDataParallel(model)
    images, labels = (own_share(tensor) for tensor in batch(0))
    backward(network, images, labels)
    model.freeze_backbone(trainable_groups=1)
    with pytest.raises(RuntimeError, match="Wrap again"):
        network(images)
    backward(model, images, labels)  # what the wrapper would do: gradients of each process alone
    gradient = model.backbone.layer4[0].conv1.weight.grad
    first = gradient.clone()
    dist.broadcast(first, src=0)
    assert dist.get_rank() == 0 or not torch.equal(gradient, first)
    backward(DistributedDataParallel(model), images, labels)


SCENARIOS = {
    function.__name__: function for function in (data_parallel, fully_sharded, after_a_forward_without_gradients, drift)
}


def main(scenario: str, rank: str, world_size: str, store_file: str) -> None:
    torch.set_num_threads(1)
    # A file store needs no port, which another process could take.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store_file}",
        rank=int(rank),
        world_size=int(world_size),
        timeout=timedelta(seconds=120),
    )
    try:
        SCENARIOS[scenario]()
    finally:
        dist.destroy_process_group()
    # A DeviceMesh keeps gloo's threads running after that (torch 2.14). A thread that still has a tensor when the
    # interpreter exits aborts the process, after everything here has passed.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
