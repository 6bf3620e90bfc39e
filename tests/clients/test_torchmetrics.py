"""torchmetrics: its values are correct, and measuring does not change the training."""

from __future__ import annotations

from pathlib import Path

import pytest
from client_loops import (
    BATCH_SIZE,
    assert_equal,
    groups_at,
    make_optimizer,
    recipe,
    reloaded,
    small_model,
    train_plainly,
)
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("torchmetrics")

pytestmark = [pytest.mark.clients, pytest.mark.usefixtures("one_thread")]


def test_metrics_between_epochs_are_correct_and_change_no_weight(images: TensorDataset, tmp_path: Path) -> None:
    model, plain = small_model(), train_plainly(small_model(), images, groups_at)
    optimizer = make_optimizer(model)
    for epoch in range(3):
        model.freeze_backbone(trainable_groups=groups_at(epoch))
        with model.assert_frozen():
            train_plainly(model, images, lambda _, at=epoch: groups_at(at), optimizer=optimizer, epochs=1)
            values = recipe("torchmetrics", model=model, loader=DataLoader(images, BATCH_SIZE))["values"]
    assert_equal(model.state_dict(), plain.state_dict())
    inputs, targets = images.tensors
    right = plain(inputs).argmax(1) == targets  # classes are equally frequent, so the mean over classes is the accuracy
    assert values["MulticlassAccuracy"].item() == pytest.approx(right.float().mean().item())
    again = recipe("torchmetrics", model=reloaded(model, tmp_path), loader=DataLoader(images, BATCH_SIZE))
    assert again["values"] == values
