"""Lightning: trainable groups by epoch, resuming within an epoch, weight averaging, two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from client_loops import (
    BATCH_SIZE,
    DEEPEST,
    assert_equal,
    groups_at,
    recipe,
    run_two_processes,
    small_model,
    train_plainly,
)
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")
import lightning
from client_lightning import fit
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging

pytestmark = [
    pytest.mark.clients,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),  # Lightning uses torch's old name
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start"),  # frozen modules are meant to be
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty"),  # the run resumes into it
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # the images are in memory
]


def by_epoch() -> lightning.Callback:
    callback: lightning.Callback = recipe("Lightning", groups_at=groups_at)["TrainableGroups"]()
    return callback


class Watch(lightning.Callback):
    """Record what trains in each step, and the weights at the start of each epoch."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int | None]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.weights.append({name: tensor.detach().clone() for name, tensor in module.model.named_parameters()})

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: object, index: int
    ) -> None:
        self.steps.append((trainer.current_epoch, module.model.trainable_groups))


def test_groups_by_epoch_equal_a_plain_loop(images: TensorDataset) -> None:
    model = small_model()
    with model.freeze_backbone(trainable_groups=DEEPEST).assert_frozen():
        fit(model, by_epoch())
    assert model.trainable_groups == DEEPEST
    assert_equal(model.state_dict(), train_plainly(small_model(), images, groups_at).state_dict())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")  # intended
@pytest.mark.parametrize(("stop", "steps"), [("every_n_epochs", 4), ("every_n_train_steps", 6)])
def test_a_resumed_run_trains_the_groups_of_its_epoch(
    images: TensorDataset, tmp_path: Path, stop: str, steps: int
) -> None:
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **{stop: 1 if steps == 4 else steps})
    fit(small_model(), by_epoch(), saving, epochs=2)
    model, watch = small_model(), Watch()
    with model.freeze_backbone(trainable_groups=DEEPEST).assert_frozen():
        model.freeze_backbone()
        fit(model, by_epoch(), saving, watch, ckpt_path=str(tmp_path / f"step={steps}.ckpt"))
    assert watch.steps == [(1, 1)] * (8 - steps) + [(2, 2)] * 4  # four steps per epoch
    if stop == "every_n_epochs":  # Lightning restarts the data of an epoch, also when it resumes within the epoch
        assert_equal(model.state_dict(), train_plainly(small_model(), images, groups_at).state_dict())


def test_a_checkpoint_loads_into_a_model_outside_lightning(images: TensorDataset, tmp_path: Path) -> None:
    model = small_model()
    fit(model, by_epoch(), ModelCheckpoint(tmp_path, filename="last"))
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    other = small_model()
    other.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()}, strict=True)
    assert torch.equal(other.eval()(images.tensors[0]), model.eval()(images.tensors[0]))


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step")  # its extra epoch takes no step
def test_weight_averaging_changes_only_trainable_tensors(images: TensorDataset) -> None:
    model, watch = small_model(), Watch()
    averaging = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, annealing_epochs=1)
    with model.freeze_backbone(trainable_groups=DEEPEST).assert_frozen():
        fit(model, by_epoch(), watch, averaging)
    expected = small_model().freeze_backbone(trainable_groups=DEEPEST)
    with torch.no_grad():
        for name, tensor in expected.named_parameters():
            tensor.copy_(torch.stack([weights[name] for weights in watch.weights[:3]]).mean(0))
    update_bn(DataLoader(images, BATCH_SIZE), expected)
    assert_equal(model.state_dict(), expected.state_dict(), atol=1e-6)
    assert not torch.equal(model.classifier.weight, watch.weights[2]["classifier.weight"])


def test_an_exponential_average_does_not_change_frozen_tensors(images: TensorDataset) -> None:
    model, plain = small_model(), train_plainly(small_model(), images, groups_at)
    averaging = WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.9))
    with model.freeze_backbone(trainable_groups=DEEPEST).assert_frozen():
        fit(model, by_epoch(), averaging)
    assert not torch.equal(model.classifier.weight, plain.classifier.weight)


def test_unfreezing_within_a_fit_on_two_processes(tmp_path: Path) -> None:
    run_two_processes("client_lightning.py", tmp_path / "log")  # the first process starts the second
