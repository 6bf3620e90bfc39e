"""A warning for parameters that were unfrozen after the optimizer was built, once, and only if they are in none."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from backbone_finetune import FineTuneModel
from backbone_finetune.guards.step_watch import STEPS

Build = Callable[[FineTuneModel], list[torch.optim.Optimizer]]

INPUTS = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
WARNING = (
    r"4 parameters were unfrozen \(backbone\.0\.weight, .* and 1 more\) but are in no optimizer.*include_frozen=True"
)


def frozen_model() -> FineTuneModel:
    return FineTuneModel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2)).freeze_backbone()


def adamw(model: FineTuneModel, **keywords: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.param_groups(lr=0.1, weight_decay=0.1, **keywords))


def plain_sgd(model: FineTuneModel) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def train(model: Callable[[Tensor], Tensor], *optimizers: torch.optim.Optimizer, steps: int = STEPS) -> None:
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(INPUTS).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_unfreezing_after_the_optimizer_was_built_warns_once() -> None:
    model = frozen_model()
    optimizer = adamw(model)
    train(model, optimizer)
    model.unfreeze_backbone()
    before = model.backbone[0].weight.clone()
    train(model, optimizer, steps=STEPS - 1)
    with pytest.warns(UserWarning, match=WARNING) as caught:
        train(model, optimizer, steps=4)
    assert [warning.filename for warning in caught] == [__file__]
    assert torch.equal(model.backbone[0].weight, before)
    model.train()
    train(model, optimizer)


def test_unfreezing_by_hand_warns_after_the_next_train() -> None:
    model = frozen_model()
    optimizer = adamw(model)
    model.backbone.requires_grad_(True)
    model.train()
    with pytest.warns(UserWarning, match=WARNING):
        train(model, optimizer)


def test_freezing_does_not_warn() -> None:
    model = frozen_model()
    optimizer = plain_sgd(model)
    model.classifier.requires_grad_(False)
    model.unfreeze_backbone()
    with pytest.warns(UserWarning, match=WARNING):
        train(model, optimizer)


def test_an_optimizer_of_a_part_does_not_warn() -> None:
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
def test_no_warning_if_every_trainable_parameter_is_in_an_optimizer(
    build: Build,
) -> None:
    model = frozen_model()
    optimizers = build(model)
    before = copy.deepcopy(model.state_dict())
    train(model, *optimizers)
    model.train()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_steps_of_every_kind_are_seen(kind: type[torch.optim.Optimizer], fused: bool) -> None:
    model = frozen_model()
    groups = model.param_groups(lr=0.1)
    optimizer = kind(groups, lr=0.1, fused=fused)
    model.unfreeze_backbone()
    with pytest.warns(UserWarning, match=WARNING):
        train(model, optimizer)
    model.freeze_backbone().unfreeze_backbone()
    train(model, kind(model.param_groups(lr=0.1), lr=0.1, fused=fused))


def test_two_alternating_optimizers() -> None:
    model = frozen_model()
    first = plain_sgd(model)
    model.unfreeze_backbone()
    second = torch.optim.SGD(model.backbone.parameters(), lr=0.1)
    for _ in range(3):
        train(model, first, steps=5)
        train(model, second, steps=1)


@pytest.mark.parametrize("fused", [False, True])
def test_a_rate_of_0(fused: bool) -> None:
    model = frozen_model().unfreeze_backbone()
    groups = [{"params": model.backbone.parameters(), "lr": 0.0}, {"params": model.classifier.parameters()}]
    train(model, torch.optim.SGD(groups, lr=0.1, fused=fused), steps=2 * STEPS)


def test_a_part_that_no_forward_uses() -> None:
    class Picky(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            features: Tensor = self[0](inputs)
            return features

    model = FineTuneModel(Picky(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2)).freeze_backbone()
    model.unfreeze_backbone()
    train(model, plain_sgd(model), steps=2 * STEPS)
    assert model.backbone[1].weight.grad is None


def test_parameters_that_are_frozen_again_do_not_warn() -> None:
    model = frozen_model()
    optimizer = adamw(model)
    model.unfreeze_backbone()
    train(model, optimizer, steps=STEPS - 1)
    model.backbone.requires_grad_(False)
    train(model, optimizer, steps=STEPS)


def test_forwards_and_steps_of_another_model_do_not_count() -> None:
    model, other = frozen_model(), frozen_model()
    optimizer = adamw(model)
    model.unfreeze_backbone()
    train(other, adamw(other), steps=2 * STEPS)
    for _ in range(2 * STEPS):
        model(INPUTS).sum().backward()
    model.eval()
    with torch.no_grad():
        model(INPUTS)
    model.train()
    train(model, optimizer, steps=STEPS - 1)
    with pytest.warns(UserWarning, match=WARNING):
        optimizer.step()


def test_a_deleted_model_is_freed() -> None:
    model = frozen_model()
    model.unfreeze_backbone()
    dropped = weakref.ref(model.backbone[0].weight)
    del model
    assert dropped() is None


def test_a_compiled_step_runs() -> None:
    torch.compiler.reset()
    model = frozen_model()
    optimizer = plain_sgd(model)
    model.unfreeze_backbone()
    model(INPUTS).sum().backward()
    before = model.classifier.weight.clone()
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2 * STEPS):
        step()
    assert not torch.equal(model.classifier.weight, before)


def test_initializing_a_lazy_classifier_does_not_warn() -> None:
    model = FineTuneModel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.LazyLinear(2)).freeze_backbone()
    optimizer = torch.optim.SGD(model.classifier.parameters(), lr=0.1)
    model.unfreeze_backbone()
    model(INPUTS)  # initializes it
    model.train()
    with pytest.warns(UserWarning, match=WARNING):
        train(model, optimizer)


def test_a_copy_is_independent() -> None:
    model = frozen_model()
    optimizer = adamw(model)
    model.unfreeze_backbone()
    twin = copy.deepcopy(model)
    train(twin, adamw(twin))
    loaded = pickle.loads(pickle.dumps(model))
    train(loaded, adamw(loaded))
    with pytest.warns(UserWarning, match=WARNING):
        train(model, optimizer)


def test_a_compiled_forward_stays_one_graph() -> None:
    torch.compiler.reset()
    model = frozen_model()
    optimizer = adamw(model)
    model.unfreeze_backbone()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.warns(UserWarning, match=WARNING):
        train(compiled, optimizer)


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
    with pytest.warns(UserWarning, match=WARNING):
        train(model.train(), optimizer)
    model.freeze_backbone().unfreeze_backbone()
    train(model, adamw(model))
