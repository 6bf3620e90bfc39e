"""Whole runs: 20 epochs above a frozen backbone that runs once, beside the same epochs as others train them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness.environment import installed_version
from harness.ratios import Target
from harness.timing import Clock, Interval, milliseconds_of, paired_ratio, take_turns, warm_up
from subjects.networks import NUM_CLASSES, input_size_of
from subjects.peer_methods import METHODS, Blueprint, Method, make_blueprint
from subjects.variants import fused_on
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import FeatureCache, Phase, TrainerConfig, fine_tune, make_accelerator
from backbone_finetune.recipes.features.frozen_pass import FrozenPass, autocast_dtype, front_of_backbone, in_eval

# What ours is held against, and the most that ours may cost of it: in float32, and as its device likes it best.
PEERS = {
    "the article's recipe": (1 / 25, 1 / 60),
    "fastai Learner.freeze": (1 / 40, 1 / 40),
    "Lightning freeze, train_bn=True": (1 / 40, 1 / 40),
}
CACHED_OF_ONE_PASS = 1.10


@dataclass(frozen=True)
class Task:
    """A network, and the images that every method trains on: random ones, as their content changes no cost."""

    model: str
    blueprint: Blueprint
    train: TensorDataset  # (N, 3, H, W) and (N,)
    test: TensorDataset
    batch_size: int
    epochs: int
    device: torch.device


@dataclass
class Samples:
    """Milliseconds by what was timed; samples at the same place were taken in the same turn. `errors` has the rest."""

    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def make_task(  # noqa: PLR0917  all that a task is made of
    model: str, images: int, image_size: int | None, batch_size: int, epochs: int, device: torch.device
) -> Task:
    """Build the network, and draw random images, with as many more for one batch of a test, which only ours looks at.

    ValueError where the network's classifier is not one layer, which is what the peers leave trainable.
    """
    size, arguments = input_size_of(model, image_size)
    blueprint = make_blueprint(model, NUM_CLASSES, size[-1], arguments)
    generator = torch.Generator().manual_seed(0)
    train, test = (
        TensorDataset(
            torch.randn(count, *size, generator=generator), torch.randint(NUM_CLASSES, (count,), generator=generator)
        )
        for count in (images, batch_size)
    )
    return Task(model, blueprint, train, test, batch_size, epochs, device)


def time_in_turns(
    calls: Mapping[str, Callable[[], object]], turns: int, clock: Clock, taken: dict[str, list[float]], *, title: str
) -> None:
    """Warm up, then time calls in turns into `taken`, which has all whole turns should this be interrupted."""
    with tqdm(total=(1 + turns) * len(calls), desc=title, leave=False, disable=None) as bar:
        for call in calls.values():
            warm_up(call, clock, at_most=2)
            bar.update()

        def visit(call: Callable[[], object]) -> float:
            bar.update()
            return milliseconds_of(call, clock)

        for turn in take_turns([partial(visit, call) for call in calls.values()], turns):
            for label, elapsed in zip(calls, turn, strict=True):
                taken.setdefault(label, []).append(elapsed)


def time_runs(task: Task, turns: int, clock: Clock, samples: Samples) -> None:
    """Time, turn by turn: a whole run of ours, one pass of the backbone, and the next epoch of each peer's run."""
    blueprint = task.blueprint
    calls: dict[str, Callable[[], object]] = {}
    for precision in precisions(task, blueprint.network):
        model = FineTuneModel.from_timm(copy.deepcopy(blueprint.network)).freeze_backbone()
        own_way = precision != "float32"
        calls[f"ours, {precision}"] = partial(run_ours, model, task, own_way=own_way)
        calls[f"one pass, {precision}"] = partial(run_backbone, model, task, own_way=own_way)
    calls["one pass again"] = calls["one pass, float32"]
    for method in (method for method in METHODS if method.label in PEERS):
        if installed_version(method.package) is None:
            samples.errors[method.label] = f"{method.package} is not installed"
        else:
            calls[method.label] = epoch_of(method, blueprint.network, partial(method.freeze, blueprint), task)
    time_in_turns(calls, turns, clock, samples.milliseconds, title="runs")


def precisions(task: Task, network: nn.Module) -> list[str]:
    """List how ours runs: in float32 and, where the device gains from it, in the bf16 that it then takes by itself."""
    return ["float32"] if autocast_dtype(network, task.device) is None else ["float32", "bf16"]


def run_ours(model: FineTuneModel, task: Task, *, own_way: bool) -> None:
    """Train the classifier as `backbone-finetune train` does: features into a cache on disk, then all epochs."""
    with TemporaryDirectory() as folder:
        caches = (FeatureCache(Path(folder, "train"), "train"), FeatureCache(Path(folder, "test"), "test"))
        loop = TrainerConfig(
            make_accelerator(task.device),
            batch_size=task.batch_size,
            caches=caches,
            autocast_features=own_way,
            # By default ours would run the backbone in a process per core, beside peers on one thread.
            workers=0 if torch.get_num_threads() == 1 else None,
            show_progress=False,
        )
        fine_tune(model, task.train, task.test, [Phase(epochs=task.epochs, lr=1e-3)], loop)


def run_backbone(model: FineTuneModel, task: Task, *, own_way: bool) -> None:
    """Run the backbone over all images once, and keep nothing: what no cached run can do without."""
    narrow = autocast_dtype(model.backbone, task.device) if own_way else None
    run = FrozenPass(front_of_backbone(model), task.device, narrow)
    with in_eval(model.backbone):
        for data in (task.train, task.test):
            for _ in run.over(DataLoader(data, task.batch_size)):
                pass


def epoch_of(
    method: Method, network: nn.Module, freeze: Callable[[nn.Module], nn.Module], task: Task
) -> Callable[[], None]:
    """Freeze a copy of the network by a method; give its next epoch, with Adam at 0.001 as the article has it."""
    module = freeze(copy.deepcopy(network)).to(task.device)
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=1e-3, fused=fused_on(task.device))
    loader = DataLoader(task.train, task.batch_size, shuffle=True)
    return partial(train_plainly, module, optimizer, loader, task.device)


def train_plainly(
    module: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], device: torch.device
) -> None:
    """Train an epoch as everyone writes it, all of the module in train mode."""
    module.train()
    for images, targets in loader:
        optimizer.zero_grad()
        cross_entropy(module(images.to(device)), targets.to(device)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def judge_runs(task: Task, samples: Samples) -> Iterator[Target]:
    """Compare ours with one pass of the backbone, and with the same number of the peers' epochs."""
    taken = samples.milliseconds
    noise = paired_ratio(taken["one pass again"], taken["one pass, float32"])
    for precision in ("float32", "bf16"):
        what = f"{task.epochs} frozen epochs, cached, {precision} / one pass of the backbone"
        if f"ours, {precision}" not in taken:
            yield Target(task.model, what, CACHED_OF_ONE_PASS, remark="this device has no bf16 instructions")
            continue
        ratio = paired_ratio(taken[f"ours, {precision}"], taken[f"one pass, {precision}"])
        yield Target(task.model, what, CACHED_OF_ONE_PASS, ratio, noise if precision == "float32" else None)
    for label, (at_most, at_most_own_way) in PEERS.items():
        for precision, limit in (("float32", at_most), ("bf16", at_most_own_way)):
            what = f"{task.epochs} epochs, ours, {precision} / {label}"
            if label in samples.errors or f"ours, {precision}" not in taken:
                remark = samples.errors.get(label, "this device has no bf16 instructions")
                yield Target(task.model, what, limit, remark=remark)
                continue
            ratio = against_epochs(taken[f"ours, {precision}"], taken[label], task.epochs)
            yield Target(task.model, what, limit, ratio, remark=f"{1 / ratio.median:.1f} times as fast")


def against_epochs(whole_runs: Sequence[float], epochs: Sequence[float], count: int) -> Interval:
    """Ratio of a whole run to so many epochs of another, each measured in the same turn."""
    return paired_ratio(whole_runs, [elapsed * count for elapsed in epochs])
