"""What each phase of a run trained, and what freezing the rest saved, as parts of a page."""

from collections.abc import Sequence

from backbone_finetune import FineTuneModel

from ...data.augmentation import AUGMENTATIONS
from ...training.phases import Phase
from ...training.progress import EpochResult
from ..runs.metrics import Metrics
from ..settings import TrainSettings
from .page import table, text

BYTES = 12  # of a trained parameter: its gradient and the two means of AdamW, in float32


def show_phases(metrics: Metrics, model: FineTuneModel, settings: TrainSettings) -> list[str]:
    """Show the epochs, layers and rates of each phase, and what freezing the others saved."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trained, saved = [], []
    for number, phase in enumerate(metrics.phases, start=1):
        epochs = [epoch for epoch in metrics.history if epoch.phase == number]
        model.freeze_backbone(trainable_groups=phase.trainable_groups)  # at last that of the last phase, as it was
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        rates = f"{epochs[0].lr:g}", f"{phase.backbone_lr:g}" if phase.trainable_groups else "-"
        weight_decay = f"{epochs[0].weight_decay:g}"
        trained.append((number, len(epochs), _trained_layers(phase, model), *rates, weight_decay, _changes(phase)))
        memory = f"{(total - count) * BYTES / 1e6:,.1f} MB"
        saved.append(
            (number, f"{count:,} of {total:,}", memory, _frozen_passes(metrics, model, settings, phase, epochs))
        )
    parts = [
        "<h2>What was trained</h2>",
        table(("phase", "epochs", "trained", "lr", "backbone lr", "weight decay", "images"), trained, "words"),
        "<h2>What freezing saved</h2>",
        "<p>Memory: the gradients and the state of AdamW that frozen parameters do not have, 12 bytes for each.</p>",
        table(("phase", "parameters trained", "memory saved", "frozen layers computed"), saved, "words"),
    ]
    if (times := metrics.backward_milliseconds) is not None:
        line = f"{times.frozen:.2f} ms as trained, {times.unfrozen:.2f} ms unfrozen, {times.batch_size} images"
        parts.append(f"<p>Backward pass: {text(line)}, {text(metrics.device)}.</p>")
    return parts


def _trained_layers(phase: Phase, model: FineTuneModel) -> str:
    """Return the names of the trained layer groups, of many the first and the last."""
    count = phase.trainable_groups
    names = [group.name for group in model.layer_groups[len(model.layer_groups) - count :]]
    if len(names) > 3:
        names = [f"{names[0]} to {names[-1]}"]
    every = "all layers: " if count == len(model.layer_groups) else ""
    return every + ", ".join([*names, "classifier"])


def _changes(phase: Phase) -> str:
    """Return the random changes of the training images."""
    names = {augment: name for name, augment in AUGMENTATIONS.items()}
    changes = [] if phase.augment is None else [f"augment {names.get(phase.augment, 'as in metrics.json')}"]
    changes += [f"{name} {alpha:g}" for name, alpha in (("mixup", phase.mixup), ("cutmix", phase.cutmix)) if alpha]
    return ", ".join(changes) or "unchanged"


def _frozen_passes(
    metrics: Metrics, model: FineTuneModel, settings: TrainSettings, phase: Phase, epochs: Sequence[EpochResult]
) -> str:
    """Return how often the frozen layers ran over the images in a phase, and why not once."""
    images = metrics.train_images + metrics.validation_images
    if epochs[0].why_uncached is None:
        views = settings.views if phase.augment is not None else 1
        of_views = f", in {views} views each" if views > 1 else ""
        computed = metrics.train_images * views + metrics.validation_images
        return f"once for each image{of_views}: {computed:,}, not {images * len(epochs):,}"
    if phase.trainable_groups == len(model.layer_groups):
        return "none is frozen"
    return f"in each epoch: {images * len(epochs):,} images; {epochs[0].why_uncached}"
