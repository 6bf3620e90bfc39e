"""Evaluation of a model: loss, predictions, and the metrics of its objective."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from backbone_finetune.distributed import reshard

from ..data.images import is_read
from ..data.targets import known_targets
from ..features.dataset import module_inputs
from ..features.running import Runner
from ..together import together
from .batches import load_batches, local_batch
from .config import TrainerConfig, count


@dataclass(frozen=True)
class Score:
    """The results of a model on readable images.

    Args:
        loss: The mean loss.
        metrics: Of the objective, by name, such as "accuracy".
        answers: The objective's answers: classes ``(N,)``, probabilities or values ``(N, K)``.
        targets: The targets of the answers.
        indices: The places of these images in the dataset, in order, ``(N,)``.
        outputs: The outputs of the model, ``(N, K)``, if `evaluate` was told to keep them.
    """

    loss: float
    metrics: Mapping[str, float]
    answers: Tensor
    targets: Tensor
    indices: Tensor
    outputs: Tensor | None = None

    @property
    def accuracy(self) -> float | None:
        """The share of correct images; None if answers are values."""
        return self.metrics.get("accuracy")

    @property
    def other_metrics(self) -> dict[str, float]:
        """The metrics beside the accuracies."""
        return {name: value for name, value in self.metrics.items() if "accuracy" not in name}

    @property
    def balanced_accuracy(self) -> float | None:
        """The mean recall of the classes that have images; None if targets are not classes."""
        return self.metrics.get("balanced_accuracy")


@torch.no_grad()
def evaluate(
    module: nn.Module, data: Dataset[Any], config: TrainerConfig, *, name: str = "data", keep_outputs: bool = False
) -> Score:
    """Evaluate a model on images. It stays on its device, and is in eval mode afterwards.

    Each process takes a part of each batch; no image counts twice, and unreadable ones do not count. Errors
    call the data by ``name``. With ``keep_outputs``, the score has the model's outputs too, in float32.

    >>> from accelerate import Accelerator
    >>> data = [(torch.tensor([0.0, 1.0]), 1)]
    >>> evaluate(nn.Identity(), data, TrainerConfig(Accelerator(cpu=True))).metrics
    {'accuracy': 1.0, 'balanced_accuracy': 1.0}

    Raises:
        ValueError: a target does not fit the objective, or no image can be read.
    """
    module.eval()
    accelerator, objective = config.accelerator, config.objective
    shares = [
        local_batch(batch, process=accelerator.process_index, processes=accelerator.num_processes)
        for batch in torch.split(torch.arange(count(data), device="cpu"), config.batch_size)
    ]
    answers: list[Tensor] = []
    targets: list[Tensor] = []
    losses: list[Tensor] = []
    kept: list[Tensor] = []
    known = known_targets(data)
    # On the CPU the results are those of contiguous images, as in the steps.
    runner = Runner(contiguous=accelerator.device.type != "cuda" or isinstance(data, TensorDataset))
    unchecked: list[Tensor] = [] if known is None else [known.cpu()]  # targets, until a batch shows how many outputs

    def run(*inputs: Tensor) -> Tensor:
        outputs: Tensor = module(*module_inputs(data, inputs))
        return outputs

    loaded = load_batches(
        data,
        shares,
        device=accelerator.device,
        workers=config.workers_for(data),
        seed="evaluation",
        check=unchecked.append if known is None else None,
    )
    # An error of one process ends the evaluation of all, except of a sharded model, whose forwards wait for each other.
    with nullcontext() if accelerator.is_fsdp2 else together(accelerator):
        for share, (*inputs, batch_targets) in zip(shares, loaded, strict=True):
            wanted = batch_targets[: share.num_real]
            if accelerator.is_fsdp2:  # each process must run as many parts as the others
                outputs = run(*inputs)
            else:
                (outputs, *_), _ = runner.run(run, inputs, module)
            outputs = outputs[: share.num_real]
            while unchecked:  # before the loss: on a GPU, an invalid class would end the process
                loaded_before = unchecked.pop()
                columns = outputs.shape[1] if outputs.ndim > 1 else 1
                objective.check(name, loaded_before[is_read(loaded_before)], columns)
            weights, loss = objective.weights(wanted), objective.losses(outputs, wanted).sum()
            losses.append(torch.stack((loss, (is_read(wanted) if weights is None else weights).sum())))
            answers.append(objective.answer(outputs))
            targets.append(wanted)
            if keep_outputs:
                kept.append(outputs.float())
        reshard(module)  # after a forward without gradients, FSDP2 keeps parameters that are not the optimizer's
        indices = [share.indices[: share.num_real] for share in shares]
        own = [torch.cat(parts).cpu() for parts in (indices, answers, targets, kept) if parts]
    all_indices, *gathered = (torch.cat(parts) for parts in zip(*gather_object([own]), strict=True))
    order = all_indices.argsort()
    all_answers, all_targets, *all_outputs = (tensor[order] for tensor in gathered)
    read = is_read(all_targets)
    if not read.any():
        raise ValueError(f"{name}: none of the images can be read")
    loss, weight = accelerator.reduce(torch.stack(losses).sum(0)).tolist()
    all_answers, all_targets = all_answers[read], all_targets[read]
    return Score(
        loss / weight,
        objective.measure(all_answers, all_targets),
        all_answers,
        all_targets,
        indices=read.nonzero().flatten(),
        outputs=all_outputs[0][read] if keep_outputs else None,
    )
