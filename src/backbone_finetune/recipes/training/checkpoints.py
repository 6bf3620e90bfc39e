"""Where a run stands, and the files that keep it: written whole, the last two kept, believed only to the bit."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from backbone_finetune.verification import digest

from ..files import replacing

__all__ = ["Checkpoint", "EpochResult", "Progress", "newest_checkpoint", "write_checkpoint"]

KEPT = 2


@dataclass(frozen=True)
class EpochResult:
    """One epoch: mean loss and accuracy while training, accuracy on the held-out images after it.

    >>> EpochResult(epoch=1, train_loss=2.1, train_accuracy=0.2, test_accuracy=0.3).epoch
    1
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float


@dataclass
class Progress:
    """Where a run stands: in phase ``phase`` (from 0), ``epoch`` of its epochs and ``step`` steps of the next finished.

    ``steps`` counts those of the whole run; ``loss_sum`` and ``correct`` are the sums of the epoch under way.

    >>> Progress(history=[EpochResult(1, 2.1, 0.2, 0.3)], step=7, steps=27).describe()
    'epoch 2, step 7'
    """

    phase: int = 0
    epoch: int = 0
    step: int = 0
    steps: int = 0
    loss_sum: float = 0.0
    correct: float = 0.0
    history: list[EpochResult] = field(default_factory=list)

    def describe(self) -> str:
        """Name the epoch under way, of the whole run and from 1, and how many steps of it are done."""
        return f"epoch {len(self.history) + 1}, step {self.step}"

    def finish_epoch(self, result: EpochResult, *, last_of_phase: bool) -> None:
        """Go on to the next epoch, in the next phase when this was the last of its phase.

        >>> progress = Progress(step=20, steps=20)
        >>> progress.finish_epoch(EpochResult(1, 2.1, 0.2, 0.3), last_of_phase=True)
        >>> progress.phase, progress.epoch, progress.step, progress.steps
        (1, 0, 0, 20)
        """
        self.history.append(result)
        self.phase, self.epoch = (self.phase + 1, 0) if last_of_phase else (self.phase, self.epoch + 1)
        self.step, self.loss_sum, self.correct = 0, 0.0, 0.0


@dataclass(frozen=True)
class Checkpoint:
    """All it takes to go on: tensors of the model and the optimizer, the random state of each process.

    >>> Checkpoint(Progress(step=3), model={}, optimizer={}, random_states=[], scaler={}).progress.step
    3
    """

    progress: Progress
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    random_states: Sequence[Mapping[str, Any]]
    scaler: Mapping[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into a folder, then drop all but the last two there.

    A process that is killed meanwhile leaves those that were there, whole.

    >>> from tempfile import TemporaryDirectory
    >>> import torch
    >>> with TemporaryDirectory() as folder:
    ...     for steps in (10, 20, 30):
    ...         write_checkpoint(Path(folder), Checkpoint(Progress(steps=steps), {"w": torch.ones(2)}, {}, [], {}))
    ...     sorted(path.name for path in Path(folder).iterdir()), newest_checkpoint(Path(folder)).model
    (['step-000000020.safetensors', 'step-000000030.safetensors'], {'w': tensor([1., 1.])})
    """
    parts = (("model", checkpoint.model), ("optimizer", checkpoint.optimizer))
    tensors = {
        f"{part}.{name}": tensor.detach().cpu().contiguous() for part, named in parts for name, tensor in named.items()
    }
    state = json.dumps(
        {
            "progress": asdict(checkpoint.progress),
            "random_states": checkpoint.random_states,
            "scaler": checkpoint.scaler,
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"step-{checkpoint.progress.steps:09}.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"state": state, "digest": digest_all(state, tensors)})
    for path in checkpoint_files(folder)[:-KEPT]:
        path.unlink()


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint of a folder that is whole to the bit, None where there is none.

    One that is truncated or garbled is passed over with a line on stderr. Nothing in a file is executed.

    >>> newest_checkpoint(Path("no such folder")) is None
    True
    """
    for leftover in folder.glob(".step-*"):  # of a process that was killed while it wrote
        leftover.unlink()
    found = (try_checkpoint(path) for path in reversed(checkpoint_files(folder)))
    return next((checkpoint for checkpoint in found if checkpoint is not None), None)


def try_checkpoint(path: Path) -> Checkpoint | None:
    """Read one checkpoint, None, with a line on stderr, where it is not what was written."""
    try:
        return read_checkpoint(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        print(f"checkpoint {path.name} is damaged ({error}); going on from the one before", file=sys.stderr)
        return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        SafetensorError, OSError, KeyError, TypeError, ValueError: it is not what was written.
    """
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    if metadata["digest"] != digest_all(metadata["state"], tensors):
        raise ValueError("its content is not what was written")
    state = json.loads(metadata["state"])
    history = [EpochResult(**result) for result in state["progress"].pop("history")]
    return Checkpoint(
        Progress(**state["progress"], history=history),
        model={name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")},
        optimizer={
            name.removeprefix("optimizer."): value for name, value in tensors.items() if name.startswith("optimizer.")
        },
        random_states=state["random_states"],
        scaler=state["scaler"],
    )


def checkpoint_files(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, oldest first.

    >>> checkpoint_files(Path("no such folder"))
    []
    """
    return sorted(folder.glob("step-*.safetensors"))


def digest_all(state: str, tensors: Mapping[str, Tensor]) -> str:
    """Digest a text and the bits of all tensors."""
    hashed = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        hashed.update(f"{name} {digest(tensors[name])}".encode())
    return hashed.hexdigest()
