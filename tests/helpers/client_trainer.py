"""Helpers for tests with transformers; as a script, one of the DDP processes in which Trainer unfreezes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
from torch.utils.data import Dataset, default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments

from backbone_finetune import FineTuneModel


def collate(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return dict(zip(("pixel_values", "labels"), default_collate(pairs), strict=True))


def make_trainer(
    model: FineTuneModel,
    images: Dataset[Any],
    *callbacks: TrainerCallback,
    optimize: Callable[[FineTuneModel], torch.optim.Optimizer] = make_optimizer,
    **arguments: Any,
) -> Trainer:
    """Return arguments without clipping, learning-rate decay and shuffling, which a plain loop does not have."""
    names = recipe("transformers", groups_at=groups_at)
    plain = {"max_grad_norm": 0, "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
    plain |= {"num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH_SIZE, "use_cpu": True}
    plain |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return Trainer(
        names["ForTrainer"](model),
        TrainingArguments("out", **{**plain, **arguments}),
        data_collator=collate,
        train_dataset=images,
        eval_dataset=images,
        callbacks=[names["TrainableGroups"](), *callbacks],
        optimizers=(optimize(model), None),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )


def main() -> None:
    """Each process gets half of each batch; the result equals that of one process on whole batches."""
    torch.set_num_threads(1)
    # Running statistics of a trainable BatchNorm would differ between processes.
    model, plain = small_model(norm_eval=True).unfreeze_backbone(), small_model(norm_eval=True)
    halves = {"per_device_train_batch_size": BATCH_SIZE // 2, "ddp_backend": "gloo"}
    trainer = make_trainer(model, small_images(), optimize=make_sgd, **halves)
    assert trainer.args.world_size == 2
    fixed = small_model(norm_eval=True).freeze_backbone(trainable_groups=DEEPEST).frozen_names()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in fixed}
    trainer.train()
    assert_equal({name: model.state_dict()[name] for name in fixed}, before)
    train_plainly(plain, small_images(), groups_at, optimizer=make_sgd(plain))
    assert_equal(model.state_dict(), plain.state_dict(), atol=1e-5)
    print(f"process {trainer.args.process_index} agrees")


if __name__ == "__main__":
    main()
