"""What torchrun starts for test_processes.py: the last of the processes runs out of memory, the others wait for it.

python failing_worker.py step|main|move|evaluation: in a step of a training, where the main process alone works, where
the model is moved to the device, or in an evaluation.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from training_worker import make_images, make_model

from backbone_finetune.recipes.together import run_on_main
from backbone_finetune.recipes.training.config import TrainerConfig
from backbone_finetune.recipes.training.loop import fine_tune
from backbone_finetune.recipes.training.phases import Phase
from backbone_finetune.recipes.training.processes import make_accelerator
from backbone_finetune.recipes.training.scoring import evaluate


def fail(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator = make_accelerator(torch.device("cpu"))
    if sys.argv[1] == "main":
        run_on_main(accelerator, fail)
    model, images = make_model(dropout=0.0), make_images(23)
    config = TrainerConfig(accelerator, batch_size=4, cache_features=False, show_progress=False)
    if accelerator.process_index == accelerator.num_processes - 1:
        model.classifier.register_full_backward_hook(fail)
        if sys.argv[1] == "evaluation":
            model.register_forward_hook(fail)
        if sys.argv[1] == "move":
            model.classifier._apply = fail
    if sys.argv[1] == "evaluation":
        evaluate(model, images, config)
    fine_tune(model, images, images, [Phase(epochs=1, lr=0.01)], config)
