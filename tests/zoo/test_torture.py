"""Frozen tensors do not change under any training loop: one architecture per timm family, every condition."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from timm_families import REPRESENTATIVE, SMALL
from torch import Tensor
from torture import CIRCUMSTANCES, CONDITIONS, OPTIMIZERS, Condition, settle, supports_checkpointing, torture

from backbone_finetune import FineTuneModel, freezing

# Two conditions for each family. 7 and 48 are coprime, so every condition occurs.
SHARE = [
    (name, condition)
    for position, name in enumerate(SMALL)
    for condition in (CONDITIONS[(7 * (2 * position + turn)) % len(CONDITIONS)] for turn in range(2))
]
IN_TIERS = [
    pytest.param(name, condition, id=f"{name}-{condition}", marks=() if name in REPRESENTATIVE else pytest.mark.zoo)
    for name, condition in SHARE
]


@lru_cache(maxsize=1)  # grouped by family
def settled_model(name: str) -> tuple[FineTuneModel, Tensor]:
    family = SMALL[name]
    images = family.images()
    model = FineTuneModel.from_timm(family.architecture, num_classes=5, **family.keywords)
    settle(model, images)
    return model, images


# The smallest architecture has no gradient checkpointing in timm.
WITHOUT_CHECKPOINTING = {
    "coat",
    "convit",
    "crossvit",
    "cspnet",
    "dla",
    "hrnet",
    "inception_v3",
    "inception_v4",
    "pit",
    "selecsls",
    "senet",
    "sequencer",
    "twins",
    "xception",
}


def run(name: str, condition: Condition) -> None:
    model, images = settled_model(name)
    if CIRCUMSTANCES[condition.circumstance].checkpointing:
        assert supports_checkpointing(model) == (name not in WITHOUT_CHECKPOINTING)
        if name in WITHOUT_CHECKPOINTING:
            pytest.skip(f"timm's {SMALL[name].architecture} has no gradient checkpointing")
    torture(copy.deepcopy(model), images, condition)


@pytest.mark.parametrize(("name", "condition"), IN_TIERS)
def test_frozen_tensors_are_constant_and_the_rest_trains(name: str, condition: Condition) -> None:
    run(name, condition)


@pytest.mark.slow
@pytest.mark.parametrize("condition", CONDITIONS, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_every_family_under_every_condition(name: str, condition: Condition) -> None:
    run(name, condition)


def test_the_default_cases_cover_all_conditions() -> None:
    assert {name for name, _ in SHARE} == set(SMALL)
    families = {condition: {name for name, other in SHARE if other == condition} for condition in CONDITIONS}
    assert min(map(len, families.values())) >= 3


class KeepsGradients(FineTuneModel):
    """A model that breaks the rule: gradients of frozen parameters stay."""

    def train(self, mode: bool = True) -> KeepsGradients:
        gradients = [(parameter, parameter.grad) for parameter in self.parameters()]
        super().train(mode)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        return self


class FollowsEveryMode(FineTuneModel):
    """A model that breaks the rule: its frozen part follows `train()`, as in any plain module."""

    def train(self, mode: bool = True) -> FollowsEveryMode:
        torch.nn.Module.train(self, mode)
        freezing.drop_frozen_gradients(self)
        return self


@pytest.mark.parametrize("circumstance", CIRCUMSTANCES)
def test_the_check_fails_if_eval_mode_is_not_applied_again(circumstance: str) -> None:
    broken = FollowsEveryMode.from_timm("test_resnet", num_classes=5)
    settle(broken, images := SMALL["resnet"].images())
    with pytest.raises(AssertionError, match=r"frozen tensors moved: .*running_mean"):
        torture(broken, images, Condition("adamw", True, circumstance))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_check_fails_if_gradients_are_kept(optimizer: str, set_to_none: bool) -> None:
    broken = KeepsGradients.from_timm("test_resnet", num_classes=5)
    settle(broken, images := SMALL["resnet"].images())
    with pytest.raises(AssertionError, match=r"frozen tensors moved: .*weight"):
        torture(broken, images, Condition(optimizer, set_to_none, "freeze_before_step"))


def test_the_check_fails_if_gradients_do_not_flow() -> None:
    broken = FineTuneModel.from_timm("test_resnet", num_classes=5)
    settle(broken, images := SMALL["resnet"].images())
    broken.classifier.register_forward_pre_hook(lambda module, features: features[0].detach())
    with pytest.raises(AssertionError, match="no gradient: backbone"):
        torture(broken, images, Condition("adamw", True, "plain"))
