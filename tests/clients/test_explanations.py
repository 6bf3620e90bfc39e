"""captum and grad-cam: attributions of a frozen model equal those of the trainable model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from client_loops import recipe, reloaded, small_model, train_plainly
from torch.utils.data import TensorDataset

pytest.importorskip("captum")
pytest.importorskip("pytorch_grad_cam")
from captum.attr import IntegratedGradients

pytestmark = [pytest.mark.clients, pytest.mark.usefixtures("one_thread")]


def test_attributions_of_a_frozen_model_equal_those_of_a_trainable_one(images: TensorDataset, tmp_path: Path) -> None:
    model = small_model().freeze_backbone()
    with model.assert_frozen():
        train_plainly(model, images)
    other = reloaded(model, tmp_path).unfreeze_backbone()
    inputs, targets = (tensor[:4] for tensor in images.tensors)
    with model.assert_frozen():
        frozen = recipe("captum and grad-cam", model=model, images=inputs.clone(), targets=targets)
        gradients = IntegratedGradients(model).attribute(inputs, target=targets, n_steps=4)
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    trains = recipe("captum and grad-cam", model=other, images=inputs.clone(), targets=targets)
    for name in ("attributions", "maps"):
        explained, expected = (torch.as_tensor(names[name]).detach() for names in (frozen, trains))
        assert expected.flatten(1).std(1).min() > 0
        torch.testing.assert_close(explained, expected)
    expected = IntegratedGradients(other.to_module()).attribute(inputs, target=targets, n_steps=4)
    torch.testing.assert_close(gradients, expected)
