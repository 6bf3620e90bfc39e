"""What torchrun starts for test_processes.py: python processes_worker.py FOLDER, on any number of processes.

It trains a frozen phase on cached features, one on images with a frozen backbone, and one where BatchNorm trains, and
the main process writes the weights after each. 23 images in batches of 4 leave 3 for the last: no even shares.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import TensorDataset
from training_worker import Shaken, make_images, make_model

from backbone_finetune.recipes.objectives.kinds import MultiLabel, Regression, SingleLabel, SoftLabels
from backbone_finetune.recipes.training.config import TrainerConfig
from backbone_finetune.recipes.training.loop import fine_tune
from backbone_finetune.recipes.training.phases import Phase
from backbone_finetune.recipes.training.processes import make_accelerator
from backbone_finetune.recipes.training.scoring import evaluate


class Still(Shaken):
    """A deterministic transform that is not known to be deterministic."""

    def shake(self, image: torch.Tensor) -> torch.Tensor:
        return image

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def main(folder: str, device: str = "cpu") -> None:
    accelerator = make_accelerator(torch.device(device))
    if device == "cpu" and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        shard_on_cpu(accelerator)
    images: Any = make_images(23)
    told: dict[str, Any] = {"processes": accelerator.num_processes}
    for name, data, phase, accumulation in (
        ("cached", images, Phase(epochs=3, lr=0.02), 1),
        ("from zero", images, Phase(epochs=2), 1),
        ("uncached", Still(images), Phase(epochs=2, lr=0.02), 1),
        ("accumulated", images, Phase(epochs=2, lr=0.02), 2),
        ("statistics", images, Phase(epochs=4, trainable_groups=1, lr=0.02, backbone_lr=0.01, norm_eval=False), 1),
        # Trainable BatchNorm statistics in the stem would add noise here.
        ("weighted", Still(images), Phase(epochs=2, lr=0.02), 2),
        ("everything", images, Phase(epochs=2, trainable_groups=2, lr=0.02, backbone_lr=0.01, norm_eval=True), 2),
        ("monitored", images, Phase(epochs=3, trainable_groups=1, lr=0.02, backbone_lr=0.01), 1),
        ("resumed", images, Phase(epochs=3, trainable_groups=1, lr=0.02, backbone_lr=0.01), 1),
    ):
        if name == "resumed" and accelerator.is_main_process:
            # What is kept is of the first epoch, and the checkpoint of the second one has it.
            shutil.copytree(Path(folder, "monitored"), Path(folder, name))
            max(Path(folder, name).iterdir()).unlink()
        accelerator.wait_for_everyone()
        model = make_model(dropout=0.0, normalises=name != "everything").freeze_backbone()
        loop = TrainerConfig(
            accelerator,
            batch_size=4,
            accumulation=accumulation,
            checkpoints=Path(folder, name),
            objective=SingleLabel((0.5, 2.0, 7.0) if name == "weighted" else None),
            monitor=(lambda result: -result.epoch) if name in {"monitored", "resumed"} else None,
            autocast_features=False,  # cached and uncached results are compared up to rounding
        )
        history = fine_tune(model, data, make_images(7), [phase], loop)
        told[name] = [result.train_loss for result in history]
        score = evaluate(model, make_images(7), replace(loop, batch_size=3), keep_outputs=True)
        told[f"{name} test"] = score.accuracy
        told[f"{name} outputs"] = None if score.outputs is None else score.outputs.tolist()
        if accelerator.is_main_process:
            save_file(model.cpu().state_dict(), Path(folder, f"{name}.safetensors"))
    train_objectives(folder, accelerator, told)
    average_by_hand(folder, accelerator)
    if accelerator.is_main_process:
        Path(folder, "told.json").write_text(json.dumps(told))
    accelerator.end_training()


def shard_on_cpu(accelerator: Accelerator) -> None:
    """Use FSDP2 on the CPU, which torch can do, and accelerate uses on other devices alone."""
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    assert accelerator.is_fsdp2


def train_objectives(folder: str, accelerator: Any, told: dict[str, Any]) -> None:
    """Train on targets of each kind, cached and not, and write the weights and what is reported."""
    images, classes = make_images(23).tensors
    rows = torch.eye(3)[classes]
    for kind, objective, targets in (
        ("soft", SoftLabels(), 0.7 * rows + 0.1),
        ("labels", MultiLabel(), (rows + rows.roll(1, 0)).clamp(max=1)),
        ("values", Regression((1.0, 2.0, 3.0), (2.0,)), rows * torch.arange(3) + images.mean((2, 3))),
    ):
        data = TensorDataset(images, targets)
        for name, shown in ((f"{kind} cached", data), (f"{kind} uncached", Still(data))):
            model = make_model(dropout=0.0).freeze_backbone()
            config = TrainerConfig(
                accelerator, batch_size=4, objective=objective, autocast_features=False, show_progress=False
            )
            (result,) = fine_tune(model, shown, shown, [Phase(epochs=1, lr=0.02)], config)
            figures = {**asdict(result), **result.validation_metrics, "cached": result.why_uncached is None}
            told[name] = {key: value for key, value in figures.items() if isinstance(value, int | float)}
            if accelerator.is_main_process:
                save_file(model.cpu().state_dict(), Path(folder, f"{name}.safetensors"))


def average_by_hand(folder: str, accelerator: Any) -> None:
    """Train one epoch, and write the buffers of each process before and after averaging."""
    model, before = make_model(dropout=0.0), dict[str, torch.Tensor]()

    def record(*_: Any) -> None:
        before.update({name: buffer.clone() for name, buffer in model.named_buffers()})

    hook = register_optimizer_step_post_hook(record)
    loop = TrainerConfig(accelerator, batch_size=4, show_progress=False)
    fine_tune(
        model, make_images(23), make_images(7), [Phase(epochs=1, trainable_groups=1, lr=0.02, norm_eval=False)], loop
    )
    hook.remove()
    Path(folder, "buffers").mkdir(exist_ok=True)
    for when, buffers in (("before", before), ("after", dict(model.named_buffers()))):
        save_file(buffers, Path(folder, "buffers", f"{when}-{accelerator.process_index}.safetensors"))
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(1)
    main(*sys.argv[1:])
