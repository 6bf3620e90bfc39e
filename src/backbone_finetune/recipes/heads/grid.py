"""Many heads at once on cached features: a grid of learning rates and weight decays as one batched problem."""

from __future__ import annotations  # help() shows the names of types, not what pydantic checks

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, SkipValidation
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy, linear
from torch.utils.data import TensorDataset
from tqdm import tqdm

from backbone_finetune import FineTuneModel
from backbone_finetune.splitting.measures import count_classes

from ..checking import NotNegative, Positive, validated
from ..data.images import is_read
from ..data.targets import check_targets
from ..features.dataset import feature_batches, index_rows, module_inputs, on_device, select_rows
from ..features.extract import find_device_of
from ..sending import send
from .standardize import Standardization

_listed = BeforeValidator(lambda rates: list(rates) if isinstance(rates, Iterable) else rates)  # an array, too
Rates = Annotated[Sequence[NotNegative], _listed, Field(min_length=1)]


@dataclass(frozen=True)
class HeadResult:
    """A head of the grid, its validation accuracy, 0 to 1, and mean validation loss.

    A head that diverged has accuracy 0 and an infinite mean loss.

    >>> HeadResult(lr=1e-3, weight_decay=0.05, validation_accuracy=0.7, validation_loss=0.9).lr
    0.001
    """

    lr: float
    weight_decay: float
    validation_accuracy: float
    validation_loss: float


class StackedHeads:
    """Copies of one head, each with its own rates, that train at once: the first dimension of each tensor is H."""

    def __init__(self, head: nn.Module, rates: Sequence[tuple[float, float]], *, device: torch.device) -> None:
        self.head = copy.deepcopy(head).to(device)  # not trained itself: it defines the computation and the mode
        self.count, self.device = len(rates), device
        self.parameters, self.buffers = stack_module_state([self.head] * self.count)
        lr, weight_decay = torch.tensor(rates, dtype=torch.float64, device="cpu").T  # MPS has no float64
        decays = decaying_names(self.head)
        self.trained = {name: tensor for name, tensor in self.parameters.items() if tensor.requires_grad}
        self.rates: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        for name, tensor in self.trained.items():
            for into, values in ((self.rates, lr), (self.kept, 1 - lr * weight_decay * (name in decays))):
                into[name] = values.to(tensor.dtype).to(device).view(-1, *(1 for _ in tensor.shape[1:]))
        # The direction of Adam's step depends neither on the rate nor on the weights: torch's own AdamW takes a step
        # of rate 1 from zero, for all heads in one kernel, and each head goes along it at its own rate.
        self.steps = {name: torch.zeros_like(tensor) for name, tensor in self.trained.items()}
        self.optimizer = torch.optim.AdamW(self.steps.values(), lr=1.0, weight_decay=0.0, fused=True)

    def logits(self, features: Any) -> Tensor:
        """Compute (B, H, num_classes) for the same features in every head; dropout masks differ between heads."""
        if type(self.head) is nn.Linear and features.ndim == 2:
            # All heads together are one wide layer: one matrix product, in a fourth of the time of the batched one.
            bias = self.parameters.get("bias")
            wide = linear(features, self.parameters["weight"].flatten(0, 1), None if bias is None else bias.flatten())
            return wide.view(len(wide), self.count, -1)

        def one_head(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Any:
            return functional_call(self.head, (parameters, buffers), (features,))

        stacked: Tensor = vmap(one_head, out_dims=1, randomness="different")(self.parameters, self.buffers)
        return stacked

    def step(self, loss: Tensor) -> None:
        """Take one step of AdamW in every head, each for its own loss, (H,)."""
        gradients = torch.autograd.grad(loss.sum(), list(self.trained.values()))
        for step, gradient in zip(self.steps.values(), gradients, strict=True):
            step.grad = gradient.contiguous()  # the fused kernel ignores strides
        self.optimizer.step()
        with torch.no_grad():
            for name, tensor in self.trained.items():
                tensor.mul_(self.kept[name]).addcmul_(self.steps[name], self.rates[name])
                self.steps[name].zero_()

    @torch.no_grad()
    def validate(self, validation: TensorDataset, batch_size: int) -> tuple[list[float], list[float]]:
        """Compute every head's accuracy and mean loss, 0 and infinity if the loss is not finite."""
        self.head.eval()
        correct, total = (torch.zeros(self.count, device=self.device) for _ in range(2))
        batches = torch.split(torch.arange(len(validation), device="cpu"), batch_size)
        for batch in index_rows(on_device(validation, self.device).tensors, batches, self.device):
            features, targets = head_batch(validation, batch, self.device)
            logits = self.logits(features)
            correct += (logits.argmax(-1) == targets[:, None]).sum(0)
            total += _losses(logits, targets).sum(0)
        mean = total / len(validation)
        accuracy = (correct / len(validation)).masked_fill(~mean.isfinite(), 0)
        return accuracy.tolist(), mean.nan_to_num(math.inf, math.inf).tolist()


@validated
def fit_heads(
    classifier: nn.Module,
    train: SkipValidation[TensorDataset],
    validation: SkipValidation[TensorDataset],
    *,
    learning_rates: Rates,
    weight_decays: Rates = (0.0,),
    epochs: Positive,
    batch_size: Positive,
    device: torch.device | None = None,
    seed: int = 0,
    standardize: bool = False,
    show_progress: bool = True,
) -> tuple[HeadResult, ...]:
    """Train a head for each pair of a learning rate and a weight decay, all at once, and keep the best in place.

    As in DINOv2's linear evaluation (Oquab et al. 2023, section 7.1), all heads get the same batches of features,
    and the one with the highest validation accuracy (if equal, the lowest loss) is kept: ``classifier`` has its
    weights afterwards. Each head starts from ``classifier`` and trains with cross entropy, as it would alone with
    ``torch.optim.AdamW(model.param_groups(lr, weight_decay=weight_decay))``, up to rounding and the masks
    of dropout, which differ between heads. Returns all heads, best first.

    >>> data = TensorDataset(torch.eye(2), torch.tensor([0, 1]))
    >>> results = fit_heads(
    ...     nn.Linear(2, 2), data, data, learning_rates=[0.1, 1e-9], weight_decays=[0.0, 0.01], epochs=9, batch_size=2,
    ...     show_progress=False,
    ... )
    >>> len(results), results[0].lr, results[0].validation_accuracy
    (4, 0.1, 1.0)

    A linear head on (N, D) features is fastest: 32 of them cost little more than a few. With tuples of features, the
    classifier gets a tuple. A last batch of one image is left out.

    With ``standardize``, heads train on features of mean 0 and standard deviation 1 over ``train``, which makes the
    rates independent of the scale of the features. ``classifier`` then takes the features as they are.

    Raises:
        ValueError: a setting is out of range, there are no features, a target is not a class, nothing in
            the classifier trains, or every head diverged.
    """
    classes = count_classes(classifier)
    train, validation = check_features("train", train, classes), check_features("validation", validation, classes)
    rates = list(product(learning_rates, weight_decays))
    device = device or find_device_of(classifier)
    given = classifier
    standardization = Standardization.measure(train) if standardize else None
    if standardization is not None:
        classifier = copy.deepcopy(given)
        standardization.enter(classifier)
        train, validation = standardization.apply(train), standardization.apply(validation)
    heads = StackedHeads(classifier, rates, device=device)
    generator = torch.Generator().manual_seed(seed)
    alone = len(train) % batch_size == 1 < len(train)  # BatchNorm cannot train on a batch of one
    train = on_device(train, device)
    rows = TensorDataset(torch.arange(len(train), device="cpu"))
    batches = feature_batches(rows, batch_size, generator=generator, drop_last=alone)
    heads.head.train()
    bar = tqdm(total=epochs * len(batches), desc=f"{len(rates)} heads", unit="batch", disable=not show_progress)
    with torch.device("cpu"), bar:  # a loader draws its seed on the default device
        for _ in range(epochs):
            for batch in index_rows(train.tensors, [indices for (indices,) in batches], device):
                features, targets = head_batch(train, batch, device)
                heads.step(_losses(heads.logits(features), targets).mean(0))
                bar.update()
        accuracies, losses = heads.validate(validation, batch_size)
    order = sorted(range(len(rates)), key=lambda index: (-accuracies[index], losses[index]))
    if not math.isfinite(losses[order[0]]):
        raise ValueError(f"all {len(rates)} heads diverged; pass smaller learning rates than {min(learning_rates)}")
    own = dict(chain(classifier.named_parameters(), classifier.named_buffers()))
    with torch.no_grad():
        for name, tensor in chain(heads.parameters.items(), heads.buffers.items()):
            own[name].copy_(tensor[order[0]])
    if standardization is not None:
        standardization.leave(classifier)
        given.load_state_dict(classifier.state_dict())
    return tuple(HeadResult(*rates[index], accuracies[index], losses[index]) for index in order)


def check_features(name: str, data: TensorDataset, classes: int | None) -> TensorDataset:
    """Check that there are features, and that their targets are classes; return those of readable images."""
    if not isinstance(data, TensorDataset):
        raise ValueError(f"{name} is a {type(data).__name__}; pass what extract_features returns")
    if not (read := is_read(data.tensors[-1])).all():
        data = select_rows(data, read)
    if not len(data):
        raise ValueError(f"len({name}) = 0: expected one image or more")
    check_targets(name, data.tensors[-1], classes)
    return data


def decaying_names(classifier: nn.Module) -> set[str]:
    """Return the names of a classifier's parameters with weight decay; raise ValueError if nothing trains."""
    groups = FineTuneModel(nn.Identity(), classifier).param_groups(lr=1.0, weight_decay=1.0)
    names = (name for group in groups if group["weight_decay"] for name in group["param_names"])
    return {name.removeprefix("classifier.") for name in names}


def head_batch(data: TensorDataset, batch: Sequence[Tensor], device: torch.device) -> tuple[Any, Tensor]:
    """Move a batch of features to a device, and arrange it as ``(features, targets)`` for a classifier."""
    *features, targets = (send(tensor, device) for tensor in batch)
    arranged = module_inputs(data, features)
    return (arranged[0] if len(arranged) == 1 else arranged), targets


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute each head's cross entropy of each image: outputs (B, H, K) and targets (B,) to (B, H)."""
    repeated = targets.long()[:, None].expand(logits.shape[:2])
    return cross_entropy(logits.flatten(0, 1), repeated.flatten(), reduction="none").view(logits.shape[:2])
