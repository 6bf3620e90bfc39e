"""The state of one phase of a training, its checkpoints, and what its errors mean."""

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, TensorDataset

from backbone_finetune import FineTuneModel
from backbone_finetune.checkpoint import distinct_tensors

from ..data.images import ImageDataset, is_read
from ..data.targets import first_row
from ..features.dataset import Features
from ..features.frozen_pass import in_eval
from ..heads.standardize import Standardization
from ..precision import has_tensor_cores, products_in
from ..rng import preserve_rng_state
from ..together import OUT_OF_MEMORY, together
from .batches import epoch_batches
from .checkpoints import capture, load_by_name, write_checkpoint
from .config import TrainerConfig, count
from .mixing import Mixing, make_mixing
from .phase_data import PhaseData, prepare_data
from .phases import Phase, make_schedule
from .processes import communicated_bytes, full_tensor, prepare, release
from .progress import Progress
from .start import start_classifier

logger = logging.getLogger(__name__)


@dataclass
class PhaseState:
    """The state of one phase: ``prepared`` is the accelerator's wrapper of ``data.module``, a part of ``model``."""

    model: FineTuneModel
    prepared: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    phase: Phase  # with its rates
    changed: set[str]
    data: PhaseData
    mixing: Mixing | None = None
    best: dict[str, Tensor] | None = None  # the trained tensors after the best epoch
    channels_last: bool | None = None  # whether the model takes such images, known from the first batch on CUDA
    all_read: bool = False  # whether each image of the next step is known to be readable
    folding: ExitStack = field(default_factory=ExitStack)  # closing it folds standardization into the classifier
    not_finite: Tensor | float = 0.0  # tensors that were not finite before the phase, e.g. a mask of -inf

    def count_not_finite(self, device: torch.device) -> Tensor:
        """Count this process's trainable tensors that are not finite: ``()``, on the device."""
        # On features only the classifier's: listing all tensors of a large backbone takes as long as several steps.
        part, prefix = (self.model.classifier, "classifier.") if self.data.on_features else (self.model, "")
        tensors = part.state_dict(prefix=prefix)
        return count_not_finite((tensor for name, tensor in tensors.items() if name in self.changed), device)


@contextmanager
def prepared_phase(
    model: FineTuneModel,
    train: Dataset[Any],
    validation: Dataset[Any] | None,
    *,
    phase: Phase,
    changed: set[str],
    config: TrainerConfig,
) -> Iterator[PhaseState]:
    """Freeze, wrap, and train in the block; then release, and check that no frozen tensor changed."""
    accelerator = config.accelerator
    with together(accelerator):
        # Before its frozen tensors are read, which is faster there; a caller may also run it there after the phase.
        model.to(accelerator.device)
    model.norm_eval = phase.norm_eval
    model.freeze_backbone(trainable_groups=phase.trainable_groups)
    changed.update(model.state_dict().keys() - model.frozen_names())
    with explain_errors(model, train=train, validation=validation), model.assert_frozen(), ExitStack() as folding:
        mixing = make_mixing(phase, config.objective, model.num_classes)
        data = prepare_data(model, train, validation, config, phase)
        if phase.standardize:
            data = _standardize(data, config, model, folding)
        lr, weight_decay = start_classifier(model.classifier, data, phase, config)
        phase = replace(phase, lr=lr, weight_decay=weight_decay)
        copied, module, is_cached = model, data.module, data.why_uncached is None
        if accelerator.is_fsdp2:  # FSDP2 shards the parameters permanently, so a copy trains and is copied back
            if not is_cached:  # the device then has room for the shards alone
                model.to("cpu")
            copied = copy.deepcopy(model, {id(model.backbone): model.backbone} if is_cached else {})
            module = copied.classifier if is_cached else copied
        groups = copied.param_groups(
            lr, backbone_lr=phase.backbone_lr, weight_decay=weight_decay, layer_decay=phase.layer_decay
        )
        if config.shows and accelerator.num_processes > 1:
            logger.info(
                "%d processes: each sends %s bytes of gradients per step",
                accelerator.num_processes,
                f"{communicated_bytes(module):,}",
            )
        on_cuda = accelerator.device.type == "cuda"
        adamw = torch.optim.AdamW([dict(group) for group in groups], fused=True)
        # A classifier on features gains nothing from bf16 on CUDA, where its step is bound by launching kernels.
        autocast = not (on_cuda and data.on_features)
        prepared, optimizer = prepare(accelerator, module, adamw, autocast=autocast)
        steps = len(epoch_batches(count(train), config.batch_size, seed=0, epoch=0))
        schedule = make_schedule(optimizer, phase, steps)
        # Once for rows, before they are on the device; images are checked batch by batch.
        all_read = isinstance(data.train, TensorDataset) and bool(is_read(data.train.tensors[-1]).all())
        data = data.on_device(accelerator.device)
        state = PhaseState(
            copied, prepared, optimizer, schedule, phase, changed, data, mixing, folding=folding, all_read=all_read
        )
        state.not_finite = state.count_not_finite(accelerator.device)
        try:
            with _fast_steps(config) if on_cuda and not data.on_features else nullcontext():
                yield state
        finally:  # after an error, the caller may train the model again
            release(accelerator, prepared)
        if copied is not model:
            original = model.classifier if is_cached else model
            # One tensor at a time is whole on the device; also a frozen one, as assert_frozen looks at the original.
            load_by_name(original, {name: full_tensor(tensor).cpu() for name, tensor in module.state_dict().items()})
            model.to(accelerator.device)


@contextmanager
def _fast_steps(config: TrainerConfig) -> Iterator[None]:
    """Allow TF32 in the steps of a phase that trains layers on a CUDA device, and log their precision."""
    accelerator = config.accelerator
    has_tf32 = has_tensor_cores(accelerator.device)
    if config.shows:
        mixed = accelerator.mixed_precision
        precision = "float32" if mixed == "no" else f"{mixed} autocast"
        products = ", float32 products in TF32" if has_tf32 else ""
        logger.info("steps: %s%s, images in channels_last", precision, products)
    with products_in("tf32") if has_tf32 else nullcontext():
        yield


def _standardize(data: PhaseData, config: TrainerConfig, model: FineTuneModel, folding: ExitStack) -> PhaseData:
    """Standardize the features, and make the classifier one of them until ``folding`` is closed."""
    if not data.on_features or config.accelerator.is_fsdp2:
        why = "FSDP2 shards the classifier" if data.on_features else "the features of this run are not cached"
        raise ValueError(f"standardize was given, and {why}; leave it out")
    assert isinstance(data.train, Features)
    standardization = Standardization.measure(data.train)
    standardization.enter(model.classifier)
    folding.callback(standardization.leave, model.classifier)
    validation = data.validation
    if isinstance(validation, Features):
        validation = standardization.apply(validation)
    return replace(data, train=standardization.apply(data.train), validation=validation)


def count_not_finite(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Count the tensors with a NaN or an infinity, on their device and without synchronizing: ``()``, float32.

    >>> count_not_finite([torch.ones(2), torch.tensor([0, torch.inf]), torch.tensor(1)], torch.device("cpu"))
    tensor(1.)

    For a sharded tensor (FSDP2), the local shard is checked.
    """
    count = torch.zeros((), device=device)
    for tensor in tensors:
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if own.is_floating_point():
            count += ~own.isfinite().all()
    return count


def snapshot(state: PhaseState) -> dict[str, Tensor]:
    """Copy the tensors that training changes."""
    return {name: tensor.clone() for name, tensor in distinct_tensors(state.model).items() if name in state.changed}


def save_checkpoint(state: PhaseState, progress: Progress, config: TrainerConfig) -> None:
    """Write a checkpoint, if the config has a folder for it. Collective; the main process writes."""
    if config.checkpoints is None:
        return
    optimizer = state.optimizer if progress.epoch or progress.step else None  # the next phase has a new one
    best = state.best if progress.epoch or progress.step else None  # at the end of a phase the model has it
    checkpoint = capture(progress, state.model, state.changed, optimizer, accelerator=config.accelerator, best=best)
    if config.accelerator.is_main_process:
        write_checkpoint(config.checkpoints, checkpoint)


@contextmanager
def explain_errors(model: FineTuneModel, **datasets: Dataset[Any] | None) -> Iterator[None]:
    """Replace an error in the block by a ValueError if the model cannot run on the first row of a dataset.

    >>> model = FineTuneModel(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    >>> with explain_errors(model, train=[(torch.ones(2).byte(), 0)]):
    ...     model(torch.ones(1, 2).byte())
    Traceback (most recent call last):
    ...
    ValueError: train: the model cannot run on the first row's input, (2,) uint8 (...); networks of images take ...
    """
    try:
        yield
    except OUT_OF_MEMORY:  # which no row explains
        raise
    except Exception as error:
        for name, data in datasets.items():
            if data is not None and not isinstance(data, ImageDataset):
                _run_first_row(model, name, data, error)
        if "more than 1 value per channel" in str(error):  # torch's batch normalisation
            raise ValueError(
                f"a batch of one image: {error}; pass more images, a larger batch or norm_eval=True"
            ) from error
        raise


def _run_first_row(model: FineTuneModel, name: str, data: Any, error: Exception) -> None:
    with preserve_rng_state(), in_eval(model), torch.no_grad(), torch.device("cpu"):
        inputs, _ = first_row(name, data)
        device = next(model.parameters()).device
        try:
            model(*(tensor.to(device) for tensor in inputs))
        except Exception as fault:  # a forward may raise any error
            rows = ", ".join(f"{tuple(each.shape[1:])} {each.dtype}".replace("torch.", "") for each in inputs)
            raise ValueError(
                f"{name}: the model cannot run on the first row's input, {rows} ({str(fault).partition(chr(10))[0]}); "
                "networks of images take (3, H, W) float32, as the transform timm.data.create_transform(224) returns"
            ) from error
