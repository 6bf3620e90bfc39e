"""transformers' Trainer: groups by epoch, resuming, the best model, checkpointing, label smoothing; a hub folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from client_loops import (
    DEEPEST,
    EPOCHS,
    TORCHRUN,
    assert_equal,
    groups_at,
    recipe,
    run_two_processes,
    small_model,
    train_plainly,
)
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

pytest.importorskip("transformers")
from client_trainer import make_trainer
from transformers import TrainerCallback

pytestmark = [pytest.mark.clients, pytest.mark.usefixtures("one_thread")]


def test_groups_by_epoch_equal_a_plain_loop(images: TensorDataset, tmp_path: Path) -> None:
    model, plain = small_model(), train_plainly(small_model(), images, groups_at)
    trainer = make_trainer(model, images)
    with model.freeze_backbone(trainable_groups=DEEPEST).assert_frozen():
        trainer.train()
        metrics = trainer.evaluate()
    assert_equal(model.state_dict(), plain.state_dict())
    inputs, targets = images.tensors
    assert metrics["eval_accuracy"] == pytest.approx((plain(inputs).argmax(1) == targets).float().mean().item())
    trainer.save_model(str(tmp_path / "saved"))
    again = small_model()
    wrapped = recipe("transformers")["ForTrainer"](again)
    wrapped.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"), strict=True)
    assert torch.equal(again.eval()(inputs), plain(inputs))


@pytest.mark.parametrize("steps", [4, 6, 10])  # four steps per epoch: between epochs, and within two epochs
def test_a_resumed_run_trains_the_groups_of_its_epoch(images: TensorDataset, steps: int) -> None:
    saving = {"save_strategy": "steps", "save_steps": steps}
    make_trainer(small_model(), images, **saving).train()
    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            seen.append(model.model.trainable_groups)

    model = small_model()
    trainer = make_trainer(model, images, Watch(), **saving)
    with model.freeze_backbone(trainable_groups=DEEPEST).assert_frozen():
        model.freeze_backbone()
        trainer.train(resume_from_checkpoint=f"out/checkpoint-{steps}")
    assert seen == [groups_at(step // 4) for step in range(steps, 4 * EPOCHS)]
    assert_equal(model.state_dict(), train_plainly(small_model(), images, groups_at).state_dict())


def test_loading_the_best_model_does_not_change_frozen_tensors(images: TensorDataset) -> None:
    model = small_model()
    each_epoch = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    # The training loss falls, so the largest is that of the first epoch.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = make_trainer(model, images, **each_epoch, **best)
    with model.freeze_backbone(trainable_groups=DEEPEST).assert_frozen():
        trainer.train()
    assert trainer.state.best_model_checkpoint == "out/checkpoint-4"
    assert_equal(model.state_dict(), train_plainly(small_model(), images, groups_at, epochs=1).state_dict())
    assert model.trainable_groups == DEEPEST


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # the name that users know
def test_gradient_checkpointing_computes_the_same(images: TensorDataset) -> None:
    model = small_model(norm_eval=True)
    trainer = make_trainer(model, images, gradient_checkpointing=True)
    with model.freeze_backbone(trainable_groups=DEEPEST).assert_frozen():
        trainer.train()
    assert model.backbone.grad_checkpointing
    assert_equal(model.state_dict(), train_plainly(small_model(norm_eval=True), images, groups_at).state_dict())


def test_label_smoothing(images: TensorDataset) -> None:
    model = small_model()
    with model.freeze_backbone(trainable_groups=DEEPEST).assert_frozen():
        make_trainer(model, images, label_smoothing_factor=0.1).train()
    loss = partial(nn.functional.cross_entropy, label_smoothing=0.1)
    plain = train_plainly(small_model(), images, groups_at, loss=loss)
    assert_equal(model.state_dict(), plain.state_dict(), atol=1e-5)


def test_unfreezing_on_two_processes(tmp_path: Path) -> None:
    run_two_processes("client_trainer.py", tmp_path / "log", *TORCHRUN)


def test_a_hub_folder_has_the_whole_model(images: TensorDataset, tmp_path: Path) -> None:
    hosted = recipe("Hugging Face Hub")["Hosted"]("test_resnet", num_classes=3)
    with hosted.model.freeze_backbone(trainable_groups=DEEPEST).assert_frozen():
        train_plainly(hosted.model, images, groups_at)
    hosted.save_pretrained(tmp_path / "folder")
    again = type(hosted).from_pretrained(tmp_path / "folder")
    assert_equal(again.state_dict(), hosted.state_dict())
    assert torch.equal(again.eval()(images.tensors[0]), hosted(images.tensors[0]))
