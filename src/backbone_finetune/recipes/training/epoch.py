"""One epoch of a training: its steps, their sums, and the evaluation."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ..data.images import is_read
from ..features.dataset import Features, module_inputs
from ..features.running import takes_channels_last, to_channels_last
from ..objectives.objective import Objective
from ..sending import send
from ..together import OUT_OF_MEMORY
from .batches import LocalBatch, epoch_batches, load_batches, local_batch
from .checkpoints import load_by_name
from .config import TrainerConfig, count
from .phase_state import PhaseState, save_checkpoint, snapshot
from .progress import EpochResult, Progress
from .scoring import evaluate


class DivergedError(ValueError):
    """The loss, or a trainable tensor, is not finite; all processes raise it, as their sums are added up."""

    is_on_all_processes = True


def train_epoch(state: PhaseState, progress: Progress, config: TrainerConfig, *, title: str) -> bool:
    """Train the rest of an epoch, evaluate, and update the progress; return whether it is the phase's last epoch.

    Raises:
        DivergedError: the losses or trainable tensors are not finite.
    """
    accelerator = config.accelerator
    process, processes = accelerator.process_index, accelerator.num_processes
    images, epoch = count(state.data.train) // state.data.views, len(progress.history) + 1
    batches = epoch_batches(images, config.batch_size, seed=config.seed, epoch=epoch)
    if state.data.views > 1:
        batches = tuple((epoch + batch) % state.data.views * images + batch for batch in batches)
    shares = [local_batch(batch, process=process, processes=processes) for batch in batches[progress.step :]]
    # Sums from before resuming count on the main process; the others start at 0.
    sums = send(torch.tensor(progress.sums, device="cpu") * accelerator.is_main_process, accelerator.device)
    loaded_batches = load_batches(
        state.data.train,
        shares,
        device=accelerator.device,
        workers=config.workers_for(state.data.train),
        seed=f"{config.seed} {epoch}",
        check=partial(check_loaded, state, config.objective),
    )
    state.prepared.train()
    with tqdm(total=len(batches), initial=progress.step, desc=title, unit="batch", disable=not config.shows) as bar:
        for share, loaded in zip(shares, loaded_batches, strict=True):
            state.schedule.step_update(progress.epoch * len(batches) + progress.step + 1)
            mixed = loaded
            if state.mixing is not None:
                mixed = state.mixing.mix(loaded, seed=f"{config.seed} {epoch} {progress.step} mix")
            try:
                sums += train_step(state, share, mixed, len(batches[progress.step]), config)
            except OUT_OF_MEMORY as error:
                raise _explained(error, config)  # noqa: B904 (the same error)
            progress.step += 1
            progress.steps += 1
            bar.update()
            if progress.steps % config.checkpoint_steps == 0 and progress.step < len(batches):
                progress.sums = fetch_sums(state, sums, progress, config)
                save_checkpoint(state, progress, config)
        loss_sum, correct, seen, weight = fetch_sums(state, sums, progress, config)
        average_statistics(state, accelerator)
        phase, shown = state.phase, {"loss": f"{loss_sum / weight:.3f}"}
        accuracy = correct / seen if config.objective.has_accuracy else None
        result = EpochResult(
            epoch,
            loss_sum / weight,
            accuracy,
            phase.lr or 0.0,
            phase.weight_decay or 0.0,
            phase=progress.phase + 1,
            why_uncached=state.data.why_uncached,
        )
        if accuracy is not None:
            shown["train"] = f"{accuracy:.3f}"
        if state.data.validation is not None:
            score = evaluate(accelerator.unwrap_model(state.prepared), state.data.validation, config, name="validation")
            shown["validation"] = f"{score.metrics[config.objective.main_metric]:.3f}"
            result = replace(
                result,
                validation_loss=score.loss,
                validation_accuracy=score.accuracy,
                validation_balanced_accuracy=score.balanced_accuracy,
                validation_metrics=score.other_metrics,
            )
        bar.set_postfix(shown)
    keep_best(state, result, progress, config)
    since_best = epoch - max(progress.best_epoch or 0, epoch - progress.epoch - 1)
    is_last = progress.epoch + 1 == phase.epochs or since_best == config.patience
    if is_last and state.best is not None:
        load_by_name(state.model, state.best)
    if is_last:
        state.folding.close()
    progress.finish_epoch(result, last_of_phase=is_last)
    return is_last


def _explained(error: Exception, config: TrainerConfig) -> Exception:
    """Add to an error what to pass where the memory is too small for a step."""
    remedy = "pass a larger accumulation (train --accumulation), with the same result, or a smaller batch"
    error.args = (f"{error}; a step of {config.batch_size} images, accumulation {config.accumulation}: {remedy}",)
    return error


def check_loaded(state: PhaseState, objective: Objective, targets: Tensor) -> None:
    """Check the targets of the next step while they are on the CPU, and note whether all are of readable images."""
    read = is_read(targets)
    objective.check("train", targets[read], state.model.num_classes)
    state.all_read = bool(read.all())


def keep_best(state: PhaseState, result: EpochResult, progress: Progress, config: TrainerConfig) -> None:
    """Copy the trained tensors if the monitor's value is higher than in all earlier epochs."""
    if config.monitor is None:
        return
    value = float(config.monitor(result))
    if math.isnan(value):
        raise ValueError(f"monitor returned nan for epoch {result.epoch}; it must return a number, larger for better")
    if progress.best_value is None or value > progress.best_value:
        progress.best_epoch, progress.best_value = result.epoch, value
        state.best = snapshot(state)


def fetch_sums(state: PhaseState, sums: Tensor, progress: Progress, config: TrainerConfig) -> list[float]:
    """Return the sums of losses, correct predictions, images and weights over all processes.

    Raises:
        DivergedError: the losses or trainable tensors are not finite, and must not be in a checkpoint.
    """
    accelerator = config.accelerator
    faults = state.count_not_finite(accelerator.device) - state.not_finite
    fetched: list[float]
    *fetched, not_finite = accelerator.reduce(torch.cat((sums, faults[None]))).tolist()
    if math.isfinite(fetched[0]) and not_finite <= 0:
        return fetched
    fault = f"the loss became {fetched[0]}"
    if math.isfinite(fetched[0]):
        fault = "a weight or a running statistic became infinite or nan"
    raise DivergedError(
        f"the training diverged at lr = {state.phase.lr}: {fault} in epoch {len(progress.history) + 1}; pass "
        "a lower --lr (in Python: Phase(lr=...))"
    )


def train_step(
    state: PhaseState, share: LocalBatch, loaded: tuple[Tensor, ...], batch_size: int, config: TrainerConfig
) -> Tensor:
    """Take one optimizer step; return sums of this process, ``(4,)``: losses, correct predictions, images, weights.

    The gradient is that of the mean loss over the whole batch for any number of processes: each sums over its own
    images, and the processes' gradients are averaged. With class weights it is the weighted mean, divided by the sum of
    the weights of the whole batch; without, the weight of an image is 1.
    """
    accelerator = config.accelerator
    objective = config.objective if state.mixing is None else state.mixing.objective
    factor: Tensor | float = accelerator.num_processes / batch_size
    weights = objective.weights(loaded[-1][: share.num_real].to(accelerator.device))
    if weights is not None:
        total = accelerator.reduce(weights.sum())
        factor = accelerator.num_processes / total  # if no image is readable, torch's gradient is also 0
    # Parts of at least two images, which BatchNorm needs to train.
    count_of_parts = min(config.accumulation, max(len(share.indices) // 2, 1))
    sums: list[Tensor] = []
    state.optimizer.zero_grad()
    first = 0
    for part in zip(*(tensor.tensor_split(count_of_parts) for tensor in loaded), strict=True):
        *inputs, targets = (tensor.to(accelerator.device) for tensor in part)
        num_real = max(share.num_real - first, 0)
        first += len(targets)
        inputs = arrange_images(state, inputs, accelerator)
        with nullcontext() if first == len(share.indices) else accelerator.no_sync(state.prepared):
            logits = state.prepared(*module_inputs(state.data.train, inputs))
            if num_real < len(targets):  # images of other processes
                logits, targets = logits[:num_real], targets[:num_real]
            losses = objective.losses(logits, targets, all_read=state.all_read)
            # The factor of the mean is the initial gradient, which needs no extra product. Creating a tensor from a
            # number would wait for the device.
            if isinstance(factor, Tensor):
                gradient = factor.to(losses.dtype).expand_as(losses)
            else:
                gradient = losses.new_full(losses.shape, factor)
            # `Accelerator.backward` would also divide by its accumulation steps, which are not used here.
            scaler = accelerator.scaler
            (losses if scaler is None else scaler.scale(losses)).backward(gradient=gradient)
        correct, weights = objective.correct(logits.detach(), targets).sum(), objective.weights(targets)
        seen = correct.new_full((), len(targets)) if state.all_read else is_read(targets).sum()
        sums.append(torch.stack((losses.detach().sum(), correct, seen, seen if weights is None else weights.sum())))
    state.optimizer.step()
    return torch.stack(sums).sum(0) if len(sums) > 1 else sums[0]


def arrange_images(state: PhaseState, inputs: list[Tensor], accelerator: Accelerator) -> list[Tensor]:
    """Convert images on a CUDA device to channels_last, unless the network takes contiguous ones alone."""
    if accelerator.device.type != "cuda" or accelerator.is_fsdp2 or isinstance(state.data.train, Features):
        return inputs
    if state.channels_last is None:
        state.channels_last = takes_channels_last(state.model, inputs)
    return to_channels_last(inputs, state.model) if state.channels_last else inputs


def average_statistics(state: PhaseState, accelerator: Accelerator) -> None:
    """Average trainable running statistics over the processes."""
    if accelerator.num_processes == 1:
        return
    frozen = state.model.frozen_names()
    for name, buffer in state.model.named_buffers():
        if name not in frozen and buffer.is_floating_point():
            buffer.copy_(accelerator.reduce(buffer, reduction="mean"))
