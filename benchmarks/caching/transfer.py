"""What is learnt in the same time: real images, real ImageNet weights, four ways to train, several splits."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import TypeVar

import torch
from harness.results import table
from harness.timing import clock_for
from subjects.variants import fused_on
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import Phase, TrainerConfig, extract_features, fine_tune, fit_heads, make_accelerator
from backbone_finetune.recipes.commands.settings import CLIPART
from backbone_finetune.recipes.data.groups import split
from backbone_finetune.recipes.data.images import ImageDataset, LabelledFolder
from backbone_finetune.recipes.data.sources.finding import find_images
from backbone_finetune.recipes.models.file import build_transform
from backbone_finetune.recipes.models.weights import load_packaged_network
from caching.heads import LEARNING_RATES, WEIGHT_DECAYS
from caching.training import train_plainly

Result = TypeVar("Result")
RECIPE, BEST_HEAD = "the article's recipe", "best of 32 heads on cached features"
LP_FT, PLAIN = "LP-FT: head first, then everything", "plain fine-tuning"
# Each pair is compared at equal cost: the first two train for as many epochs, the other two for as long.
PAIRS = ((BEST_HEAD, RECIPE), (LP_FT, PLAIN))
TEST_SHARE, VALIDATION_SHARE = 0.3, 0.2
FINE_TUNING_RATES = (1e-4, 3e-4, 1e-3)


@dataclass(frozen=True)
class Outcome:
    """One way to train, on one split: accuracy on its test images, 0 to 1, seconds, and the rate it chose."""

    method: str
    seed: int
    accuracy: float
    seconds: float
    epochs: int
    rate: float


@dataclass(frozen=True)
class Images:
    """One split. What chooses a rate chooses it on `validation`; nothing is chosen by the test images."""

    fit: TensorDataset  # (N, 3, H, W) and (N,)
    validation: TensorDataset
    both: TensorDataset
    test: TensorDataset
    num_classes: int


@dataclass(frozen=True)
class Plan:
    """How long: epochs of the frozen classifier, and of what follows it in LP-FT."""

    batch_size: int = 32
    frozen_epochs: int = 20
    fine_tuning_epochs: int = 5
    image_size: int = 96
    rates: tuple[float, ...] = FINE_TUNING_RATES


def compare_methods(seeds: int, plan: Plan, device: torch.device) -> Iterator[Outcome]:
    """Train in all four ways on as many splits of the packaged clipart as there are seeds."""
    network = load_packaged_network()
    configuration = resolve_model_data_config(network, args={"input_size": (3, plan.image_size, plan.image_size)})  # type: ignore[no-untyped-call]
    dataset = ImageDataset(folder := find_images(CLIPART), build_transform(configuration))
    # Decoded once: all methods see the same tensors, and none waits for the disk.
    images = torch.stack([dataset[index][0] for index in tqdm(range(len(dataset)), desc="images", leave=False)])
    for seed in range(seeds):
        drawn = draw_split(folder, images, seed)
        torch.manual_seed(seed)
        for train in (train_recipe, train_best_head, train_head_first_and_plainly):
            yield from train(copy.deepcopy(network), drawn, seed, plan, device)


def draw_split(folder: LabelledFolder, images: Tensor, seed: int) -> Images:
    """Hold out test images of each class, and of the rest some to choose rates by."""
    position = {path: index for index, path in enumerate(folder.paths)}

    def take(part: LabelledFolder) -> TensorDataset:
        return TensorDataset(images[[position[path] for path in part.paths]], torch.tensor(part.targets))

    both, test = split(folder, test_share=TEST_SHARE, seed=seed)
    fit, validation = split(both, test_share=VALIDATION_SHARE, seed=seed)
    return Images(take(fit), take(validation), take(both), take(test), len(folder.class_names))


def train_recipe(network: nn.Module, images: Images, seed: int, plan: Plan, device: torch.device) -> Iterator[Outcome]:
    """Train as the article does: names, `requires_grad`, Adam at 0.001, and `model.train()` for all of it."""
    network.reset_classifier(images.num_classes)  # type: ignore[operator]
    for name, parameter in network.named_parameters():
        parameter.requires_grad = "classifier" in name
    network.to(device)
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=1e-3, fused=fused_on(device))
    loader = DataLoader(images.both, plan.batch_size, shuffle=True)

    def train() -> None:
        for _ in range(plan.frozen_epochs):
            train_plainly(network, optimizer, loader, device)

    _, seconds = timed(train, device)
    accuracy = accuracy_of(network, images.test, plan.batch_size, device)
    yield Outcome(RECIPE, seed, accuracy, seconds, plan.frozen_epochs, 1e-3)


def train_best_head(
    network: nn.Module, images: Images, seed: int, plan: Plan, device: torch.device
) -> Iterator[Outcome]:
    """Choose among 32 heads on the validation images, then train one as chosen on those too, as the recipe does."""
    model = FineTuneModel.from_timm(network, num_classes=images.num_classes).freeze_backbone()
    best, seconds = timed(lambda: fit_best_head(model, images, plan, device), device)
    accuracy = accuracy_of(model, images.test, plan.batch_size, device)
    yield Outcome(BEST_HEAD, seed, accuracy, seconds, plan.frozen_epochs, best)


def fit_best_head(model: FineTuneModel, images: Images, plan: Plan, device: torch.device) -> float:
    """Choose among the heads, fit one as chosen on all training images, and return its learning rate."""
    first = copy.deepcopy(model.classifier)
    fit, validation, both = (
        extract_features(model, DataLoader(part, plan.batch_size), device=device)
        for part in (images.fit, images.validation, images.both)
    )
    best = fit_heads(
        model.classifier,
        fit,
        validation,
        learning_rates=LEARNING_RATES,
        weight_decays=WEIGHT_DECAYS,
        epochs=plan.frozen_epochs,
        batch_size=plan.batch_size,
        device=device,
        show_progress=False,
    )[0]
    model.classifier.load_state_dict(first.state_dict())
    fit_heads(
        model.classifier,
        both,
        validation,
        learning_rates=[best.lr],
        weight_decays=[best.weight_decay],
        epochs=plan.frozen_epochs,
        batch_size=plan.batch_size,
        device=device,
        show_progress=False,
    )
    return best.lr


def train_head_first_and_plainly(
    network: nn.Module, images: Images, seed: int, plan: Plan, device: torch.device
) -> Iterator[Outcome]:
    """Train head first, then everything; and everything at once for as many epochs as the same time allows.

    Each at all of the rates, one for the whole network as in Kumar et al. 2022, the best on validation kept.
    """
    loop = TrainerConfig(make_accelerator(device), batch_size=plan.batch_size, seed=seed, show_progress=False)
    model = FineTuneModel.from_timm(network, num_classes=images.num_classes)
    tried: dict[str, list[tuple[float, Outcome]]] = {LP_FT: [], PLAIN: []}
    for rate in plan.rates:
        everything = Phase(
            epochs=plan.fine_tuning_epochs,
            trainable_groups=len(model.layer_groups),
            lr=rate,
            backbone_lr=rate,
            cosine=True,
        )
        head_first, plain = copy.deepcopy(model), copy.deepcopy(model)

        def seconds_of(trained: FineTuneModel, phase: Phase) -> float:
            return timed(partial(fine_tune, trained, images.fit, images.validation, [phase], loop), device)[1]

        frozen_seconds = seconds_of(head_first, Phase(epochs=plan.frozen_epochs, lr=1e-3))
        seconds = frozen_seconds + (unfrozen_seconds := seconds_of(head_first, everything))
        # The other gets the time of the head's epochs as well, rounded up to one whole epoch more.
        epochs = plan.fine_tuning_epochs + math.ceil(plan.fine_tuning_epochs * frozen_seconds / unfrozen_seconds)
        plain_seconds = seconds_of(plain, replace(everything, epochs=epochs))
        for method, trained, spent, count in (
            (LP_FT, head_first, seconds, plan.frozen_epochs + plan.fine_tuning_epochs),
            (PLAIN, plain, plain_seconds, epochs),
        ):
            on_validation, on_test = (
                accuracy_of(trained, data, plan.batch_size, device) for data in (images.validation, images.test)
            )
            tried[method].append((on_validation, Outcome(method, seed, on_test, spent, count, rate)))
    for outcomes in tried.values():
        yield max(outcomes, key=itemgetter(0))[1]


def timed(train: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Train, and give what that returned and its seconds, all that was queued on the device included."""
    result, milliseconds = clock_for(device).time(train)
    return result, milliseconds / 1e3


def accuracy_of(module: nn.Module, data: TensorDataset, batch_size: int, device: torch.device) -> float:
    """Return the share of images whose largest logit is their target."""
    module.eval()
    with torch.no_grad():
        right = [
            module(inputs.to(device)).argmax(-1).cpu() == targets for inputs, targets in DataLoader(data, batch_size)
        ]
    return torch.cat(right).double().mean().item()


def describe_outcomes(outcomes: Sequence[Outcome]) -> str:
    """Format the methods by pair, with the verdict on each pair."""
    parts = []
    for challenger, champion in PAIRS:
        rows = [[method, *_row(outcomes, method)] for method in (challenger, champion)]
        parts.append(table(["", "test accuracy", "by seed", "seconds", "epochs", "rates"], rows))
        parts.append(f"\n{challenger} {judge(outcomes, challenger, champion)} {champion}.\n")
    return "\n".join(parts)


def judge(outcomes: Sequence[Outcome], challenger: str, champion: str) -> str:
    """Describe by how much one method beats another on the same splits, or that it does not."""
    ours, theirs = (
        {outcome.seed: outcome.accuracy for outcome in outcomes if outcome.method == method}
        for method in (challenger, champion)
    )
    gains = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    if not gains:
        return "was not compared with"
    wins = sum(gain > 0 for gain in gains)
    verdict = "beats" if statistics.mean(gains) > 0 and wins > len(gains) / 2 else "does not beat"
    return f"({statistics.mean(gains):+.3f} on average, {wins} of {len(gains)} splits won) {verdict}"


def _row(outcomes: Sequence[Outcome], method: str) -> list[str]:
    own = [outcome for outcome in outcomes if outcome.method == method]
    if not own:
        return ["", "", "", "", ""]
    accuracies = [outcome.accuracy for outcome in own]
    spread = f" ± {statistics.stdev(accuracies):.3f}" if len(own) > 1 else ""
    return [
        f"{statistics.mean(accuracies):.3f}{spread}",
        ", ".join(f"{accuracy:.3f}" for accuracy in accuracies),
        f"{statistics.mean(outcome.seconds for outcome in own):.1f}",
        ", ".join(str(epochs) for epochs in dict.fromkeys(outcome.epochs for outcome in own)),
        ", ".join(f"{outcome.rate:g}" for outcome in own),
    ]
