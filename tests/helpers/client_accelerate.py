"""What the tests of accelerate run; as a script, one of two processes that train by the recipe."""

from __future__ import annotations

import os

import torch
from client_loops import BATCH_SIZE, DEEPEST, assert_equal, groups_at, recipe, small_images, small_model, train_plainly
from torch.utils.data import DataLoader

from backbone_finetune import FineTuneModel


def make_adamw(model: FineTuneModel) -> torch.optim.Optimizer:
    """The optimizer of the recipe."""
    return torch.optim.AdamW(model.param_groups(lr=1e-3, weight_decay=0.05, include_frozen=True))


def main() -> None:
    """Each process gets half of each batch; the result is that of one process on whole batches."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "1"
    # Running statistics of a trainable BatchNorm would belong to each process's own images.
    model, plain = small_model(norm_eval=True), small_model(norm_eval=True)
    loader = DataLoader(small_images(), BATCH_SIZE // 2)
    with model.freeze_backbone(trainable_groups=DEEPEST).assert_frozen():
        names = recipe("accelerate", model=model, loader=loader, groups_at=groups_at)
    assert names["accelerator"].num_processes == 2
    train_plainly(plain, small_images(), groups_at, optimizer=make_adamw(plain))
    # Adam makes much of how sums are rounded where a gradient is near zero; a step of it is 1e-3.
    assert_equal(model.state_dict(), plain.state_dict(), atol=1e-4)
    print(f"process {names['accelerator'].process_index} agrees")


if __name__ == "__main__":
    main()
