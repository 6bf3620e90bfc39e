"""One optimizer and scheduler through all phases; properties of groups and freezing for random networks."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from backbone_finetune import FineTuneModel

PHASES = (0, 1, 3, 5, 2, 0)  # numbers of trainable layer groups


class Training(NamedTuple):
    """The objects that are used in all phases."""

    model: FineTuneModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    def phase(self, trainable_groups: int, seed: int) -> None:
        """Freeze, then train two steps."""
        self.model.freeze_backbone(trainable_groups=trainable_groups)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(2):
            self.model.train()
            self.optimizer.zero_grad()
            self.model(torch.randn(4, 3, 32, 32, generator=generator)).square().mean().backward()
            self.optimizer.step()
        self.scheduler.step()

    def state_dicts(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._asdict().items()}


def start(optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW) -> Training:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3).freeze_backbone()
    groups = model.param_groups(lr=1e-2, backbone_lr=1e-3, weight_decay=0.05, layer_decay=0.75, include_frozen=True)
    optimizer = optimizer_class(groups)
    return Training(model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5))


def test_groups_are_the_same_whatever_is_frozen() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3)

    def groups() -> list[tuple[Any, ...]]:
        found = model.param_groups(lr=1e-2, weight_decay=0.05, layer_decay=0.75, include_frozen=True)
        return [(g["name"], g["lr"], g["weight_decay"], g["param_names"], [id(p) for p in g["params"]]) for g in found]

    expected = groups()
    assert sum(len(ids) for *_, ids in expected) == len(list(model.parameters()))
    for trainable_groups in PHASES:
        model.freeze_backbone(trainable_groups=trainable_groups)
        assert groups() == expected


def test_one_optimizer_and_one_scheduler_work_through_every_unfreezing() -> None:
    training = start()
    rates = [[group["lr"] for group in training.optimizer.param_groups]]
    state: dict[str, dict[str, Tensor]] = {}
    for seed, trainable_groups in enumerate(PHASES):
        before = {name: parameter.detach().clone() for name, parameter in training.model.named_parameters()}
        averages = {name: entries["exp_avg"].clone() for name, entries in state.items()}
        training.phase(trainable_groups, seed)
        rates.append([group["lr"] for group in training.optimizer.param_groups])
        for name, parameter in training.model.named_parameters():
            entries = training.optimizer.state.get(parameter, {})
            if name in state:
                assert entries is state[name], "the state was thrown away"
            if parameter.requires_grad:
                assert not torch.equal(parameter, before[name]), name
                state[name] = entries
            else:
                assert torch.equal(parameter, before[name]), name
                assert name not in state or torch.equal(entries["exp_avg"], averages[name]), name
    assert state.keys() == before.keys()  # every part trained in some phase
    for earlier, later in pairwise(rates):
        assert later == pytest.approx([rate / 2 for rate in earlier])


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("cut", [1, 4])  # while unfreezing, and while freezing again
def test_resuming_in_any_phase_is_exact(optimizer_class: type[torch.optim.Optimizer], cut: int) -> None:
    uninterrupted = start(optimizer_class)
    resumed = start(optimizer_class)
    for seed, trainable_groups in enumerate(PHASES):
        if seed == cut:
            file = io.BytesIO()
            torch.save(uninterrupted.state_dicts(), file)
            file.seek(0)
            for name, saved in torch.load(file, weights_only=True).items():
                getattr(resumed, name).load_state_dict(saved)
        uninterrupted.phase(trainable_groups, seed)
        if seed >= cut:
            resumed.phase(trainable_groups, seed)
    theirs = uninterrupted.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in resumed.model.state_dict().items())
    assert [g["lr"] for g in resumed.optimizer.param_groups] == [g["lr"] for g in uninterrupted.optimizer.param_groups]


def test_a_new_optimizer_for_each_phase_has_only_trainable_parameters() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3)
    for trainable_groups in PHASES:
        model.freeze_backbone(trainable_groups=trainable_groups)
        held = [parameter for group in model.param_groups(lr=1e-3) for parameter in group["params"]]
        assert sorted(map(id, held)) == sorted(id(p) for p in model.parameters() if p.requires_grad)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "tied": lambda: nn.Linear(4, 4),
    "norm": lambda: nn.LayerNorm(4),
    "statistics": lambda: nn.BatchNorm1d(4),
    "nothing": nn.Dropout,
}


class Tied(nn.Module):
    """Layers: some share their weight, some have equal values, some have statistics, some no parameters."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        shared = nn.Linear(4, 4)
        for kind in kinds:
            layer = LAYERS[kind]()
            if kind == "tied":
                layer.register_parameter("weight", shared.weight)
            self.add_module(f"part{len(self._modules)}", layer)  # each is a separate layer group


NETWORKS = st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=6)


@given(
    kinds=NETWORKS,
    flips=st.lists(st.booleans(), min_size=16, max_size=16),
    layer_decay=st.sampled_from([None, 0.75]),
    weight_decay=st.sampled_from([0.0, 0.05]),
    include_frozen=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_groups_have_exactly_the_trainable_parameters_once(
    kinds: list[str], flips: list[bool], layer_decay: float | None, weight_decay: float, include_frozen: bool
) -> None:
    model = FineTuneModel(Tied(kinds), nn.Linear(4, 2))
    for parameter, flip in zip(model.parameters(), flips, strict=False):
        parameter.requires_grad_(flip)
    expected = {id(p): name for name, p in model.named_parameters() if include_frozen or p.requires_grad}
    if not expected:
        with pytest.raises(ValueError, match="no parameter trains"):
            model.param_groups(lr=0.1, layer_decay=layer_decay)
        return
    groups = model.param_groups(
        lr=0.1, layer_decay=layer_decay, weight_decay=weight_decay, include_frozen=include_frozen
    )
    held = [parameter for group in groups for parameter in group["params"]]
    assert len(held) == len(expected)
    assert {id(parameter) for parameter in held} == expected.keys()
    named = {id(p): name for g in groups for p, name in zip(g["params"], g["param_names"], strict=True)}
    assert named == expected
    assert len({group["name"] for group in groups}) == len(groups)
    torch.optim.SGD(groups)


def settled_state(model: FineTuneModel) -> list[Any]:
    return [
        *(module.training for module in model.modules()),
        *(parameter.requires_grad for parameter in model.parameters()),
        *(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad),
    ]


@given(
    kinds=NETWORKS,
    history=st.lists(st.tuples(st.sampled_from(["freeze", "unfreeze", "flip", "mode", "grad"]), st.integers(0, 40))),
    last=st.integers(0, 40),
    mode=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_freezing_does_not_depend_on_earlier_states(
    kinds: list[str], history: list[tuple[str, int]], last: int, mode: bool
) -> None:
    fresh = FineTuneModel(Tied(kinds), nn.Linear(4, 2))
    model = copy.deepcopy(fresh)
    groups = len(model.layer_groups)
    parameters = list(model.backbone.parameters())
    for action, number in history:
        if action == "freeze":
            model.freeze_backbone(trainable_groups=number % (groups + 1))
        elif action == "unfreeze":
            model.unfreeze_backbone()
        elif action == "flip":
            parameter = parameters[number % len(parameters)]
            parameter.requires_grad_(not parameter.requires_grad)
        elif action == "mode":
            model.train(bool(number % 2))
        else:
            parameters[number % len(parameters)].grad = torch.ones_like(parameters[number % len(parameters)])
    trainable_groups = last % (groups + 1)
    model.train(mode).freeze_backbone(trainable_groups=trainable_groups)
    expected = settled_state(fresh.freeze_backbone(trainable_groups=trainable_groups).train(mode))
    assert settled_state(model) == expected
    assert settled_state(model.freeze_backbone(trainable_groups=trainable_groups)) == expected
    assert list(map(id, model.backbone.parameters())) == list(map(id, parameters))
