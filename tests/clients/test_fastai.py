"""fastai: `freeze_to` and one cycle with our layer groups; its default undoes the freezing."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from client_loops import BATCH_SIZE, assert_equal, recipe, small_images, small_model, train_plainly
from torch.utils.data import TensorDataset

pytest.importorskip("fastai")
with warnings.catch_warnings():  # its import calls deprecated functions of torch and pandas
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "The 'mode.chained_assignment' option is deprecated")
    import fastai.callback.schedule
    import fastai.learner
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.optimizer import OptimWrapper

from backbone_finetune import FineTuneModel

pytestmark = [pytest.mark.clients, pytest.mark.usefixtures("one_thread")]


def loaders() -> DataLoaders:
    return DataLoaders(*(DataLoader(small_images(), bs=BATCH_SIZE, num_workers=0) for _ in range(2)), device="cpu")


def run_recipe(model: FineTuneModel) -> dict[str, Any]:
    return recipe("fastai", dls=loaders(), model=model)


def make_learner(model: FineTuneModel, **arguments: Any) -> fastai.learner.Learner:
    names = run_recipe(small_model())
    splits = {"loss_func": names["nn"].CrossEntropyLoss(), "splitter": names["by_layer_group"]}
    return fastai.learner.Learner(loaders(), model, **{**splits, "train_bn": False, **arguments})


def test_one_cycle_trains_each_of_the_last_groups_at_its_rate(images: TensorDataset) -> None:
    model = small_model().freeze_backbone(trainable_groups=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with model.assert_frozen():
        learner = run_recipe(model)["learner"]
    assert model.trainable_groups == 1
    moved = {name.split(".")[1] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"layer4", "weight", "bias"}
    rates = [group["lr"] for group in learner.opt.hypers]
    assert len(rates) == len(model.layer_groups) + 1
    assert [rate / rates[-1] for rate in rates] == pytest.approx([10 ** (-2 + 2 * index / 5) for index in range(6)])


# Its `load` calls a deprecated function of numpy.
@pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")
def test_groups_that_fastai_freezes_equal_a_plain_loop(images: TensorDataset, tmp_path: Path) -> None:
    model, plain = small_model(), small_model()
    learner = make_learner(model, opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), wd=0.1, path=tmp_path)
    learner.freeze_to(-3)
    with model.assert_frozen():
        for phase in range(3):
            learner.freeze_to(-1 - phase)
            assert model.trainable_groups == phase
            learner.fit(1, 1e-3)
            optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.1)  # fastai resets its state
            train_plainly(plain, images, lambda epoch, groups=phase: groups, optimizer=optimizer, epochs=1)
    assert_equal(model.state_dict(), plain.state_dict())
    learner.save("saved")
    again = make_learner(small_model(), path=tmp_path).load("saved", with_opt=False)
    assert_equal(again.model.state_dict(), plain.state_dict())


def test_its_default_undoes_the_freezing_and_assert_frozen_raises(images: TensorDataset) -> None:
    model = small_model().freeze_backbone()
    learner = make_learner(model, train_bn=True)

    def fit() -> None:
        with model.assert_frozen():
            learner.freeze_to(-1)
            learner.fit(1)

    with pytest.raises(AssertionError, match=r"stem: backbone\.bn1\.bias.*unfrozen inside"):
        fit()
