"""Take down all that a run needs to go on, and bring it back: weights, optimizer, scaler, random generators."""

import sys
from collections.abc import Mapping, Set
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from backbone_finetune.checkpoint import distinct_tensors
from backbone_finetune.eval_caches import clear_caches

from ..rng import random_state, restore_random_state
from .checkpoints import Checkpoint, Progress, newest_checkpoint
from .processes import run_on_main, whole

__all__ = ["capture", "load_by_name", "open_checkpoints", "resume"]


def open_checkpoints(folder: Path, accelerator: Accelerator) -> tuple[bool, Checkpoint | None]:
    """Make the folder of the checkpoints, or say that it was there and give its newest one, to every process.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as parent:
    ...     [open_checkpoints(Path(parent, "checkpoints"), Accelerator(cpu=True)) for _ in range(2)]
    [(False, None), (True, None)]
    """

    def look() -> tuple[bool, Checkpoint | None]:
        begun = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        return begun, newest_checkpoint(folder)

    return run_on_main(accelerator, look)


def capture(
    progress: Progress,
    model: nn.Module,
    changed: Set[str],
    optimizer: torch.optim.Optimizer | None,
    *,
    accelerator: Accelerator,
) -> Checkpoint:
    """Make a checkpoint of a run that has ``changed`` so named tensors of its model; all processes must take part.

    Only those are in it, as the others are in the model that the run begins with.

    >>> layer = nn.Linear(2, 1)
    >>> checkpoint = capture(Progress(), layer, {"bias"}, None, accelerator=Accelerator(cpu=True))
    >>> list(checkpoint.model), len(checkpoint.random_states)
    (['bias'], 1)
    """
    return Checkpoint(
        progress,
        model={name: whole(tensor) for name, tensor in distinct_tensors(model).items() if name in changed},
        optimizer={} if optimizer is None else optimizer_tensors(optimizer),
        random_states=gather_object([random_state()]),
        scaler={} if accelerator.scaler is None else accelerator.scaler.state_dict(),
    )


def resume(saved: Checkpoint, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    """Bring optimizer, scaler and random generators to where they were; see `capture`."""
    if saved.optimizer:
        load_optimizer_tensors(optimizer, saved.optimizer)
    if saved.scaler and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(dict(saved.scaler))
    if len(saved.random_states) == accelerator.num_processes:
        restore_random_state(saved.random_states[accelerator.process_index])
    elif accelerator.is_main_process:
        print(
            f"the random states are those of {len(saved.random_states)} processes, and here are "
            f"{accelerator.num_processes}: what is drawn from here on is not what it would have been",
            file=sys.stderr,
        )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name what an optimizer remembers by parameter, ``classifier.weight.exp_avg``; its groups must have names.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.SGD([{"params": [layer.weight], "param_names": ["weight"]}], lr=0.1, momentum=0.9)
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> optimizer_tensors(optimizer)
    {'weight.momentum_buffer': tensor([[1., 1.]])}
    """
    return {
        f"{name}.{key}": whole(value)
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Let an optimizer remember what `optimizer_tensors` named."""
    state: dict[int, dict[str, Tensor]] = {}
    position = 0
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            state[position] = {
                key.removeprefix(f"{name}."): as_placed(value, parameter)
                for key, value in tensors.items()
                if key.rpartition(".")[0] == name
            }
            position += 1
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def as_placed(value: Tensor, parameter: Tensor) -> Tensor:
    """Spread a tensor over the processes as its parameter is."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def load_by_name(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of a model that have their names."""
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    clear_caches(model)
