"""Gradients in a partly frozen network: to the input, and with gradient checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import timm.layers
import torch
from timm_families import FAMILIES
from torch import Tensor
from torture import settle

from backbone_finetune import FineTuneModel


@pytest.mark.parametrize("trainable_groups", [0, 1])
@pytest.mark.parametrize("name", ["resnet", "vision_transformer", "maxxvit", "levit"])
def test_gradients_reach_the_image_through_a_frozen_backbone(name: str, trainable_groups: int) -> None:
    """For saliency maps and adversarial examples: the forward does not use `no_grad`."""
    family = FAMILIES[name]
    model = FineTuneModel.from_timm(family.architecture, num_classes=3, norm_eval=True, **family.keywords)
    settle(model, images := family.images())
    model.freeze_backbone(trainable_groups=trainable_groups).eval()
    images.requires_grad_()
    model(images)[:, 0].sum().backward()
    assert images.grad is not None
    ours = images.grad.clone()
    assert ours.isfinite().all()
    assert ours.flatten(1).any(dim=1).all(), "an image without a gradient"
    for parameter in model.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
    images.grad = None
    model.unfreeze_backbone().eval()(images)[:, 0].sum().backward()
    torch.testing.assert_close(ours, images.grad)


def gradients(model: FineTuneModel, images: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    torch.manual_seed(0)  # the same paths are dropped in each forward
    model(images).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("name", "smaller"),
    [("resnet", {}), ("vision_transformer", {}), ("maxxvit", {}), ("swin_transformer", {"embed_dim": 24})],
)
def test_gradient_checkpointing_above_a_frozen_stem(name: str, smaller: dict[str, Any]) -> None:
    family = FAMILIES[name]
    model = FineTuneModel.from_timm(family.architecture, num_classes=3, norm_eval=True, **family.keywords, **smaller)
    settle(model, images := family.images())
    for trainable_groups in (len(model.layer_groups) - 1, 2, 0):
        model.freeze_backbone(trainable_groups=trainable_groups).train()
        plain = gradients(model, images)
        model.set_grad_checkpointing()
        checkpointed = gradients(model, images)
        model.set_grad_checkpointing(False)
        assert all(gradient is not None and gradient.isfinite().all() for gradient in checkpointed.values())
        assert checkpointed.keys() == plain.keys()
        for key, gradient in plain.items():
            torch.testing.assert_close(checkpointed[key], gradient, msg=key)


# torch warns about the case that is tested here.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_reentrant_checkpointing_loses_gradients() -> None:
    """If this fails, torch's reentrant checkpointing supports parameters as sources of gradients."""
    model = FineTuneModel.from_timm("test_vit", num_classes=3, img_size=32).freeze_backbone(trainable_groups=6)
    model.set_grad_checkpointing()
    assert all(gradient is not None for gradient in gradients(model, torch.randn(2, 3, 32, 32)).values())
    timm.layers.set_reentrant_ckpt(True)
    try:
        lost = gradients(model, torch.randn(2, 3, 32, 32))
    finally:
        timm.layers.set_reentrant_ckpt(False)
    assert lost["backbone.blocks.0.attn.qkv.weight"] is None
