"""Helpers for tests with Lightning; as a script, a fit that unfreezes on two DDP processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import lightning
import torch
from client_loops import (
    BATCH_SIZE,
    DEEPEST,
    EPOCHS,
    assert_equal,
    groups_at,
    make_optimizer,
    make_sgd,
    recipe,
    small_images,
    small_model,
    train_plainly,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from backbone_finetune import FineTuneModel


class Classifier(lightning.LightningModule):
    def __init__(self, model: FineTuneModel, optimize: Callable[[FineTuneModel], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.model = model
        self.optimize = optimize

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, targets = batch
        return nn.functional.cross_entropy(self.model(images), targets)

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimize(self.model)


def fit(
    model: FineTuneModel,
    *callbacks: lightning.Callback,
    optimize: Callable[[FineTuneModel], torch.optim.Optimizer] = make_optimizer,
    epochs: int = EPOCHS,
    loader: DataLoader[tuple[Tensor, ...]] | None = None,
    ckpt_path: str | None = None,
    **arguments: Any,
) -> lightning.Trainer:
    """Train and validate with Lightning, with its output turned off."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet["enable_checkpointing"] = any(isinstance(each, lightning.pytorch.callbacks.Checkpoint) for each in callbacks)
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", **quiet, **{"devices": 1, **arguments}
    )
    loader = loader or DataLoader(small_images(), BATCH_SIZE)
    trainer.fit(Classifier(model, optimize), loader, loader, ckpt_path=ckpt_path, weights_only=False)
    return trainer


def main() -> None:
    """Each process gets half of each batch; the result equals that of one process on whole batches."""
    torch.set_num_threads(1)
    # Running statistics of a trainable BatchNorm would differ between processes.
    model, plain = small_model(norm_eval=True), small_model(norm_eval=True)
    callback = recipe("Lightning", groups_at=groups_at)["TrainableGroups"]()
    # Lightning's own sampler would shuffle.
    sampler = DistributedSampler(small_images(), 2, int(os.environ.get("LOCAL_RANK", "0")), shuffle=False)
    loader = DataLoader(small_images(), BATCH_SIZE // 2, sampler=sampler)
    processes = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    with model.freeze_backbone(trainable_groups=DEEPEST).assert_frozen():
        trainer = fit(model, callback, optimize=make_sgd, loader=loader, **processes)
    assert trainer.world_size == 2
    train_plainly(plain, small_images(), groups_at, optimizer=make_sgd(plain))
    assert_equal(model.state_dict(), plain.state_dict(), atol=1e-5)
    print(f"process {trainer.global_rank} agrees")


if __name__ == "__main__":
    main()
