"""A machine whose memory is full after the training: from then on no backbone can run.

What torchrun starts for test_out_of_memory.py: python full_memory.py IMAGES OUTPUT, where the last of the processes has
no memory left.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from steps import after_step
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from backbone_finetune import cli


def out_of_memory(module: nn.Module, _: Any, output: Any) -> None:
    if isinstance(module, nn.Conv2d | nn.AdaptiveAvgPool2d) and not output.is_meta:
        raise torch.OutOfMemoryError("CUDA out of memory")


@contextmanager
def after_steps(number: int, hook: Any = out_of_memory) -> Iterator[None]:
    """Give torch a forward hook of all modules after a number of optimizer steps, until the block ends."""
    with ExitStack() as hooks, after_step(number, lambda: hooks.callback(register_module_forward_hook(hook).remove)):
        yield


if __name__ == "__main__":
    torch.set_num_threads(1)
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    options = "--model test_resnet --input-size 32 --epochs 1 --lr 0.01 --batch-size 8 --folds 2 --baselines"
    with after_steps(2 if is_last else -1):
        sys.exit(cli.main(["train", sys.argv[1], *options.split(), "--device", "cpu", "--output", sys.argv[2]]))
