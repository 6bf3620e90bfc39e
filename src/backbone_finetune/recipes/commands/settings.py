"""The settings of a run, which the command line and ``run.json`` have too."""

from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import ConfigDict, Field

from ..checking import Positive, Whole
from ..models.classifiers import Head
from ..models.metadata import Channels, Side
from ..models.readouts import Readout
from ..training.config import TrainerConfig
from ..training.phases import Phase

CLIPART = Path(__file__).parents[1] / "data" / "clipart" / "pictures"


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainSettings:
    """The settings of a run. By default: the packaged ImageNet weights, on the packaged clipart.

    Args:
        images: A folder with a sub-folder of images per class, with train, val and test folders of these, a table, tar
            files, or a dataset of Hugging Face on disk; see ``find_images``.
        validation: Images on which the best epoch is chosen. By default the val folder.
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
        device: A torch device; "auto" is the accelerator that torch finds (CUDA, MPS, XPU), else the CPU.
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
        soft_labels: Columns of a table, one per class, with the probability of the class; those of a row sum to 1.
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
    soft_labels: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    group: str | None = None
    tune: bool = False
