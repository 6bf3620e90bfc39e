"""Training on features that are ready: an epoch beside a bare loop's, and many heads at once beside one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from harness.ratios import Target
from harness.timing import Clock, paired_ratio
from subjects.networks import NUM_CLASSES
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import (
    FeatureCache,
    Phase,
    TrainerConfig,
    extract_features,
    feature_batches,
    fit_heads,
    make_accelerator,
)
from backbone_finetune.recipes.training.epoch import train_epoch
from backbone_finetune.recipes.training.phase_state import prepared_phase
from backbone_finetune.recipes.training.progress import Progress
from caching.training import Samples, time_in_turns

LEARNING_RATES = tuple(1e-4 * 2**step for step in range(8))
WEIGHT_DECAYS = (0.0, 0.01, 0.1, 0.3)
HEADS = len(LEARNING_RATES) * len(WEIGHT_DECAYS)


@dataclass(frozen=True)
class HeadTask:
    """Random features, as the backbone would have given them, mapped from a cache on disk, and the same in memory."""

    model: str
    cached: TensorDataset  # (N, D) and (N,)
    in_memory: TensorDataset
    batch_size: int
    epochs: int
    device: torch.device

    @property
    def width(self) -> int:
        """How wide the features are."""
        return int(self.in_memory.tensors[0].shape[1])


def make_head_task(  # noqa: PLR0917  all that a task is made of
    model: str, count: int, width: int, batch_size: int, epochs: int, device: torch.device
) -> HeadTask:
    """Draw random features, and map them from a cache, whose files go with the last tensor."""
    generator = torch.Generator().manual_seed(0)
    in_memory = TensorDataset(
        torch.randn(count, width, generator=generator), torch.randint(NUM_CLASSES, (count,), generator=generator)
    )
    with TemporaryDirectory() as folder:
        cached = extract_features(
            FineTuneModel(nn.Identity(), nn.Linear(width, NUM_CLASSES)),
            DataLoader(in_memory, batch_size),
            device=torch.device("cpu"),
            cache=FeatureCache(Path(folder, "features"), "random", memory_share=0.0),
        )
    return HeadTask(model, cached, in_memory, batch_size, epochs, device)


def time_epochs(task: HeadTask, turns: int, clock: Clock, samples: Samples) -> None:
    """Time an epoch of our training loop on the cache, beside a plain loop over the same in memory."""
    model = FineTuneModel(nn.Identity(), nn.Linear(task.width, NUM_CLASSES))
    config = TrainerConfig(make_accelerator(task.device), batch_size=task.batch_size, show_progress=False)
    phase = Phase(epochs=10**9, lr=1e-3, weight_decay=0.01)
    with prepared_phase(model, task.cached, None, phase=phase, changed=set(), config=config) as state:
        # The phase has put the features through its backbone, the identity, into memory: back to what is on disk.
        state.data = replace(state.data, train=task.cached)
        calls: dict[str, Callable[[], object]] = {
            "cached epoch": partial(train_epoch, state, Progress(), config, title=""),
            "plain epoch": partial(plain_epoch, PlainHead(task), task.in_memory),
            "plain epoch again": partial(plain_epoch, PlainHead(task), task.in_memory),
        }
        time_in_turns(calls, turns, clock, samples.milliseconds, title="epochs")


class PlainHead:
    """A bare linear head with AdamW, fused as ours is, and the order in which it sees its images."""

    def __init__(self, task: HeadTask, lr: float = 1e-3, weight_decay: float = 0.01) -> None:
        self.layer = nn.Linear(task.width, NUM_CLASSES).to(task.device)
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        self.batch_size = task.batch_size
        self.device = task.device

    def step(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """Take one step."""
        self.optimizer.zero_grad()
        cross_entropy(self.layer(features.to(self.device)), targets.to(self.device)).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def plain_epoch(head: PlainHead, data: TensorDataset) -> None:
    """Train an epoch as everyone writes it: a shuffling DataLoader over a TensorDataset."""
    for features, targets in DataLoader(data, head.batch_size, shuffle=True):
        head.step(features, targets)


def judge_epochs(task: HeadTask, samples: Samples) -> Iterator[Target]:
    """Compare the epochs."""
    taken = samples.milliseconds
    yield Target(
        task.model,
        "cached epoch, loss, accuracy and a test of one batch included / plain epoch over a TensorDataset",
        1.05,
        paired_ratio(taken["cached epoch"], taken["plain epoch"]),
        paired_ratio(taken["plain epoch again"], taken["plain epoch"]),
    )


def time_heads(task: HeadTask, turns: int, clock: Clock, samples: Samples) -> None:
    """Time a grid of heads as one, beside the same heads one after the other on the same cache."""
    calls = {"heads together": partial(train_together, task), "heads one by one": partial(train_one_by_one, task)}
    time_in_turns(calls, turns, clock, samples.milliseconds, title=f"{HEADS} heads")


def train_together(task: HeadTask) -> None:
    """Train the grid as one batched problem."""
    fit_heads(
        nn.Linear(task.width, NUM_CLASSES).to(task.device),
        task.cached,
        task.cached,
        learning_rates=LEARNING_RATES,
        weight_decays=WEIGHT_DECAYS,
        epochs=task.epochs,
        batch_size=task.batch_size,
        device=task.device,
        show_progress=False,
    )


def train_one_by_one(task: HeadTask) -> None:
    """Train each head of the grid by itself: the fastest loader there is, torch's own AdamW, and nothing else."""
    for lr, weight_decay in product(LEARNING_RATES, WEIGHT_DECAYS):
        head = PlainHead(task, lr, weight_decay)
        for _ in range(task.epochs):
            for features, targets in feature_batches(task.cached, task.batch_size, generator=torch.Generator()):
                head.step(features, targets)


def judge_heads(task: HeadTask, samples: Samples, full_run_ms: float) -> Iterator[Target]:
    """Compare the grid as one with its heads one by one; beside it, what as many full runs would take."""
    taken = samples.milliseconds
    ratio = paired_ratio(taken["heads together"], taken["heads one by one"])
    what = f"{HEADS} heads together / one by one, {task.epochs} epochs on {len(task.cached)} cached features"
    remark = f"{HEADS} runs of the recipe, from the epochs that were timed: {HEADS} x {full_run_ms / 1e3:,.1f} s"
    yield Target(task.model, what, 1 / 3, ratio, remark=remark)
