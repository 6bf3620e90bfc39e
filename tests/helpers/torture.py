"""Training loops that are hard on a partly frozen model, and a check that no frozen tensor changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import timm.optim
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from backbone_finetune import FineTuneModel

STEPS = 3
WEIGHT_DECAY = 0.1


def _sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)


def _adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=WEIGHT_DECAY)


def _rmsprop(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters, lr=1e-3, weight_decay=WEIGHT_DECAY)


def _lamb(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return timm.optim.Lamb(list(parameters), lr=1e-2, weight_decay=WEIGHT_DECAY)


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd_nesterov": _sgd,
    "rmsprop": _rmsprop,
    "lamb": _lamb,
}


class Circumstance(NamedTuple):
    """What the loop does besides training."""

    freeze_before_step: bool = False
    outer_train: bool = False
    bfloat16: bool = False
    moving_average: bool = False
    checkpointing: bool = False


CIRCUMSTANCES = {
    "plain": Circumstance(),
    "freeze_before_step": Circumstance(freeze_before_step=True),
    "outer_train": Circumstance(outer_train=True),
    "bfloat16": Circumstance(bfloat16=True),
    "moving_average": Circumstance(moving_average=True),
    "checkpointing": Circumstance(checkpointing=True),
}


class Condition(NamedTuple):
    """A way to train: an optimizer, a `zero_grad`, and what else the loop does."""

    optimizer: str
    set_to_none: bool
    circumstance: str

    def __str__(self) -> str:
        return f"{self.optimizer}-{'none' if self.set_to_none else 'zeros'}-{self.circumstance}"


CONDITIONS = [
    Condition(optimizer, set_to_none, circumstance)
    for circumstance in CIRCUMSTANCES
    for set_to_none in (True, False)
    for optimizer in OPTIMIZERS
]


class Outer(nn.Module):
    """A user's module that contains the model and does not handle freezing."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        return self.network(images)


def supports_checkpointing(model: FineTuneModel) -> bool:
    """Return whether the backbone supports checkpointing: timm's networks lack the method or raise AssertionError."""
    backbone: Any = model.backbone
    if not hasattr(backbone, "set_grad_checkpointing"):
        return False
    try:
        backbone.set_grad_checkpointing(True)
    except AssertionError:
        return False
    backbone.set_grad_checkpointing(False)
    return True


def settle(model: FineTuneModel, images: Tensor) -> None:
    """Replace zero-initialized weights, and run a forward, because some networks fill tables in the first."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        model.eval()(images)


def frozen_state(model: FineTuneModel) -> dict[str, Tensor]:
    """Copy every tensor that must not change, found without the library.

    Frozen parameters, and the buffers of each module of which no parameter trains; for a module without parameters
    its owner decides.
    """
    state = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    for path, module in model.named_modules():
        owner = path
        while owner and not any(True for _ in model.get_submodule(owner).parameters()):
            owner = owner.rpartition(".")[0]
        if not any(parameter.requires_grad for parameter in model.get_submodule(owner).parameters()):
            state |= {f"{path}.{name}": b.clone() for name, b in module.named_buffers(recurse=False)}
    return state


def assert_unmoved(model: FineTuneModel, frozen: dict[str, Tensor]) -> None:
    """Compare parameters and buffers bit for bit."""
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # As integers, so that -0.0 differs from 0.0 and NaN equals NaN.
    moved = [name for name, was in frozen.items() if not torch.equal(_bits(now[name]), _bits(was))]
    assert not moved, f"{len(moved)} of {len(frozen)} frozen tensors moved: {', '.join(moved[:5])}"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_all_moved(model: FineTuneModel, start: dict[str, Tensor]) -> None:
    """Assert that trainable weights and running statistics of every layer group changed."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    without = [name for name, parameter in trainable.items() if parameter.grad is None]
    assert not without, f"no gradient: {', '.join(without[:5])}"
    infinite = [name for name, p in trainable.items() if p.grad is not None and not p.grad.isfinite().all()]
    assert not infinite, f"no finite gradient: {', '.join(infinite[:5])}"
    still = [name for name, parameter in trainable.items() if torch.equal(parameter, start[name])]
    assert not still, f"{len(still)} of {len(trainable)} trainable parameters stood still: {', '.join(still[:5])}"
    groups = [(f"backbone.{name}" for name in group.parameter_names) for group in model.layer_groups]
    for names in (*groups, (name for name in trainable if name.startswith("classifier."))):
        gradients = [trainable[name].grad for name in names if name in trainable]
        assert not gradients or any(gradient is not None and gradient.any() for gradient in gradients)
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight.requires_grad:
            assert not torch.equal(module.get_buffer("running_mean"), start[f"{path}.running_mean"]), path


@contextmanager
def without_onednn(*, bfloat16: bool) -> Iterator[None]:
    """Turn off oneDNN in bfloat16: its backward of some convolutions reads uninitialized memory (torch 2.14).

    NaN then depends on memory that was freed before: lambda_resnet's Conv3d, selecsls' last convolutions.
    """
    was = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(was and not bfloat16)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was)


def torture(model: FineTuneModel, images: Tensor, condition: Condition) -> None:
    """Train three steps under one condition; raise AssertionError unless only trainable tensors changed."""
    does = CIRCUMSTANCES[condition.circumstance]
    # Half of them, rounded up: the last group may be a final norm alone (convnext, swin), and blocks must train
    # next to frozen ones.
    model.freeze_backbone(trainable_groups=(len(model.layer_groups) + 1) // 2)
    assert {p.requires_grad for p in model.backbone.parameters() if p.ndim > 1} == {True, False}
    # A plain loop's optimizer has all parameters, so weight decay would change all of them.
    optimizer = OPTIMIZERS[condition.optimizer](model.parameters())
    whole = Outer(model) if does.outer_train else model
    average = ModelEmaV3(model, decay=0.5) if does.moving_average else None
    if does.checkpointing:
        model.set_grad_checkpointing()
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    start |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    frozen = frozen_state(model)
    labels = torch.arange(len(images))
    for step in range(STEPS):
        if does.outer_train:
            with torch.no_grad():
                whole.eval()(images)
        whole.train()
        optimizer.zero_grad(set_to_none=condition.set_to_none)
        with without_onednn(bfloat16=does.bfloat16):
            with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=does.bfloat16):
                logits = whole(images + 0.1 * step)
                # With label smoothing, because a network that fits its two images would have no gradient.
                loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)  # the first step of some networks is large
        if does.freeze_before_step and step == 1:  # momentum and a gradient of this step exist
            model.freeze_backbone()
            frozen = frozen_state(model)
        optimizer.step()
        if average is not None:
            average.update(model)
    assert_unmoved(model, frozen)
    assert_all_moved(model, start)
    if average is not None:
        assert isinstance(average.module, FineTuneModel)
        assert_unmoved(average.module, frozen)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        averaged = dict(average.module.named_parameters())
        assert not any(torch.equal(averaged[name], start[name]) for name in names)
