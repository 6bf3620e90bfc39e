"""The settings of a run, and its model and images."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
from accelerate import Accelerator
from pydantic import ConfigDict, Field

from backbone_finetune import FineTuneModel
from backbone_finetune.splitting.copies import meta_copy

from ..checking import Positive, Whole
from ..data.augmentation import Augmentation
from ..data.images import ImageDataset, LabelledFolder, check_first_images
from ..data.sources.identical import Copy
from ..data.sources.parts import FoundData, find_data
from ..data.sources.rows import TEST, TRAIN, VALIDATION
from ..models.base import BaseWeights, remember_base
from ..models.classifiers import Head, choose_classifier
from ..models.file import (
    TrainedModel,
    build_transform,
    describe_model_file,
    load_trained_model,
    with_new_classifier,
)
from ..models.inputs import Size, find_size_problem, input_arguments, resolve_data_config
from ..models.metadata import Channels, Side
from ..models.readouts import Readout, assemble, choose_readout
from ..models.weights import PACKAGED_ARCHITECTURE, Source, load_network, model_arguments
from ..objectives.kinds import MultiLabel, Objective, Regression, SingleLabel
from ..text import join_some
from ..together import run_on_main
from ..training.loop import EpochResult, TrainerConfig
from ..training.mixing import make_mixing
from ..training.phases import Phase, tuning_phases
from .runs.run_folder import check_output_folder

__all__ = ["CLIPART", "Task", "TrainSettings", "choose_monitor", "make_task"]

CLIPART = Path(__file__).parents[1] / "data" / "clipart" / "pictures"
# The clipart is stored at 64 pixels. Five-fold cross-validation on its training images alone gave .66 at 96 pixels,
# .69 at 128 and .73 at 160, in 2 and 4 times the time; the demo should be quick.
CLIPART_INPUT_SIZE = (96, 96)
TEST_SHARE = 0.3


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainSettings:
    """The settings of a run. By default: the packaged ImageNet weights, on the packaged clipart.

    Args:
        images: A folder with a sub-folder of images per class, with train, val and test folders of these, a table, tar
            files, or a dataset of Hugging Face on disk; see ``find_images``.
        validation: Images on which rates and the best epoch are chosen. By default the val folder.
        test: Images on which the trained model is tested once. By default the test folder; if there is
            none, the validation images if nothing is chosen on them, else a share of each class.
        monitor: The metric of the best epoch, on the validation images: "accuracy", "balanced-accuracy" or "loss";
            "off" keeps the last epoch. None means "accuracy" if there are both validation and test images, else "off".
            If there are no validation images, a fifth of the training images is held out for it.
        folds: The number of folds of a cross-validation on the training images, after the model is written.
        check_labels: Whether to list training images whose label looks wrong, by cleanlab, from a cross-validation in
            ``folds`` folds, or 5.
        log_with: The tracker that the settings, each epoch and the test metrics are logged to.
        patience: A phase ends after this number of epochs without improvement.
        architecture: A timm name, ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``. Its weights are random unless
            ``pretrained`` or ``checkpoint`` is given.
        pretrained: Whether to load the pretrained weights, timm's from the hub or those of the folder.
        checkpoint: A file of weights.
        base: The base weights of a checkpoint of ``trainable_only``, if they are not found automatically.
        input_size: The side of the images that the network takes, or their height and width. None is its own size.
        in_chans: The number of channels of the images, as in ``ImageDataset``. None is the network's own number.
        phases: The phases of the training, in order.
        batch_size: Images per step, in all processes together.
        accumulation: The number of consecutive parts of a batch.
        seed: Seed of the split, of the classifier and of the order of images.
        checkpoint_steps: Steps between checkpoints; there is also one after each epoch.
        mixed_precision: None means the launcher's setting, else bf16 on a CUDA device that has it.
        autocast_features: Whether a frozen backbone computes in bf16 if that is faster; None means yes, unless
            ``mixed_precision`` is "no".
        device: A torch device; "auto" is CUDA, else MPS, else the CPU.
        output: The folder of the results.
        trainable_only: Whether the model file has only the changed tensors; it then needs the base weights.
        overwrite: Whether to replace results in ``output``.
        baselines: Whether to also train the classifier on a random backbone and on raw pixels, and to time the
            backward pass; None means only for the clipart.
        workers: The number of processes that load images; None chooses by cores and images. The model is the
            same with any number.
        compile: The compiler of a frozen backbone, which is faster from about 5,000 images on; None does not compile.
        cache: Where to cache frozen features: "memory", "disk" (memory-mapped), "auto" for both, with a
            quarter of the memory at most, or "off", which runs the whole model in every step.
        readout: The features of a transformer: its class "token", the "mean" of its patch tokens, both ("token-mean"),
            or the class tokens of the "last-4-blocks", also with the mean. None keeps the network's own pooling.
        head: The classifier: "linear", "batchnorm-linear" (features normalized over the batch) or "mlp" (one hidden
            layer). None means linear.
        views: How many views of each training image are cached in phases with ``augment``; 1 draws new ones in each
            epoch, and caches nothing. With more, and no phase with ``augment``, all have ``Augmentation.LIGHT``.
        class_weights: "balanced" weights the loss of an image by N / (K * count), for N training images, K classes and
            the number of its class; None weights all images equally.
        label_smoothing: The share of each target that is spread over all classes.
        regression: Columns of a table whose numbers are predicted. Otherwise a table with a column ``label`` has one
            class per image, and one with a column ``labels`` any number, as "cat;dog".
        group: A column of a table. Images of one group are on one side of each split, and in one fold. None means the
            column ``group``, if there is one.
        tune: Whether the phases are those of ``tuning_phases``: the head, then the last layer groups, then everything.

    >>> TrainSettings(phases=(Phase(trainable_groups=1),)).output.name
    'fine-tuned'
    """

    images: Path | None = None
    validation: Path | None = None
    test: Path | None = None
    architecture: str | None = None
    pretrained: bool = False
    checkpoint: Path | None = None
    base: Path | None = None
    input_size: Side | tuple[Side, Side] | None = None
    in_chans: Channels | None = None
    monitor: Literal["accuracy", "balanced-accuracy", "loss", "off"] | None = None
    patience: Positive | None = None
    folds: Annotated[int, Field(ge=2)] | None = None
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)] = (Phase(),)
    batch_size: Positive = 32
    accumulation: Positive = 1
    seed: Annotated[Whole, Field(lt=2**63)] = 0
    checkpoint_steps: Positive = TrainerConfig.checkpoint_steps
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    autocast_features: bool | None = None
    device: str = "auto"
    output: Path = Path("fine-tuned")
    trainable_only: bool = False
    overwrite: bool = False
    baselines: bool | None = None
    check_labels: bool = False
    log_with: Literal["tensorboard", "wandb", "mlflow"] | None = None
    workers: Whole | None = None
    compile: Literal["inductor", "openvino"] | None = None
    cache: Literal["auto", "memory", "disk", "off"] = "auto"
    readout: Readout | None = None
    head: Head | None = None
    views: Positive = 1
    class_weights: Literal["balanced"] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    regression: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    group: str | None = None
    tune: bool = False


@dataclass(frozen=True)
class Task:
    """A model and its training, validation and test images.

    ``base`` has the initial backbone if only changed tensors will be written. ``validation`` or ``test`` may be
    None, but not both. ``copies`` are identical images.
    """

    model: FineTuneModel
    architecture: str
    arguments: dict[str, Any]
    weights: str
    data_config: dict[str, Any]
    base: BaseWeights | None
    train: ImageDataset
    validation: ImageDataset | None
    test: ImageDataset | None
    objective: Objective
    phases: tuple[Phase, ...]
    copies: tuple[Copy, ...]

    def parts(self) -> dict[str, ImageDataset]:
        """Return the existing parts by name: "train", "validation", "test"."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: data for name, data in parts.items() if data is not None}


def make_task(settings: TrainSettings, accelerator: Accelerator) -> Task:
    """Find the images and build the model. Nothing is written."""
    found = run_on_main(accelerator, lambda: _find_data(settings))
    train, validation, test = map(found.parts.get, (TRAIN, VALIDATION, TEST))
    assert train is not None
    start, source, weights = _load_start(settings, train.class_names)
    model, data_config = start.model, dict(start.data_config)
    channels = data_config["input_size"][0]
    run_on_main(accelerator, lambda: check_first_images(train, channels))
    phases = choose_phases(settings, len(train.paths), model)
    for phase in reversed(phases):  # checks each; the model is then frozen as in the first
        model.freeze_backbone(trainable_groups=phase.trainable_groups)
    base = remember_base(model, source, weights) if settings.trainable_only else None
    transform = build_transform(data_config)

    def unchanged(part: LabelledFolder | None) -> ImageDataset | None:
        return None if part is None else ImageDataset(part, transform, channels=channels)

    shown = ImageDataset(train, transform, augment=partial(build_transform, data_config), channels=channels)
    arguments, objective = dict(start.arguments), choose_objective(settings, train, start.objective)
    for phase in phases:  # checks
        make_mixing(phase, objective, model.num_classes)
        build_transform(data_config, phase.augment)
    return Task(
        model,
        start.architecture,
        arguments,
        weights,
        data_config,
        base,
        shown,
        unchanged(validation),
        unchanged(test),
        objective,
        phases,
        found.copies,
    )


def choose_phases(settings: TrainSettings, num_images: int, model: FineTuneModel) -> tuple[Phase, ...]:
    """Return the phases of a run: those of the settings, or of ``tune``; cached views need an augmentation."""
    if settings.tune and settings.phases != TrainSettings.phases:
        raise ValueError("tune and phases were both given; tune chooses the phases, so leave one of them out")
    phases = tuning_phases(num_images, model) if settings.tune else settings.phases
    if settings.views > 1 and all(phase.augment is None for phase in phases):
        return tuple(replace(phase, augment=Augmentation.LIGHT) for phase in phases)
    return phases


def _load_start(settings: TrainSettings, class_names: tuple[str, ...]) -> tuple[TrainedModel, Source, str]:
    """Load the initial model, and return the source of its weights and a description of it.

    A model file is trained further: with its classifier if the classes are the same, else with a new one.
    """
    path = settings.checkpoint
    description = None if path is None else describe_model_file(path)
    if settings.base is not None and description is None:
        raise ValueError(f"--base {settings.base} is for a --checkpoint that `train --trainable-only` wrote")
    size = (settings.input_size,) * 2 if isinstance(settings.input_size, int) else settings.input_size
    if path is None or description is None:
        given = input_arguments(settings.architecture or PACKAGED_ARCHITECTURE, size, settings.in_chans)
        architecture, source, words, network = load_network(
            settings.architecture, pretrained=settings.pretrained, checkpoint=path, **given
        )
        arguments = model_arguments(network) | given if ":" in (settings.architecture or "") else given
        readout = None
        if settings.readout is not None:
            arguments, readout = choose_readout(settings.readout, network, architecture, arguments)
        classifier = choose_classifier(settings.head or "linear", len(class_names))
        model = assemble(network, len(class_names), readout=readout, classifier=classifier)
        data_config = choose_data_config(network, small=settings.images is None, size=size)
        return TrainedModel(model, architecture, class_names, data_config, arguments), source, words
    if settings.pretrained or settings.architecture not in {None, description.architecture}:
        raise ValueError(f"{path} is a model on {description.architecture}; leave out --model and --pretrained with it")
    if settings.trainable_only and description.base is not None:
        raise ValueError(
            f"{path} has only what training changed, so it cannot be the base of another such file; leave out "
            "--trainable-only"
        )
    if settings.readout is not None or settings.head is not None:
        raise ValueError(f"{path} has the readout and the head it was trained with; leave out --readout and --head")
    trained = _resize(load_trained_model(path, base=settings.base), path, size, settings.in_chans)
    words = f"weights from {path}"
    if trained.class_names == class_names:
        return replace(trained, model=trained.model.unfreeze_backbone()), "file", words
    words = f"{words}, with a new classifier, as its classes are {join_some(trained.class_names)}"
    model = with_new_classifier(trained, path, class_names)
    return replace(trained, model=model, class_names=class_names, objective=SingleLabel()), "file", words


def _resize(trained: TrainedModel, path: Path, size: Size | None, channels: int | None) -> TrainedModel:
    """Return a model of a file for images of another size, if its network takes them as it is."""
    own_channels, *own_size = trained.data_config["input_size"]
    if channels not in {None, own_channels}:
        raise ValueError(f"{path} is a model of {own_channels} channels; leave out --in-chans, or choose other weights")
    if size is None or list(size) == own_size:
        return trained
    if problem := find_size_problem(meta_copy(trained.model), (own_channels, *size)):
        raise ValueError(
            f"{path} is a model of images of {' x '.join(map(str, own_size))} pixels, and takes no others ({problem}); "
            "leave out --input-size, or choose other weights"
        )
    return replace(trained, data_config={**trained.data_config, "input_size": (own_channels, *size)})


def _find_data(settings: TrainSettings) -> FoundData:
    check_output_folder(settings.output, overwrite=settings.overwrite)
    return find_data(
        settings.images or CLIPART,
        validation=settings.validation,
        test=settings.test,
        chooses=None if settings.monitor is None else settings.monitor != "off",
        test_share=TEST_SHARE,
        seed=settings.seed,
        values=settings.regression or (),
        group=settings.group,
    )


def choose_objective(settings: TrainSettings, folder: LabelledFolder, start: Objective) -> Objective:
    """Return the objective for the targets of the training images; raise ValueError if a setting does not fit it.

    A model of the same values that is trained further keeps the scale of its classifier.
    """
    if isinstance(folder.targets[0], int):
        weights = None if settings.class_weights is None else balanced_weights(folder.targets)
        return SingleLabel(weights, settings.label_smoothing)
    objective = MultiLabel() if settings.regression is None else Regression().scaled_to(torch.tensor(folder.targets))
    if settings.class_weights is not None or settings.label_smoothing or settings.monitor not in {None, "loss", "off"}:
        raise ValueError(
            "class_weights, label_smoothing, and accuracy as a monitor are for one class per image; these images have "
            f"{'labels' if settings.regression is None else 'values'}, and their monitor is {objective.main_metric}, "
            "loss or off"
        )
    return start if isinstance(objective, Regression) and isinstance(start, Regression) else objective


def choose_data_config(network: Any, *, small: bool, size: Size | None = None) -> dict[str, Any]:
    """Return timm's data config of a network; with ``small`` that of a small input, if the network supports it."""
    if size is None and small and not network.pretrained_cfg.get("fixed_input_size", False):
        config = resolve_data_config(network, CLIPART_INPUT_SIZE)
        if find_size_problem(meta_copy(network), config["input_size"]) is None:
            return config
    return resolve_data_config(network, size)


def choose_monitor(settings: TrainSettings, task: Task) -> Callable[[EpochResult], float] | None:
    """Return the monitor of the best epoch; None keeps the last one."""
    main = task.objective.main_metric
    monitor = settings.monitor or ("off" if task.validation is None or task.test is None else main)
    if monitor == "off":
        return None

    def rate(result: EpochResult) -> float:
        value = result.validation(monitor.replace("-", "_"))
        if monitor == "loss":
            value = None if result.validation_loss is None else -result.validation_loss
        return -math.inf if value is None else value

    return rate


def balanced_weights(targets: Sequence[int]) -> tuple[float, ...]:
    """Return the weight ``N / (K * count)`` of each class, as scikit-learn's "balanced"; each class has an image.

    >>> balanced_weights([0, 0, 0, 1])
    (0.6666666666666666, 2.0)
    """
    counts = Counter(targets)
    return tuple(len(targets) / (len(counts) * counts[target]) for target in sorted(counts))
