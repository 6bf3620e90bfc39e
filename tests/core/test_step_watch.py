"""What is unfrozen after the optimizer was built is in no optimizer: said once, and only where it is so."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from backbone_finetune import FineTuneModel

Build = Callable[[FineTuneModel], list[torch.optim.Optimizer]]

INPUTS = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
SAID = r"4 parameters were unfrozen \(backbone\.0\.weight, .*\.\.\.\) and no optimizer steps them.*include_frozen=True"


def frozen_model() -> FineTuneModel:
    return FineTuneModel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2)).freeze_backbone()


def adamw(model: FineTuneModel, **keywords: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.param_groups(lr=0.1, weight_decay=0.1, **keywords))


def plain_sgd(model: FineTuneModel) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def train(model: Callable[[Tensor], Tensor], *optimizers: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(INPUTS).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_unfreezing_after_the_optimizer_was_built_is_said_once() -> None:
    model = frozen_model()
    optimizer = adamw(model)
    train(model, optimizer)
    model.unfreeze_backbone()
    before = model.backbone[0].weight.clone()
    with pytest.warns(UserWarning, match=SAID) as caught:
        train(model, optimizer, steps=4)
    assert len(caught) == 1
    assert torch.equal(model.backbone[0].weight, before)
    model.train()
    train(model, optimizer, steps=4)


def test_by_hand_from_the_next_train_on() -> None:
    model = frozen_model()
    optimizer = adamw(model)
    model.backbone.requires_grad_(True)
    model.train()
    with pytest.warns(UserWarning, match=SAID):
        train(model, optimizer)


def test_it_is_said_where_the_model_clears_all_gradients() -> None:
    """As transformers' Trainer does."""
    model = frozen_model()
    optimizer = plain_sgd(model)
    model.unfreeze_backbone()
    train(model, optimizer, steps=1)
    model.zero_grad()
    with pytest.warns(UserWarning, match=SAID):
        train(model, optimizer, steps=1)


def test_only_a_part_was_given_to_the_optimizer() -> None:
    model = frozen_model()
    optimizer = plain_sgd(model)
    model.unfreeze_backbone()
    optimizer.add_param_group({"params": model.backbone[1].parameters()})
    with pytest.warns(UserWarning, match=r"2 parameters were unfrozen \(backbone\.0\.weight, backbone\.0\.bias\)"):
        train(model, optimizer)


def new_optimizer(model: FineTuneModel) -> list[torch.optim.Optimizer]:
    model.unfreeze_backbone()
    return [adamw(model)]


def one_for_all_phases(model: FineTuneModel) -> list[torch.optim.Optimizer]:
    optimizer = adamw(model, include_frozen=True)
    train(model, optimizer)
    model.unfreeze_backbone()
    return [optimizer]


def another_group(model: FineTuneModel) -> list[torch.optim.Optimizer]:
    optimizer = plain_sgd(model)
    train(model, optimizer)
    model.unfreeze_backbone()
    optimizer.add_param_group({"params": model.backbone.parameters()})
    return [optimizer]


def two_optimizers(model: FineTuneModel) -> list[torch.optim.Optimizer]:
    first = adamw(model)
    model.unfreeze_backbone()
    return [first, torch.optim.SGD(model.backbone.parameters(), lr=0.1)]


def own_optimizer(model: FineTuneModel) -> list[torch.optim.Optimizer]:
    model.unfreeze_backbone()
    return [torch.optim.SGD(model.parameters(), lr=0.1)]


def fresh_classifier(model: FineTuneModel) -> list[torch.optim.Optimizer]:
    model.unfreeze_backbone()
    model.classifier.reset_parameters()
    model.train()
    return [adamw(model)]


def new_optimizer_after_all(model: FineTuneModel) -> list[torch.optim.Optimizer]:
    adamw(model)
    model.unfreeze_backbone()
    adamw(model)
    return [adamw(model)]


@pytest.mark.parametrize(
    "build",
    [
        new_optimizer,
        one_for_all_phases,
        another_group,
        two_optimizers,
        own_optimizer,
        fresh_classifier,
        new_optimizer_after_all,
    ],
)
def test_nothing_is_said_where_all_that_trains_moves(
    build: Build,
) -> None:
    model = frozen_model()
    optimizers = build(model)
    before = copy.deepcopy(model.state_dict())
    train(model, *optimizers, steps=4)
    model.train()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_every_kind_of_step_is_seen(kind: type[torch.optim.Optimizer], fused: bool) -> None:
    model = frozen_model()
    groups = model.param_groups(lr=0.1)
    optimizer = kind(groups, lr=0.1, fused=fused)
    model.unfreeze_backbone()
    with pytest.warns(UserWarning, match=SAID):
        train(model, optimizer)
    model.freeze_backbone().unfreeze_backbone()
    train(model, kind(model.param_groups(lr=0.1), lr=0.1, fused=fused), steps=3)


def test_gradients_that_are_gathered_over_forwards_are_no_step() -> None:
    model = frozen_model()
    optimizer = adamw(model)
    model.unfreeze_backbone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model(INPUTS).sum().backward()
        model.eval()
        with torch.no_grad():
            model(INPUTS)
        model.train()
    optimizer.step()
    with pytest.warns(UserWarning, match=SAID):
        model(INPUTS)


def test_a_lazy_classifier_is_no_step() -> None:
    model = FineTuneModel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.LazyLinear(2)).freeze_backbone()
    optimizer = torch.optim.SGD(model.classifier.parameters(), lr=0.1)
    model.unfreeze_backbone()
    model(INPUTS)  # it finds its size
    model.train()
    with pytest.warns(UserWarning, match=SAID):
        train(model, optimizer)


def test_a_copy_is_for_itself() -> None:
    model = frozen_model()
    optimizer = adamw(model)
    model.unfreeze_backbone()
    twin = copy.deepcopy(model)
    train(twin, adamw(twin), steps=3)
    loaded = pickle.loads(pickle.dumps(model))
    train(loaded, adamw(loaded), steps=3)
    with pytest.warns(UserWarning, match=SAID):
        train(model, optimizer)


def test_a_compiled_forward_stays_one_graph_and_it_is_said_at_the_next_train() -> None:
    torch.compiler.reset()
    model = frozen_model()
    optimizer = adamw(model)
    model.unfreeze_backbone()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    train(compiled, optimizer, steps=3)
    with pytest.warns(UserWarning, match=SAID):
        model.train()


@pytest.fixture
def mesh() -> Iterator[dist.DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")
@pytest.mark.parametrize("shards_first", [True, False])
def test_sharded_parameters(mesh: dist.DeviceMesh, shards_first: bool) -> None:
    model = frozen_model()
    if shards_first:
        fully_shard(model, mesh=mesh)
        optimizer = adamw(model)
        model.unfreeze_backbone()
    else:
        model.unfreeze_backbone()
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(model.classifier.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=SAID):
        train(model.train(), optimizer)
    model.freeze_backbone().unfreeze_backbone()
    train(model, adamw(model), steps=3)
