"""Many heads at once on cached features: a grid of learning rates and weight decays as one batched problem."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy, linear
from torch.utils.data import TensorDataset
from tqdm import tqdm

from backbone_finetune.layers.param_groups import build_param_groups
from backbone_finetune.splitting.measures import count_classes

from ..checking import expect, is_whole
from ..data.targets import check_targets
from ..features.extract import feature_batches, find_device_of, module_inputs, without_unread

__all__ = ["HeadResult", "decaying_names", "fit_heads"]


@dataclass(frozen=True)
class HeadResult:
    """A head of the grid, and what it made of the validation data: accuracy 0 to 1, and mean loss.

    A head whose weights went beyond all numbers has accuracy 0 and a loss that is not finite.

    >>> HeadResult(lr=1e-3, weight_decay=0.05, validation_accuracy=0.7, validation_loss=0.9).lr
    0.001
    """

    lr: float
    weight_decay: float
    validation_accuracy: float
    validation_loss: float


class StackedHeads:
    """Copies of one head, each with its own rates, that train as one: every tensor has a first dimension H for them.

    >>> heads = StackedHeads(nn.Linear(3, 2), [(0.1, 0.0), (0.2, 0.0)], device=torch.device("cpu"))
    >>> tuple(heads.logits(torch.ones(4, 3)).shape)
    (4, 2, 2)
    """

    def __init__(self, head: nn.Module, rates: Sequence[tuple[float, float]], *, device: torch.device) -> None:
        self.head = copy.deepcopy(head).to(device)  # never trained itself: it says how to compute, and in which mode
        self.count = len(rates)
        self.parameters, self.buffers = stack_module_state([self.head] * self.count)
        lr, weight_decay = torch.tensor(rates, dtype=torch.float64).T  # on the CPU, as MPS has no float64
        decays = decaying_names(self.head)
        self.trained = {name: tensor for name, tensor in self.parameters.items() if tensor.requires_grad}
        self.rates: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        for name, tensor in self.trained.items():
            shape = (-1, *(1 for _ in tensor.shape[1:]))
            self.rates[name] = lr.to(tensor.dtype).to(device).view(shape)
            kept = 1 - lr * weight_decay * (name in decays)
            self.kept[name] = kept.to(tensor.dtype).to(device).view(shape)
        # The direction of Adam's step depends neither on the rate nor on the weights: torch's own AdamW takes a step
        # of rate 1 from zero, for all heads in one kernel, and each head goes along it at its own rate.
        self.steps = {name: torch.zeros_like(tensor) for name, tensor in self.trained.items()}
        self.optimizer = torch.optim.AdamW(self.steps.values(), lr=1.0, weight_decay=0.0, fused=True)

    def logits(self, features: Any) -> Tensor:
        """Compute (B, H, num_classes) for the same features in every head; dropout draws for each head anew."""
        if type(self.head) is nn.Linear and features.ndim == 2:
            # All heads side by side are one wide layer: one matrix product, a fourth of the time of the batched one.
            bias = self.parameters.get("bias")
            wide = linear(features, self.parameters["weight"].flatten(0, 1), None if bias is None else bias.flatten())
            return wide.view(len(wide), self.count, -1)

        def one_head(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Any:
            return functional_call(self.head, (parameters, buffers), (features,))

        stacked: Tensor = vmap(one_head, out_dims=1, randomness="different")(self.parameters, self.buffers)
        return stacked

    def step(self, loss: Tensor) -> None:
        """Take one step of AdamW in every head, each down its own loss, (H,)."""
        gradients = torch.autograd.grad(loss.sum(), list(self.trained.values()))
        for step, gradient in zip(self.steps.values(), gradients, strict=True):
            step.grad = gradient.contiguous()  # the fused kernel reads memory as it lies, transposed ones too
        self.optimizer.step()
        with torch.no_grad():
            for name, tensor in self.trained.items():
                tensor.mul_(self.kept[name]).addcmul_(self.steps[name], self.rates[name])
                self.steps[name].zero_()

    @torch.no_grad()
    def copy_to(self, head: nn.Module, index: int) -> None:
        """Copy the parameters and buffers of one head."""
        own = {**dict(head.named_parameters()), **dict(head.named_buffers())}
        for name, tensor in {**self.parameters, **self.buffers}.items():
            own[name].copy_(tensor[index])


def fit_heads(
    classifier: nn.Module,
    train: TensorDataset,
    validation: TensorDataset,
    *,
    learning_rates: Sequence[float],
    weight_decays: Sequence[float] = (0.0,),
    epochs: int,
    batch_size: int,
    device: torch.device | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> tuple[HeadResult, ...]:
    """Train a head for each pair of a learning rate and a weight decay, all at once, and keep the best in place.

    As DINOv2's linear evaluation (Oquab et al. 2023, section 7.1) does, all heads see the same batches of features,
    and the one with the highest validation accuracy (of equals, the lowest loss) is kept: ``classifier`` has its
    weights afterwards. Each head starts where ``classifier`` is and trains with cross entropy, as it would alone under
    ``torch.optim.AdamW(model.param_groups(lr, weight_decay=weight_decay))``: to rounding the same, but for the draws
    of dropout, which stays on and is drawn for each head anew. Returns all heads, best first.

    >>> data = TensorDataset(torch.eye(2), torch.tensor([0, 1]))
    >>> results = fit_heads(
    ...     nn.Linear(2, 2), data, data, learning_rates=[0.1, 1e-9], weight_decays=[0.0, 0.01], epochs=9, batch_size=2,
    ...     show_progress=False,
    ... )
    >>> len(results), results[0].lr, results[0].validation_accuracy
    (4, 0.1, 1.0)

    A linear head on (N, D) features is fastest: 32 of them cost little more than a few. With tuples of features, the
    classifier gets a tuple. On data of one image more than full batches, that one sits the epoch out.

    Raises:
        ValueError: no rates or impossible ones, no epochs, no data, nothing in the classifier trains, or every head
            diverged.
    """
    expect("epochs", epochs, "a whole number from 1", is_whole(epochs, least=1))
    expect("batch_size", batch_size, "a whole number from 1", is_whole(batch_size, least=1))
    expect("len(train)", len(train), "one image or more", len(train) > 0)
    expect("len(validation)", len(validation), "one image or more", len(validation) > 0)
    rates = list(product(learning_rates, weight_decays))
    if not rates or not all(0 <= rate < math.inf for pair in rates for rate in pair):
        raise ValueError(
            f"learning_rates={list(learning_rates)}, weight_decays={list(weight_decays)}: pass at least one of each, "
            "finite and 0 or more"
        )
    for name, data in (("train", train), ("validation", validation)):
        check_targets(name, data.tensors[-1], count_classes(classifier))
    train, validation = without_unread(train), without_unread(validation)
    device = device or find_device_of(classifier)
    heads = StackedHeads(classifier, rates, device=device)
    generator = torch.Generator().manual_seed(seed)
    # BatchNorm cannot train on a batch of one, so a last image left alone sits this epoch out.
    batches = feature_batches(
        train, batch_size, generator=generator, drop_last=len(train) % batch_size == 1 < len(train)
    )
    heads.head.train()
    with tqdm(total=epochs * len(batches), desc=f"{len(rates)} heads", unit="batch", disable=not show_progress) as bar:
        for _ in range(epochs):
            for batch in batches:
                features, targets = head_batch(train, batch, device)
                heads.step(losses(heads.logits(features), targets))
                bar.update()
    accuracy, loss = validate(heads, validation, batch_size=batch_size, device=device)
    results = [HeadResult(*pair, *values) for pair, *values in zip(rates, accuracy, loss, strict=True)]
    order = sorted(range(len(rates)), key=lambda index: rank(results[index]))
    best = order[0]
    if not math.isfinite(results[best].validation_loss):
        raise ValueError(f"all {len(rates)} heads diverged; pass smaller learning rates than {min(learning_rates)}")
    heads.copy_to(classifier, best)
    return tuple(results[index] for index in order)


def decaying_names(classifier: nn.Module) -> set[str]:
    """Name the parameters of a classifier that weight decay is for, by the rule of `FineTuneModel.param_groups`.

    >>> decaying_names(nn.Linear(2, 2))
    {'weight'}

    Raises:
        ValueError: nothing in the classifier trains.
    """
    groups = build_param_groups(
        nn.Identity(),
        classifier,
        (),
        lr=1.0,
        backbone_lr=None,
        weight_decay=1.0,
        layer_decay=None,
        include_frozen=False,
    )
    names = (name for group in groups if group["weight_decay"] for name in group["param_names"])
    return {name.removeprefix("classifier.") for name in names}


def head_batch(data: TensorDataset, batch: Sequence[Tensor], device: torch.device) -> tuple[Any, Tensor]:
    """Move a batch of features to a device, and arrange it as ``(features, targets)`` for a classifier.

    >>> head_batch(TensorDataset(), (torch.zeros(1), torch.ones(1), torch.tensor([2])), torch.device("cpu"))
    ((tensor([0.]), tensor([1.])), tensor([2]))
    """
    *features, targets = (tensor.to(device) for tensor in batch)
    arranged = module_inputs(data, features)
    return (arranged[0] if len(arranged) == 1 else arranged), targets.long()


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute each head's mean cross entropy: (B, H, num_classes) and (B,) to (H,).

    >>> losses(torch.zeros(4, 3, 2), torch.zeros(4, dtype=torch.long))
    tensor([0.6931, 0.6931, 0.6931])
    """
    batch, heads = logits.shape[:2]
    repeated = targets.repeat_interleave(heads)
    return cross_entropy(logits.flatten(0, 1), repeated, reduction="none").view(batch, heads).mean(0)


@torch.no_grad()
def validate(
    heads: StackedHeads, validation: TensorDataset, *, batch_size: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Compute the accuracy and the mean loss of every head; accuracy 0 where the loss is not finite."""
    heads.head.eval()
    correct = torch.zeros(heads.count, device=device)
    loss = torch.zeros(heads.count, device=device)
    for batch in feature_batches(validation, batch_size):
        features, targets = head_batch(validation, batch, device)
        logits = heads.logits(features)
        correct += (logits.argmax(-1) == targets[:, None]).sum(0)
        loss += losses(logits, targets) * len(targets)
    accuracy = torch.where(loss.isfinite(), correct / len(validation), 0.0)
    return accuracy.tolist(), (loss / len(validation)).tolist()


def rank(result: HeadResult) -> tuple[float, float]:
    """Order heads by accuracy, then by loss; one that diverged has no accuracy and comes last (NaN has no order)."""
    loss = result.validation_loss
    return -result.validation_accuracy, loss if math.isfinite(loss) else math.inf
