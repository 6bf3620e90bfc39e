"""skorch: groups by epoch, its files, and scikit-learn's grid search, which copies the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from client_loops import BATCH_SIZE, DEEPEST, EPOCHS, assert_equal, groups_at, recipe, small_model, train_plainly
from torch import nn
from torch.utils.data import TensorDataset

from backbone_finetune import FineTuneModel

pytest.importorskip("skorch")
from sklearn.model_selection import GridSearchCV

pytestmark = [pytest.mark.clients, pytest.mark.usefixtures("one_thread")]


def make_net(model: FineTuneModel, **arguments: Any) -> Any:
    names = recipe("skorch", groups_at=groups_at)
    given = {"criterion": nn.CrossEntropyLoss, "optimizer": torch.optim.AdamW, "lr": 1e-3, "batch_size": BATCH_SIZE}
    given |= {"callbacks": [names["TrainableGroups"]()], "max_epochs": EPOCHS, "train_split": None, "verbose": 0}
    return names["FineTuneClassifier"](model, **{**given, **arguments})


def plainly(images: TensorDataset, lr: float = 1e-3) -> FineTuneModel:
    model = small_model()
    optimizer = torch.optim.AdamW(model.param_groups(lr=lr, include_frozen=True))
    return train_plainly(model, images, groups_at, optimizer=optimizer)


def test_groups_by_epoch_equal_a_plain_loop(images: TensorDataset, tmp_path: Path) -> None:
    model, plain = small_model(), plainly(images)
    inputs, targets = images.tensors
    with model.freeze_backbone(trainable_groups=DEEPEST).assert_frozen():
        net = make_net(model).fit(inputs, targets.numpy())
        predicted = net.predict_proba(inputs)
    assert_equal(model.state_dict(), plain.state_dict())
    net.save_params(f_params=tmp_path / "saved.pt")
    again = make_net(small_model()).initialize()
    again.load_params(f_params=tmp_path / "saved.pt")
    assert (again.predict_proba(inputs) == predicted).all()
    expected = plain(inputs).softmax(1).detach()
    torch.testing.assert_close(torch.from_numpy(predicted), expected, rtol=0, atol=1e-5)


def test_a_grid_search_does_not_change_the_model(images: TensorDataset) -> None:
    model = small_model().freeze_backbone()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs, targets = images.tensors
    search = GridSearchCV(make_net(model), {"lr": [1e-3, 1e-5]}, cv=2, scoring="accuracy")
    search.fit(inputs.numpy(), targets.numpy())
    assert_equal(model.state_dict(), before)
    assert model.trainable_groups == 0
    best = search.best_estimator_.module_
    assert best is not model
    assert_equal(best.state_dict(), plainly(images, search.best_params_["lr"]).state_dict())
