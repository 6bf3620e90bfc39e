"""What ``backbone-finetune train`` does, from a folder of pictures to a model file and the record of its training."""

import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor

from backbone_finetune import FineTuneModel, __version__

from .base_weights import base_source, remember_base
from .metrics import Metrics, describe
from .model_file import TrainedModel, build_transform, save_trained_changes, save_trained_model
from .networks import load_network
from .output import MODEL_FILE, check_output_folder, make_output_folder, replacing
from .pictures import PictureDataset, find_pictures, leave_out_broken_pictures, split
from .reference import chance_accuracy, random_backbone_accuracy, raw_pixel_accuracy
from .timing import measure_backward
from .training import EpochResult, Hyperparameters, fine_tune

__all__ = ["TrainSettings", "train"]

CLIPART = Path(__file__).parent / "clipart" / "pictures"
# The clipart is stored at 64 pixels. Five-fold cross-validation on its training pictures alone gave .66 at 96 pixels,
# .69 at 128 and .73 at 160, for 2 and 4 times the time; a first look at a library had better be quick.
CLIPART_INPUT_SIZE = (3, 96, 96)
TEST_SHARE = 0.3
TIMED_BATCH_SIZE = 16


@dataclass(frozen=True)
class TrainSettings:
    """What to train on what. Left alone: the packaged ImageNet weights, on the packaged clipart.

    ``pictures`` is a folder with a sub-folder per class. ``architecture`` is a name of timm; its weights are random
    unless they come from the hub (``pretrained``) or from a file (``checkpoint``). With ``trainable_only`` the model
    file holds what training changed, and loads on top of these weights alone.

    >>> TrainSettings(trainable_groups=1).output
    PosixPath('fine-tuned')
    """

    pictures: Path | None = None
    architecture: str | None = None
    pretrained: bool = False
    checkpoint: Path | None = None
    trainable_groups: int = 0
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    output: Path = Path("fine-tuned")
    trainable_only: bool = False
    overwrite: bool = False
    device: str = "cpu"


def train(settings: TrainSettings) -> Metrics:
    """Fine-tune a model, hold it against chance, a random backbone and raw pixels, and write all of it down.

    It prints what it does. Into ``settings.output`` go ``curves.png``, ``metrics.json`` and, last,
    ``model.safetensors``. What can be wrong with the settings or the pictures is found out before the training, and an
    earlier model there stays until the new one takes its place.

    >>> train(TrainSettings(pictures=Path("no such folder")))
    Traceback (most recent call last):
    ...
    FileNotFoundError: no such folder: there is no such folder; ...

    Raises:
        FileExistsError: the output folder already holds a finished model.
        FileNotFoundError: the pictures or the checkpoint are not there.
        ModuleNotFoundError: matplotlib or the packaged weights are not installed.
        ValueError: the settings or the pictures are not fit for training; the message says how to make them so.
    """
    start = time.monotonic()
    check_output_folder(settings.output, overwrite=settings.overwrite)
    device = find_device(settings.device)
    found = find_pictures(settings.pictures or CLIPART)
    draw_curves = import_draw_curves()
    source = (
        base_source(settings.architecture, pretrained=settings.pretrained, checkpoint=settings.checkpoint)
        if settings.trainable_only
        else None
    )
    hyperparameters = settings.hyperparameters
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(hyperparameters.seed)
        architecture, weights, network = load_network(
            settings.architecture, pretrained=settings.pretrained, checkpoint=settings.checkpoint
        )
        model = FineTuneModel.from_timm(network, num_classes=len(found.class_names))
        model.freeze_backbone(trainable_groups=settings.trainable_groups)
        base = remember_base(model, source, weights) if source is not None else None

        folder, skipped = leave_out_broken_pictures(found)
        for message in skipped:
            print(f"skipped: {message}", file=sys.stderr)
        train_folder, test_folder = split(folder, test_share=TEST_SHARE, seed=hyperparameters.seed)
        make_output_folder(settings.output)
        counts = (len(train_folder.paths), len(test_folder.paths))
        print(
            f"pictures: {sum(counts)} in {len(folder.class_names)} classes from {folder.root}\n"
            f"          {counts[0]} to train, {counts[1]} to test, {len(skipped)} broken ones skipped\n"
            f"model:    {architecture}, {weights}, on {device}\n"
        )
        model.print_trainable_parameters()
        print(flush=True)

        data_config = choose_data_config(model, settings)
        transform = build_transform(data_config)
        train_data, test_data = PictureDataset(train_folder, transform), PictureDataset(test_folder, transform)
        history = fine_tune(model, train_data, test_data, hyperparameters, device=device)
        print("training the same classifier on a random backbone and on raw pixels, to compare", flush=True)
        torch.manual_seed(hyperparameters.seed)
        num_classes = len(folder.class_names)
        random_backbone = random_backbone_accuracy(
            architecture, num_classes, train_data, test_data, hyperparameters, device=device
        )
        raw_pixels = raw_pixel_accuracy(num_classes, train_data, test_data, hyperparameters, device=device)
        times = measure_backward(model, *first_batch(train_data, device))

    metrics = Metrics(
        test_accuracy=history[-1].test_accuracy,
        chance=chance_accuracy(train_folder.targets, test_folder.targets),
        random_backbone=random_backbone,
        raw_pixels=raw_pixels,
        architecture=architecture,
        weights=weights,
        trainable_groups=settings.trainable_groups,
        hyperparameters=hyperparameters,
        data_config=data_config,
        class_names=folder.class_names,
        train_pictures=counts[0],
        test_pictures=counts[1],
        skipped_pictures=skipped,
        history=tuple(history),
        backward_milliseconds=times,
        device=str(device),
        seconds=round(time.monotonic() - start, 1),
        versions=installed_versions(),
    )
    print(describe(metrics))
    references = {"chance": metrics.chance, "random backbone": random_backbone, "raw pixels": raw_pixels}
    with replacing(settings.output / "curves.png") as temporary:
        draw_curves(history, references, temporary)
    with replacing(settings.output / "metrics.json") as temporary:
        temporary.write_text(json.dumps(asdict(metrics), indent=2) + "\n")
    trained = TrainedModel(model, architecture, folder.class_names, data_config)
    if base is None:
        save_trained_model(trained, settings.output / MODEL_FILE, record=asdict(metrics))
    else:
        save_trained_changes(trained, base, settings.output / MODEL_FILE, record=asdict(metrics))
    print(f"\nwrote {', '.join(str(settings.output / name) for name in ('curves.png', 'metrics.json', MODEL_FILE))}")
    return metrics


def find_device(name: str) -> torch.device:
    """Check that a device is there.

    >>> find_device("cpu")
    device(type='cpu')

    Raises:
        ValueError: it is not; the message names those that are.
    """
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    if name not in {*there, *(["cuda"] if len(there) > 1 and there[1].startswith("cuda") else [])}:
        raise ValueError(f"device {name!r}: not on this machine, which has {', '.join(there)}")
    return torch.device(name)


def import_draw_curves() -> Callable[[Sequence[EpochResult], Mapping[str, float], Path], None]:
    """Import matplotlib only here, where it is needed, and before any work, should it not be there.

    >>> import_draw_curves().__name__
    'draw_curves'

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from .plots import draw_curves  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed, which draws curves.png; run: pip install 'backbone-finetune[recipes]'"
        ) from error
    return draw_curves


def choose_data_config(model: FineTuneModel, settings: TrainSettings) -> dict[str, Any]:
    """Take timm's own data config of a model, but for the small clipart a small input, where the network allows it.

    >>> choose_data_config(FineTuneModel.from_timm("resnet18", num_classes=10), TrainSettings())["input_size"]
    (3, 96, 96)
    """
    small = settings.pictures is None and not model.pretrained_cfg.get("fixed_input_size", False)
    wanted = {"input_size": CLIPART_INPUT_SIZE} if small else {}
    config: dict[str, Any] = resolve_model_data_config(model, args=wanted)  # type: ignore[no-untyped-call]
    return config


def first_batch(data: PictureDataset, device: torch.device) -> tuple[Tensor, Tensor]:
    """Stack the first pictures, 16 at most, to time a step with: ``(B, 3, H, W)`` and ``(B,)``."""
    pairs = [data[index] for index in range(min(TIMED_BATCH_SIZE, len(data)))]
    inputs, targets = zip(*pairs, strict=True)
    return torch.stack(inputs).to(device), torch.tensor(targets, device=device)


def installed_versions() -> dict[str, str]:
    """The versions that a run depends on.

    >>> sorted(installed_versions())
    ['backbone-finetune', 'python', 'timm', 'torch']
    """
    return {
        "backbone-finetune": __version__,
        "python": platform.python_version(),
        "timm": timm.__version__,
        "torch": torch.__version__,
    }
