"""The training loop: phase after phase, on features where the backbone is frozen, on images where it is not."""

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from backbone_finetune import FineTuneModel

from ..data.images import IGNORED, ImageDataset
from ..data.targets import check_dataset, check_targets
from ..features.dataset import module_inputs
from ..text import printable
from .batches import LocalBatch, epoch_batches, load_batches, local_batch
from .checkpoints import EpochResult, Progress, capture, load_by_name, open_checkpoints, resume, write_checkpoint
from .config import TrainerConfig, count
from .divergence import DivergedError, count_not_finite
from .losses import sum_losses, sum_weights
from .phase_data import prepare_data
from .phases import Phase, make_schedule
from .processes import communicated_bytes, full_tensor, prepare, release
from .scoring import Score, evaluate

__all__ = ["EpochResult", "TrainerConfig", "fine_tune"]

logger = logging.getLogger(__name__)


@dataclass
class PhaseState:
    """What one phase works with: ``prepared`` is what the accelerator made of ``module``, which is in ``model``."""

    model: FineTuneModel
    module: nn.Module
    prepared: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    changed: set[str]
    train: Dataset[Any]
    test: Dataset[Any]
    views: int = 1
    class_weights: Tensor | None = None
    not_finite: Tensor | float = 0.0  # tensors that were not when the phase began, as a mask of -inf

    def count_not_finite(self, device: torch.device) -> Tensor:
        """Count the tensors that train and are not finite, of this process: ``()``, fetched by nobody yet."""
        # On features only the classifier's: to name all of a large backbone's tensors takes as long as several steps.
        on_features = self.module is self.model.classifier
        tensors = self.module.state_dict(prefix="classifier.") if on_features else self.model.state_dict()
        return count_not_finite((tensor for name, tensor in tensors.items() if name in self.changed), device)


def fine_tune(
    model: FineTuneModel,
    train: Dataset[Any],
    test: Dataset[Any],
    phases: Sequence[Phase],
    config: TrainerConfig,
) -> list[EpochResult]:
    """Train a model in phases, and prove for each that what is frozen in it did not move.

    In a phase whose backbone is frozen, it runs once over the images and the classifier trains on its features,
    where both datasets are known to show the same each time: tensors, lists, and datasets whose ``transform`` is None
    or a deterministic one of torchvision or timm, in a Subset or ConcatDataset too. A dataset of your own says so by
    ``transform = None``. Otherwise the whole model runs in every step, and what a random transform draws for an image
    comes from the seed, the epoch and the image's index. Images of an `ImageDataset` that cannot be read are skipped.
    AdamW and its schedule begin anew with each phase. The test data is looked at and never learnt from, nor chosen by.

    >>> model = FineTuneModel(nn.Linear(2, 3), nn.Linear(3, 2))
    >>> images = torch.utils.data.TensorDataset(torch.eye(2), torch.tensor([0, 1]))
    >>> phases = [Phase(epochs=2), Phase(epochs=1, trainable_groups=1)]
    >>> len(fine_tune(model, images, images, phases, TrainerConfig(Accelerator(cpu=True), show_progress=False)))
    3

    With ``config.checkpoints``, a run that was killed goes on after its last checkpoint, and on a CPU, as one process,
    ends with the same weights to the bit: the model must come in as it came in then, and phases and config be the same.

    Raises:
        AssertionError: a frozen parameter or buffer changed.
        DivergedError: an epoch's loss, or what it trained, is not finite; a ValueError.
        ValueError: there are no phases or no images, or nothing trains.
    """
    if not phases:
        raise ValueError("phases is empty; pass one Phase or more")
    for name, data in (("train", train), ("test", test)):
        check_dataset(name, data, lambda name, targets: check_targets(name, targets, model.num_classes))
    if config.class_weights is not None and model.num_classes not in {None, len(config.class_weights)}:
        raise ValueError(f"class_weights has {len(config.class_weights)} entries for {model.num_classes} classes")
    begun, saved = (
        (False, None) if config.checkpoints is None else open_checkpoints(config.checkpoints, config.accelerator)
    )
    progress, changed = Progress(), set[str]()
    if saved is not None:
        progress = saved.progress
        changed.update(saved.model)
        load_by_name(model, saved.model)
    for data in (train, test):
        if isinstance(data, ImageDataset):
            known = {path: progress.skipped[path] for path in map(str, data.folder.paths) if path in progress.skipped}
            data.broken.update(known)
            progress.skipped.update(data.broken)  # named already, by this run or another on the same data
    if begun and config.shows:
        done = progress.phase == len(phases)
        logger.info("the training was finished before" if done else f"resuming at {progress.describe()}")
    total = sum(phase.epochs for phase in phases)
    while progress.phase < len(phases):
        phase = phases[progress.phase]
        with prepared_phase(model, train, test, phase=phase, changed=changed, config=config) as state:
            report_skipped((train, test), progress, config)
            if saved is not None:
                resume(saved, state.model, state.optimizer, config.accelerator)
                saved = None
            while progress.epoch < phase.epochs:
                train_epoch(state, phase, progress, config, title=f"epoch {len(progress.history) + 1}/{total}")
                report_skipped((state.train, state.test), progress, config)
                save_checkpoint(state, progress, config)
                if progress.epoch == 0:  # the next phase's
                    break
    return progress.history


@contextmanager
def prepared_phase(
    model: FineTuneModel,
    train: Dataset[Any],
    test: Dataset[Any],
    *,
    phase: Phase,
    changed: set[str],
    config: TrainerConfig,
) -> Iterator[PhaseState]:
    """Freeze, then wrap, then train in the block; release and prove after it that what is frozen did not move."""
    accelerator = config.accelerator
    model.norm_eval = phase.norm_eval
    model.freeze_backbone(trainable_groups=phase.trainable_groups)
    changed.update(model.state_dict().keys() - model.frozen_names())
    with model.assert_frozen():
        data = prepare_data(model, train, test, config)
        # The model itself goes there as well: after the phase a caller runs it where its inputs are.
        model.to(accelerator.device)
        copied, module = model, data.module
        if accelerator.is_fsdp2:  # it takes the parameters apart for good, so a copy trains, and is copied back
            copied = copy.deepcopy(model)
            module = copied.classifier if data.cached else copied
        groups = copied.param_groups(
            phase.lr, backbone_lr=phase.backbone_lr, weight_decay=phase.weight_decay, layer_decay=phase.layer_decay
        )
        if config.shows and accelerator.num_processes > 1:
            logger.info(
                "%d processes: each sends %s bytes of gradients per step",
                accelerator.num_processes,
                f"{communicated_bytes(module):,}",
            )
        prepared, optimizer = prepare(
            accelerator, module, torch.optim.AdamW([dict(group) for group in groups], fused=True)
        )
        steps = len(epoch_batches(count(train), config.batch_size, seed=0, epoch=0))
        schedule = make_schedule(optimizer, phase, steps)
        state = PhaseState(copied, module, prepared, optimizer, schedule, changed, data.train, data.test, data.views)
        if config.class_weights is not None:
            state.class_weights = torch.as_tensor(config.class_weights, dtype=torch.float32, device=accelerator.device)
        state.not_finite = state.count_not_finite(accelerator.device)
        try:
            yield state
        finally:  # who catches the error may train the model again
            release(accelerator, prepared)
        if copied is not model:
            load_by_name(model, {name: full_tensor(tensor) for name, tensor in copied.state_dict().items()})


def train_epoch(state: PhaseState, phase: Phase, progress: Progress, config: TrainerConfig, *, title: str) -> None:
    """Train what is left of an epoch, evaluate, and write down where the run stands; raises as `fine_tune`."""
    accelerator = config.accelerator
    process, processes = accelerator.process_index, accelerator.num_processes
    images, epoch = count(state.train) // state.views, len(progress.history) + 1
    batches = epoch_batches(images, config.batch_size, seed=config.seed, epoch=epoch)
    if state.views > 1:
        batches = tuple((epoch + batch) % state.views * images + batch for batch in batches)
    shares = [local_batch(batch, process=process, processes=processes) for batch in batches[progress.step :]]
    # What was summed before a resumption is the main process's; the others begin at nothing.
    before = [progress.loss_sum, progress.correct, progress.seen, progress.weight]
    sums = torch.tensor(before if accelerator.is_main_process else [0.0] * 4, device=accelerator.device)
    loaded_batches = load_batches(
        state.train,
        shares,
        device=accelerator.device,
        workers=config.workers_for(state.train),
        seed=f"{config.seed} {epoch}",
    )
    state.prepared.train()
    with tqdm(total=len(batches), initial=progress.step, desc=title, unit="batch", disable=not config.shows) as bar:
        for share, loaded in zip(shares, loaded_batches, strict=True):
            state.schedule.step_update(progress.epoch * len(batches) + progress.step + 1)
            sums += train_step(state, share, loaded, len(batches[progress.step]), config)
            progress.step += 1
            progress.steps += 1
            bar.update()
            if progress.steps % config.checkpoint_steps == 0 and progress.step < len(batches):
                fetched = fetch_sums(state, sums, phase, progress, config)
                progress.loss_sum, progress.correct, progress.seen, progress.weight = fetched
                save_checkpoint(state, progress, config)
        loss_sum, correct, seen, weight = fetch_sums(state, sums, phase, progress, config)
        average_statistics(state, accelerator)
        score = evaluate_state(state, config)
        bar.set_postfix(loss=f"{loss_sum / weight:.3f}", train=f"{correct / seen:.3f}", test=f"{score.accuracy:.3f}")
    result = EpochResult(epoch, loss_sum / weight, correct / seen, score.accuracy, score.balanced_accuracy)
    progress.finish_epoch(result, last_of_phase=progress.epoch + 1 == phase.epochs)


def fetch_sums(
    state: PhaseState, sums: Tensor, phase: Phase, progress: Progress, config: TrainerConfig
) -> tuple[float, float, float, float]:
    """Fetch the sums of losses, correct answers, images and weights, of all processes together.

    Raises:
        DivergedError: the losses, or what trains, are not finite: no checkpoint is to hold that, to go on with.
    """
    accelerator = config.accelerator
    faults = state.count_not_finite(accelerator.device) - state.not_finite
    loss_sum, correct, seen, weight, not_finite = accelerator.reduce(torch.cat((sums, faults[None]))).tolist()
    if math.isfinite(loss_sum) and not_finite <= 0:
        return loss_sum, correct, seen, weight
    fault = f"the loss became {loss_sum}"
    if math.isfinite(loss_sum):
        fault = "a weight or a running statistic became infinite or nan"
    raise DivergedError(
        f"the training diverged at lr = {phase.lr}: {fault} in epoch {len(progress.history) + 1}; pass "
        "a lower --lr (in Python: Phase(lr=...))",
        test_accuracy=evaluate_state(state, config).accuracy,
    )


def report_skipped(data: Sequence[Dataset[Any]], progress: Progress, config: TrainerConfig) -> None:
    """Name the images that turned out to be broken since the last call; every process calls it.

    Raises:
        ValueError: a class has no image left that can be read.
    """
    for images in data:
        if not isinstance(images, ImageDataset):
            continue
        if config.accelerator.num_processes > 1:
            for broken in gather_object([images.broken]):
                images.broken.update(broken)
        for path, problem in images.broken.items():
            if path not in progress.skipped and config.accelerator.is_main_process:
                logger.warning("%s", printable(f"skipped: {problem}"))
        progress.skipped.update(images.broken)
        images.check_classes()


def evaluate_state(state: PhaseState, config: TrainerConfig) -> Score:
    """Evaluate what trains on the test data."""
    module = config.accelerator.unwrap_model(state.prepared)
    workers = config.workers_for(state.test)
    return evaluate(module, state.test, batch_size=config.batch_size, accelerator=config.accelerator, workers=workers)


def train_step(
    state: PhaseState, share: LocalBatch, loaded: tuple[Tensor, ...], batch_size: int, config: TrainerConfig
) -> Tensor:
    """Take one step of the optimizer; returns sums of this process, ``(4,)``: losses, correct answers, images, weights.

    The gradient is that of the mean loss over the whole batch, whatever the shares: each process sums over its own
    images, and the processes' gradients are averaged. With class weights it is the weighted mean, divided by the sum of
    the weights of the whole batch; without, the weight of an image is 1.
    """
    accelerator, weights = config.accelerator, state.class_weights
    factor: Tensor | float = accelerator.num_processes / batch_size
    if weights is not None:
        total = accelerator.reduce(sum_weights(loaded[-1][: share.num_real].to(accelerator.device).long(), weights))
        factor = accelerator.num_processes / total  # where no image can be read, torch's gradient is 0 all the same
    # Parts of two images at least, which BatchNorm needs to train.
    count_of_parts = min(config.accumulation, max(len(share) // 2, 1))
    parts = share.split(count_of_parts) if count_of_parts > 1 else [share]
    sums: list[Tensor] = []
    state.optimizer.zero_grad()
    start = 0
    for number, part in enumerate(parts, start=1):
        *inputs, targets = (tensor[start : start + len(part)].to(accelerator.device) for tensor in loaded)
        start += len(part)
        targets = targets.long()
        with nullcontext() if number == len(parts) else accelerator.no_sync(state.prepared):
            logits = state.prepared(*module_inputs(state.train, inputs))
            if part.num_real < len(part):  # others' images, seen once more
                logits, targets = logits[: part.num_real], targets[: part.num_real]
            loss = sum_losses(logits, targets, config, weights)
            # The factor of the mean is where the backward begins, and costs no product of its own. A tensor made of a
            # number would wait for the device.
            gradient = factor.to(loss.dtype) if isinstance(factor, Tensor) else loss.new_full((), factor)
            accelerator.backward(loss, gradient=gradient)
        correct = (logits.detach().argmax(-1) == targets).sum()
        seen = (targets != IGNORED).sum()
        weight = seen if weights is None else sum_weights(targets, weights)
        sums.append(torch.stack((loss.detach(), correct, seen, weight)))
    state.optimizer.step()
    return torch.stack(sums).sum(0) if len(sums) > 1 else sums[0]


def average_statistics(state: PhaseState, accelerator: Accelerator) -> None:
    """Average over the processes what each gathered of its own images: running means and variances that train."""
    if accelerator.num_processes == 1:
        return
    frozen = state.model.frozen_names()
    for name, buffer in state.model.named_buffers():
        if name not in frozen and buffer.is_floating_point():
            buffer.copy_(accelerator.reduce(buffer, reduction="mean"))


def save_checkpoint(state: PhaseState, progress: Progress, config: TrainerConfig) -> None:
    """Write a checkpoint, if the config has a place for it; all processes take part, and the main one writes."""
    if config.checkpoints is None:
        return
    optimizer = state.optimizer if progress.epoch or progress.step else None  # the next phase begins with its own
    checkpoint = capture(progress, state.model, state.changed, optimizer, accelerator=config.accelerator)
    if config.accelerator.is_main_process:
        write_checkpoint(config.checkpoints, checkpoint)
