"""Checkpoints of a run: contents, writing, reading, and resuming."""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from backbone_finetune.checkpoint import distinct_tensors, save_tensors
from backbone_finetune.eval_caches import clear_caches
from backbone_finetune.verification import digest

from ..rng import random_state, restore_random_state
from ..together import run_on_main
from .processes import full_tensor
from .progress import EpochResult, Progress

logger = logging.getLogger(__name__)

KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state to resume a run: changed tensors, the optimizer's state by parameter, and each process's random state.

    ``best`` are the same tensors after the best epoch.

    >>> Checkpoint(Progress(step=3), model={}, best={}, optimizer={}, random_states=[], scaler={}).progress.step
    3
    """

    progress: Progress
    model: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]]
    random_states: Sequence[Mapping[str, Any]]
    scaler: Mapping[str, Any]


def capture(
    progress: Progress,
    model: nn.Module,
    changed: Set[str],
    optimizer: torch.optim.Optimizer | None,
    *,
    accelerator: Accelerator,
    best: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """Build a checkpoint of the tensors named in ``changed``. Collective: every process must call it.

    The main process, which writes it, gets the tensors. The others are not in it, as the initial model has them.

    >>> layer = nn.Linear(2, 1)
    >>> checkpoint = capture(Progress(), layer, {"bias"}, None, accelerator=Accelerator(cpu=True))
    >>> list(checkpoint.model), len(checkpoint.random_states)
    (['bias'], 1)
    """
    state: Any = {}
    if optimizer is not None:
        # With several processes, only the main process, which writes, gets the state.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(model, _unwrap(optimizer), options=options).get("state", {})
    tensors = {name: tensor for name, tensor in distinct_tensors(model).items() if name in changed}
    return Checkpoint(
        progress,
        model=_gather(tensors, accelerator),
        best=_gather(best or {}, accelerator),
        optimizer=state,
        random_states=gather_object([random_state()]),
        scaler={} if accelerator.scaler is None else accelerator.scaler.state_dict(),
    )


def _gather(tensors: Mapping[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Copy tensors to the CPU of the main process. Of a sharded model one at a time is whole on each device."""
    whole = ((name, full_tensor(tensor)) for name, tensor in tensors.items())
    return {name: tensor.detach().cpu() for name, tensor in whole if accelerator.is_main_process}


def resume(saved: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    """Restore the optimizer, the loss scaler and the random generators; see ``capture``."""
    if saved.optimizer:  # inside a phase
        load_by_name(model, saved.model)  # again: the start of the phase may have changed the classifier
        optimizer.zero_grad(set_to_none=True)  # torch creates the state with an optimizer without gradients
        # Groups are not restored: the schedule sets their rates by the number of the step.
        groups = get_optimizer_state_dict(model, _unwrap(optimizer))["param_groups"]
        set_optimizer_state_dict(
            model,
            _unwrap(optimizer),
            {"state": {name: dict(state) for name, state in saved.optimizer.items()}, "param_groups": groups},
            options=StateDictOptions(full_state_dict=True),
        )
    if saved.scaler and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(dict(saved.scaler))
    if len(saved.random_states) == accelerator.num_processes:
        restore_random_state(saved.random_states[accelerator.process_index])
    elif accelerator.is_main_process:
        logger.warning(
            "resuming on %d processes a run that was on %d: random numbers will differ from an uninterrupted run",
            accelerator.num_processes,
            len(saved.random_states),
        )


def load_by_name(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of a model that have their names."""
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            own, given = state[name], tensor
            if isinstance(own, DTensor) and not isinstance(given, DTensor):
                given = distribute_tensor(given.to(own.device), own.device_mesh, own.placements)
            own.copy_(given)
    clear_caches(model)


def open_checkpoints(folder: Path, accelerator: Accelerator) -> tuple[bool, Checkpoint | None]:
    """Create a folder of checkpoints; return whether it existed, and its newest checkpoint, on every process.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as parent:
    ...     [open_checkpoints(Path(parent, "checkpoints"), Accelerator(cpu=True)) for _ in range(2)]
    [(False, None), (True, None)]
    """

    def look() -> tuple[bool, Checkpoint | None]:
        existed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        return existed, newest_checkpoint(folder)

    return run_on_main(accelerator, look)


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically, then delete all but the newest two.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     for steps in (10, 20, 30):
    ...         write_checkpoint(Path(folder), Checkpoint(Progress(steps=steps), {"w": torch.ones(2)}, {}, {}, [], {}))
    ...     sorted(path.name for path in Path(folder).iterdir()), newest_checkpoint(Path(folder)).model
    (['step-000000020.safetensors', 'step-000000030.safetensors'], {'w': tensor([1., 1.])})
    """
    named = {f"model.{name}": tensor for name, tensor in checkpoint.model.items()}
    named |= {f"best.{name}": tensor for name, tensor in checkpoint.best.items()}
    for name, state in checkpoint.optimizer.items():
        named |= {f"optimizer.{name}.{key}": tensor for key, tensor in state.items()}
    state_text = json.dumps(
        {
            "progress": asdict(checkpoint.progress),
            "random_states": checkpoint.random_states,
            "scaler": checkpoint.scaler,
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{checkpoint.progress.steps:09}.safetensors"
    save_tensors(named, path, {"state": state_text, "digest": _digest_all(state_text, named)})
    for path in _list_checkpoints(folder)[:-KEPT]:
        path.unlink()


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the newest undamaged checkpoint of a folder, None if there is none. Nothing in a file is executed.

    >>> newest_checkpoint(Path("no such folder")) is None
    True

    Raises:
        ValueError: it is of another version of this library, whose fields differ.
    """
    for leftover in folder.glob(".step-*"):  # of a process that was killed while writing
        leftover.unlink()
    for path in reversed(_list_checkpoints(folder)):
        try:
            return _read_checkpoint(path)
        except TypeError as error:  # noqa: PERF203 (two files); a training from the start would remove it
            raise ValueError(
                f"{path} was written by another version of backbone-finetune ({error}); resume with that version, or "
                "remove the folder"
            ) from error
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            logger.warning("checkpoint %s is damaged (%s) and not used", path.name, error)
    return None


def _read_checkpoint(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    if metadata["digest"] != _digest_all(metadata["state"], tensors):
        raise ValueError("its content is not what was written")
    state = json.loads(metadata["state"])
    history = [EpochResult(**result) for result in state["progress"].pop("history")]
    optimizer: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
            optimizer[parameter][key] = tensor
    return Checkpoint(
        Progress(**state["progress"], history=history),
        model=_below("model.", tensors),
        best=_below("best.", tensors),
        optimizer=dict(optimizer),
        random_states=state["random_states"],
        scaler=state["scaler"],
    )


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-*.safetensors"))


def _digest_all(state: str, tensors: Mapping[str, Tensor]) -> str:
    """Digest a text and the bits of all tensors."""
    hashed = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        hashed.update(f"{name} {digest(tensors[name])}".encode())
    return hashed.hexdigest()


def _unwrap(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return an optimizer without accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
