"""What ``backbone-finetune train`` does, from a folder of images to a model file and the record of its training."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..checking import DivergedError
from ..data.fingerprint import data_fingerprint
from ..data.images import ImageDataset
from ..features.extract import FeatureCache
from ..files import replacing
from ..models.file import TrainedModel, save_trained_changes, save_trained_model
from ..models.metadata import installed_versions
from ..rng import preserve_rng_state, seed_everything
from ..text import printable
from ..training.checkpoints import EpochResult
from ..training.loop import TrainerConfig, fine_tune
from ..training.processes import find_device, make_accelerator, run_on_main
from .baselines import chance_accuracy, random_backbone_accuracy, raw_pixel_accuracy
from .folder_lock import holding
from .metrics import Metrics, describe
from .run_folder import (
    CURVES_FILE,
    METRICS_FILE,
    MODEL_FILE,
    RUN_FILE,
    UNFINISHED,
    claim_output_folder,
    clear,
    find_others,
    make_output_folder,
)
from .run_record import compare_runs, record_run
from .setup import CLIPART, Task, TrainSettings, make_task
from .timing import BackwardTimes, measure_backward

__all__ = ["CLIPART", "TrainSettings", "train"]

TIMED_BATCH_SIZE = 16


def train(settings: TrainSettings, *, recorded: Mapping[str, Any] | None = None) -> Metrics:
    """Fine-tune a model, hold it against chance, a random backbone and raw pixels, and write all of it down.

    It prints what it does. Into ``settings.output`` go ``run.json``, first, ``curves.png``, ``metrics.json`` and, last,
    ``model.safetensors``. What can be wrong with the settings or the images is found out before the training, and an
    earlier model there stays until the new one takes its place. A run that was stopped, in whatever way, goes on where
    it was when it is given the same settings again. Where they are those of a ``recorded`` run (`read_run`), what is
    not as it was then is said.

    >>> train(TrainSettings(images=Path("no such folder")))
    Traceback (most recent call last):
    ...
    FileNotFoundError: no such folder: there is no such folder; ...

    Raises:
        FileExistsError: the output folder holds a finished model, another run, one that is under way, or what is not
            a run's and would be lost.
        DivergedError: the loss or the weights are not finite after an epoch; a ValueError. No model is written.
        FileNotFoundError: the images or the checkpoint are not there.
        ModuleNotFoundError: matplotlib or the packaged weights are not installed.
        ValueError: the settings or the images are not fit for training; the message says how to make them so.
    """
    start = time.monotonic()
    accelerator = make_accelerator(find_device(settings.device), mixed_precision=settings.mixed_precision)
    draw_curves = import_draw_curves()
    with preserve_rng_state(), ExitStack() as held:
        seed_everything(settings.seed)
        task = make_task(settings, accelerator)
        loop = claim(settings, task, accelerator, held, recorded)
        if accelerator.is_main_process:
            announce(task, accelerator.device)
        try:
            metrics = train_and_compare(settings, task, loop, start=start)
        except KeyboardInterrupt:
            if accelerator.is_main_process:
                print(f"stopped; {settings.output} keeps what is done: the same command goes on", file=sys.stderr)
            raise
        except DivergedError as error:
            hint = f"{settings.output} keeps this run: --overwrite replaces it, or pass another folder with --output"
            raise DivergedError(f"{error}; {hint}", test_accuracy=error.test_accuracy) from error
        if accelerator.is_main_process:
            print(describe(metrics))
            with replacing(settings.output / CURVES_FILE) as temporary:
                draw_curves(metrics.history, metrics.references(), temporary)
            with replacing(settings.output / METRICS_FILE) as temporary:
                temporary.write_text(json.dumps(asdict(metrics), indent=2, allow_nan=False) + "\n")
            trained = TrainedModel(task.model, task.architecture, metrics.class_names, task.data_config)
            if task.base is None:
                save_trained_model(trained, settings.output / MODEL_FILE, record=asdict(metrics))
            else:
                save_trained_changes(trained, task.base, settings.output / MODEL_FILE, record=asdict(metrics))
            clear(settings.output / UNFINISHED)
            if others := find_others(settings.output):  # put there while it trained
                print(printable(f"left as they are: {', '.join(others)} in {settings.output}"), file=sys.stderr)
            names = (RUN_FILE, CURVES_FILE, METRICS_FILE, MODEL_FILE)
            print(f"\nwrote {', '.join(str(settings.output / name) for name in names)}")
    accelerator.end_training()
    return metrics


def claim(
    settings: TrainSettings,
    task: Task,
    accelerator: Accelerator,
    held: ExitStack,
    recorded: Mapping[str, Any] | None,
) -> TrainerConfig:
    """Write down what run this is, or see that it is the one that was begun; returns the loop that keeps it there.

    The main process holds the folder for as long as ``held`` is open. What differs from a run that was ``recorded``
    and is given again is said on stderr.
    """
    fingerprints = run_on_main(accelerator, lambda: (data_fingerprint(task.train), data_fingerprint(task.test)))
    unfinished = settings.output / UNFINISHED

    loop = TrainerConfig(
        accelerator,
        batch_size=settings.batch_size,
        accumulation=settings.accumulation,
        seed=settings.seed,
        checkpoints=unfinished / "checkpoints",
        checkpoint_steps=settings.checkpoint_steps,
        caches=(
            FeatureCache(unfinished / "features-train", fingerprints[0]),
            FeatureCache(unfinished / "features-test", fingerprints[1]),
        ),
        autocast_features=settings.mixed_precision != "no"
        if settings.autocast_features is None
        else settings.autocast_features,
    )
    record = record_run(settings, task, loop, fingerprints)
    differences = [] if recorded is None else compare_runs(recorded, record)
    if differences and accelerator.is_main_process:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        print(f"not quite the run that was recorded: {'; '.join(differences[:3])}{more}", file=sys.stderr)

    def take() -> None:
        make_output_folder(settings.output)
        held.enter_context(holding(unfinished, name=str(settings.output)))
        claim_output_folder(settings.output, record, overwrite=settings.overwrite)

    run_on_main(accelerator, take)
    return loop


def announce(task: Task, device: torch.device) -> None:
    """Print what is trained on what."""
    for message in task.skipped:
        print(printable(f"skipped: {message}"), file=sys.stderr)
    folder, counts = task.train.folder, (len(task.train), len(task.test))
    print(
        f"images: {sum(counts)} in {len(folder.class_names)} classes from {folder.root}\n"
        f"          {counts[0]} to train, {counts[1]} to test, {len(task.skipped)} broken ones skipped\n"
        f"model:    {task.architecture}, {task.weights}, on {device}\n"
    )
    task.model.print_trainable_parameters()
    print(flush=True)


def train_and_compare(settings: TrainSettings, task: Task, loop: TrainerConfig, *, start: float) -> Metrics:
    """Train a model, and where baselines are wanted, those, and time its backward pass."""
    accelerator, class_names = loop.accelerator, task.train.folder.class_names
    seed_everything(settings.seed + accelerator.process_index)  # dropout differs between processes
    history = fine_tune(task.model, task.train, task.test, settings.phases, loop)
    random_backbone, raw_pixels, backward = None, None, None
    if settings.images is None if settings.baselines is None else settings.baselines:
        random_backbone, raw_pixels = train_baselines(settings, task, loop, epochs=len(history))
        backward = run_on_main(accelerator, lambda: time_backward_of(task, accelerator.device))
    return Metrics(
        test_accuracy=history[-1].test_accuracy,
        chance=chance_accuracy(task.train.folder.targets, task.test.folder.targets),
        random_backbone=random_backbone,
        raw_pixels=raw_pixels,
        architecture=task.architecture,
        weights=task.weights,
        phases=settings.phases,
        batch_size=settings.batch_size,
        seed=settings.seed,
        processes=accelerator.num_processes,
        data_config=task.data_config,
        class_names=class_names,
        train_images=len(task.train),
        test_images=len(task.test),
        skipped_images=task.skipped,
        history=tuple(history),
        backward_milliseconds=backward,
        device=str(accelerator.device),
        seconds=round(time.monotonic() - start, 1),
        versions=installed_versions(),
    )


def train_baselines(settings: TrainSettings, task: Task, loop: TrainerConfig, *, epochs: int) -> tuple[float, float]:
    """Train the same classifier on a random backbone and on raw pixels: the test accuracy of each."""
    if loop.accelerator.is_main_process:
        print("training the same classifier on a random backbone and on raw pixels, to compare", flush=True)
    seed_everything(settings.seed)
    # As long as the model itself, with the first phase's rates, and always frozen.
    phase = replace(settings.phases[0], epochs=epochs, trainable_groups=0)
    aside = replace(loop, checkpoints=None, caches=None, show_progress=False)
    num_classes = len(task.train.folder.class_names)
    random_backbone = compare(
        "random backbone",
        lambda: random_backbone_accuracy(
            task.architecture, num_classes, task.train, task.test, phase=phase, loop=aside
        ),
        loop,
    )
    raw_pixels = compare(
        "raw pixels",
        lambda: raw_pixel_accuracy(num_classes, task.train, task.test, phase=phase, loop=aside),
        loop,
    )
    return random_backbone, raw_pixels


def time_backward_of(task: Task, device: torch.device) -> BackwardTimes | None:
    """Time the backward pass of a trained model, None where unfrozen it does not fit the memory."""
    try:
        return measure_backward(task.model, *first_batch(task.train, device))
    except torch.OutOfMemoryError:
        print("backward time: not measured, the unfrozen model does not fit the memory", file=sys.stderr)
        return None


def compare(name: str, accuracy: Callable[[], float], loop: TrainerConfig) -> float:
    """Give the accuracy of what a model is held against; that it diverged is said, and no reason to lose the model.

    >>> compare("chance", lambda: 0.1, TrainerConfig(Accelerator(cpu=True)))
    0.1
    """
    try:
        return accuracy()
    except DivergedError as error:
        if loop.shows:
            print(f"{name}: {error}; its accuracy is that of then", file=sys.stderr)
        return error.test_accuracy


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


def first_batch(data: ImageDataset, device: torch.device) -> tuple[Tensor, Tensor]:
    """Stack the first images, 16 at most, to time a step with: ``(B, 3, H, W)`` and ``(B,)``."""
    pairs = [data[index] for index in range(min(TIMED_BATCH_SIZE, len(data)))]
    inputs, targets = zip(*pairs, strict=True)
    return torch.stack(inputs).to(device), torch.tensor(targets, device=device)
