"""optuna: each trial trains a copy from the same weights, so the best trial is reproducible."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from client_loops import assert_equal, recipe, reloaded, small_model, train_plainly
from torch import nn
from torch.utils.data import TensorDataset

from backbone_finetune import FineTuneModel

pytest.importorskip("optuna")

pytestmark = [pytest.mark.clients, pytest.mark.usefixtures("one_thread")]


def test_a_trial_equals_a_plain_loop_with_its_parameters(images: TensorDataset, tmp_path: Path) -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def validation_loss(candidate: FineTuneModel, optimizer: torch.optim.Optimizer) -> float:
        groups = candidate.trainable_groups
        assert groups is not None
        with candidate.assert_frozen():
            train_plainly(candidate, images, lambda epoch: groups, optimizer=optimizer)
        inputs, targets = images.tensors
        return nn.functional.cross_entropy(candidate(inputs), targets).item()

    study = recipe("optuna", model=model, validation_loss=validation_loss)["study"]
    assert len(study.trials) == 5
    assert_equal(model.state_dict(), before)
    again = small_model().freeze_backbone(trainable_groups=study.best_params["trainable_groups"])
    lr = study.best_params["lr"]
    assert validation_loss(again, torch.optim.AdamW(again.param_groups(lr=lr, backbone_lr=lr / 10))) == study.best_value
    assert_equal(reloaded(again, tmp_path).state_dict(), again.state_dict())
