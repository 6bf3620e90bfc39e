"""How many images a model gets right, of all and of each class."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from ..data.images import IGNORED
from ..features.dataset import module_inputs
from .batches import load_batches, local_batch
from .config import count

__all__ = ["Score", "evaluate"]


@dataclass(frozen=True)
class Score:
    """Right answers and images of each class, and the mean cross entropy.

    >>> score = Score(correct=(9, 1), images=(10, 2), loss=0.5)
    >>> round(score.accuracy, 3), score.balanced_accuracy
    (0.833, 0.7)
    """

    correct: Sequence[int]
    images: Sequence[int]
    loss: float

    @property
    def accuracy(self) -> float:
        """The share of images whose answer is right."""
        return sum(self.correct) / max(sum(self.images), 1)

    @property
    def balanced_accuracy(self) -> float:
        """The mean recall of the classes that have images; a rare class counts as much as a common one."""
        recalls = [correct / images for correct, images in zip(self.correct, self.images, strict=True) if images]
        return sum(recalls) / max(len(recalls), 1)


@torch.no_grad()
def evaluate(
    module: nn.Module,
    data: Dataset[Any],
    *,
    batch_size: int,
    accelerator: Accelerator,
    workers: int = 0,
    check: Callable[[Tensor], None] | None = None,
) -> Score:
    """Count the images of each class whose largest logit is their target. Leaves the module in eval mode.

    Each process takes a share of each batch; no image counts twice, and one that cannot be read does not count. What
    has a target outside the classes counts as wrong, as of one class more, unless ``check`` raises for it.

    >>> data = [(torch.tensor([0.0, 1.0]), 1)]
    >>> evaluate(nn.Identity(), data, batch_size=1, accelerator=Accelerator(cpu=True)).accuracy
    1.0
    """
    module.eval()
    shares = [
        local_batch(batch, process=accelerator.process_index, processes=accelerator.num_processes)
        for batch in torch.split(torch.arange(count(data), device="cpu"), batch_size)
    ]
    answers: list[Tensor] = []
    losses: list[Tensor] = []
    targets: list[Tensor] = []
    loaded = load_batches(data, shares, device=accelerator.device, workers=workers, seed="evaluation", check=check)
    for share, (*inputs, batch_targets) in zip(shares, loaded, strict=True):
        logits = module(*module_inputs(data, inputs))[: share.num_real]
        answers.append(logits.argmax(-1))
        targets.append(batch_targets[: share.num_real].long())
        known = targets[-1].where((targets[-1] >= 0) & (targets[-1] < logits.shape[-1]), IGNORED)
        losses.append(cross_entropy(logits.float(), known, ignore_index=IGNORED, reduction="sum"))
    classes, true = logits.shape[-1], torch.cat(targets)
    right = true[torch.cat(answers) == true]
    readable = true[true != IGNORED]
    readable = readable.where((readable >= 0) & (readable < classes), classes)
    counts = torch.stack([torch.bincount(part, minlength=classes + 1) for part in (right, readable)])
    correct, images = accelerator.reduce(counts).tolist()
    loss = accelerator.reduce(torch.stack(losses).sum()).item()
    return Score(correct, images, loss / max(sum(images), 1))
