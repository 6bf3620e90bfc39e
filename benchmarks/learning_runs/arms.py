"""The ways to train that are compared, in plain loops on the core: a frontier is recorded once for each cached view."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from backbone_finetune import FineTuneModel
from backbone_finetune.frontier import Frontier, find_frontier
from learning_runs.sets import Images, Views

BATCH = 32
HEAD_LR, BACKBONE_LR, WEIGHT_DECAY = 1e-3, 1e-4, 0.01
FRESH = 0  # views: a new one in each epoch, which nothing can cache
SHOWN = {"plain": 1, "mirror": 2, "views": 4}  # how many views of a test image are averaged


@dataclass(frozen=True)
class Arm:
    """One way to train. With `views=1` that view is the image as it is; other views are augmented.

    `trainable_groups` is None for everything. A head is trained before what else trains, unless `head_first` is off.
    """

    name: str
    trainable_groups: int | None = 0
    views: int = 1
    norm_eval: bool = True
    head_first: bool = True
    recipe: bool = False  # the article's: all modules in train mode, Adam


ARMS = (
    Arm("frozen head"),
    Arm("frozen head, 8 views", views=8),
    Arm("three groups, 1 view", 3, 1),
    Arm("three groups, 4 views", 3, 4),
    Arm("three groups, 8 views", 3, 8),
    Arm("three groups, fresh views", 3, FRESH),
    Arm("three groups, 1 view, BatchNorm trains", 3, 1, norm_eval=False),
    Arm("three groups, 8 views, BatchNorm trains", 3, 8, norm_eval=False),
    Arm("the article's recipe", recipe=True),
    Arm("everything at once, fresh views", None, FRESH, head_first=False),
    Arm("everything at once, fresh views, BatchNorm trains", None, FRESH, norm_eval=False, head_first=False),
)


@dataclass(frozen=True)
class Outcome:
    """What an arm reached on one split: accuracies by how the test images were shown, 0 to 1, and its CPU seconds."""

    arm: str
    data: str
    seed: int
    accuracy: dict[str, float]
    cpu_seconds: float


@dataclass(frozen=True)
class Plan:
    """For how long: epochs of a head, and of whatever trains in the backbone."""

    head_epochs: int = 20
    backbone_epochs: int = 10


def train_arm(arm: Arm, network: FineTuneModel, train: Images, views: Views, plan: Plan) -> tuple[FineTuneModel, float]:
    """Train a copy of a network in one way, and give it with the CPU seconds that all of it took."""
    started = time.process_time()
    model = copy.deepcopy(network)
    model.norm_eval = arm.norm_eval
    everything = len(model.layer_groups)
    groups = everything if arm.trainable_groups is None else arm.trainable_groups
    if arm.recipe:
        _train_as_the_article(model, train, views, plan.head_epochs)
    elif groups == 0:
        _train(model, train, views, arm.views, plan.head_epochs)
    else:
        if arm.head_first:
            _train(model, train, views, 1, plan.head_epochs)
        model.freeze_backbone(trainable_groups=groups)
        _train(model, train, views, arm.views, plan.backbone_epochs)
    return model, time.process_time() - started


def _train(model: FineTuneModel, train: Images, views: Views, count: int, epochs: int) -> None:
    """Train what trains, on the frontier where there is one and the views can be cached."""
    model.train()
    optimizer = torch.optim.AdamW(
        model.param_groups(lr=HEAD_LR, backbone_lr=BACKBONE_LR, weight_decay=WEIGHT_DECAY), fused=True
    )
    if count == FRESH:
        for epoch in range(epochs):
            _epoch(optimizer, model, (_channels_last(train.view(views, epoch)),), train.targets, epoch)
        return
    shown = [train.view(views, None if count == 1 else number) for number in range(count)]
    with torch.random.fork_rng():
        frontier = find_frontier(model, _channels_last(shown[0][:BATCH]))
    if not isinstance(frontier, Frontier):
        raise ValueError(f"cached views need a frontier: {frontier.reason}")
    kept = [_record(frontier, view) for view in shown]
    index = torch.arange(len(train.targets))
    for epoch in range(epochs):
        turn = (epoch + index) % count
        tensors = [torch.stack(parts)[turn, index] for parts in zip(*kept, strict=True)]
        _epoch(optimizer, lambda *batch: frontier.replay(batch), tensors, train.targets, epoch)


def _record(frontier: Frontier, images: Tensor) -> list[Tensor]:
    batches = [frontier.record(_channels_last(batch)) for batch in images.split(BATCH)]  # type: ignore[no-untyped-call]
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def _train_as_the_article(model: FineTuneModel, train: Images, views: Views, epochs: int) -> None:
    """Freeze by `requires_grad` alone and leave all modules in train mode, as the article does."""
    optimizer = torch.optim.Adam(model.classifier.parameters(), lr=HEAD_LR)
    images = _channels_last(train.view(views, None))
    for module in model.modules():
        module.training = True
    for epoch in range(epochs):
        _epoch(optimizer, model, (images,), train.targets, epoch)


def _epoch(
    optimizer: torch.optim.Optimizer,
    forward: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    targets: Tensor,
    epoch: int,
) -> None:
    """Take a step for each batch, in an order that all arms share; a last image alone is no batch for BatchNorm."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(epoch))
    for chosen in order.split(BATCH):  # type: ignore[no-untyped-call]
        if len(chosen) > 1:
            optimizer.zero_grad()
            cross_entropy(forward(*(tensor[chosen] for tensor in tensors)), targets[chosen]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def show_test_images(test: Images, views: Views) -> list[Tensor]:
    """Return the test images as they are, mirrored, and in two augmented views."""
    plain = test.view(views, None)
    return [plain, plain.flip(-1), test.view(views, 0), test.view(views, 1)]


def accuracies(model: nn.Module, shown: Sequence[Tensor], targets: Tensor) -> dict[str, float]:
    """Return the share of right answers by `SHOWN`, from the mean of the probabilities over the views."""
    model.eval()
    with torch.no_grad():
        answers = torch.stack(
            [torch.cat([model(_channels_last(batch)).softmax(-1) for batch in view.split(BATCH)]) for view in shown]  # type: ignore[no-untyped-call]
        )
    return {
        name: (answers[:count].mean(0).argmax(-1) == targets).double().mean().item() for name, count in SHOWN.items()
    }


def run_split(
    data: str,
    seed: int,
    sides: tuple[Images, Images],
    arms: Sequence[Arm],
    *,
    network: FineTuneModel,
    views: Views,
    plan: Plan,
) -> Iterator[Outcome]:
    """Train in all ways on one split, from the same weights, and test each."""
    train, test = sides
    shown = show_test_images(test, views)
    for arm in arms:
        model, seconds = train_arm(arm, network, train, views, plan)
        yield Outcome(arm.name, data, seed, accuracies(model, shown, test.targets), seconds)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
