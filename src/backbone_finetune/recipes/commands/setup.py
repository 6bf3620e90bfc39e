"""What a run trains on what: its settings, and the model and the images that they ask for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from accelerate import Accelerator
from pydantic import ConfigDict, Field
from timm.data.config import resolve_model_data_config

from backbone_finetune import FineTuneModel
from backbone_finetune.splitting.copies import meta_copy

from ..data.images import ImageDataset, LabelledFolder, find_images, split
from ..models.changes import BaseWeights, find_source, remember_base
from ..models.file import build_transform, find_size_problem
from ..models.weights import load_network
from ..training.loop import TrainerConfig
from ..training.phases import Phase
from ..training.processes import run_on_main
from .run_folder import check_output_folder

__all__ = ["CLIPART", "Task", "TrainSettings", "make_task"]

CLIPART = Path(__file__).parents[1] / "data" / "clipart" / "pictures"
# The clipart is stored at 64 pixels. Five-fold cross-validation on its training images alone gave .66 at 96 pixels,
# .69 at 128 and .73 at 160, for 2 and 4 times the time; a first look at a library had better be quick.
CLIPART_INPUT_SIZE = (3, 96, 96)
TEST_SHARE = 0.3
Positive = Annotated[int, Field(ge=1)]


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainSettings:
    """What to train on what. Left alone: the packaged ImageNet weights, on the packaged clipart.

    ``images`` is a folder with a sub-folder per class. ``architecture`` is a name of timm; its weights are random
    unless they come from the hub (``pretrained``) or from a file (``checkpoint``). A step sees ``batch_size``
    images, on all processes together, in ``accumulation`` parts one after another. With ``trainable_only`` the model
    file holds what training changed, and loads on top of these weights alone. ``autocast_features`` says whether a
    frozen backbone computes in bf16 where that is faster: left alone, unless ``mixed_precision`` is "no".
    ``device`` is ``auto`` (CUDA, else MPS, else the CPU) or a name of torch. ``baselines`` trains the same classifier
    on a random backbone and on raw pixels as well, and times the backward pass: left alone, on the clipart only.
    ``workers`` processes load images: left alone, by the cores and the number of images. The model is the same.
    ``compile`` compiles a frozen backbone for its pass, which pays from some 5,000 images on.

    >>> TrainSettings(phases=(Phase(trainable_groups=1),)).output
    PosixPath('fine-tuned')
    """

    images: Path | None = None
    architecture: str | None = None
    pretrained: bool = False
    checkpoint: Path | None = None
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)] = (Phase(),)
    batch_size: Positive = 32
    accumulation: Positive = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    checkpoint_steps: Positive = TrainerConfig.checkpoint_steps
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    autocast_features: bool | None = None
    device: str = "auto"
    output: Path = Path("fine-tuned")
    trainable_only: bool = False
    overwrite: bool = False
    baselines: bool | None = None
    workers: Annotated[int, Field(ge=0)] | None = None
    compile: Literal["inductor", "openvino"] | None = None


@dataclass(frozen=True)
class Task:
    """A model and what it is trained and tested on.

    ``base`` is what the backbone was, where only what changes is to be written.

    >>> sorted(Task.__dataclass_fields__)[:3]
    ['architecture', 'base', 'data_config']
    """

    model: FineTuneModel
    architecture: str
    weights: str
    data_config: dict[str, Any]
    base: BaseWeights | None
    train: ImageDataset
    test: ImageDataset


def make_task(settings: TrainSettings, accelerator: Accelerator) -> Task:
    """Find the images and build the model; nothing is written, and the main process alone looks at the images."""
    source = (
        find_source(settings.architecture, pretrained=settings.pretrained, checkpoint=settings.checkpoint)
        if settings.trainable_only
        else None
    )
    found = run_on_main(accelerator, lambda: find_classes(settings))
    architecture, weights, network = load_network(
        settings.architecture, pretrained=settings.pretrained, checkpoint=settings.checkpoint
    )
    model = FineTuneModel.from_timm(network, num_classes=len(found.class_names))
    for phase in reversed(settings.phases):  # all are tried; in the end it is as in the first
        model.freeze_backbone(trainable_groups=phase.trainable_groups)
    base = remember_base(model, source, weights) if source is not None else None
    data_config = choose_fitting_config(model, architecture, settings)
    transform = build_transform(data_config)
    train_data, test_data = (
        ImageDataset(part, transform) for part in split(found, test_share=TEST_SHARE, seed=settings.seed)
    )
    return Task(model, architecture, weights, data_config, base, train_data, test_data)


def find_classes(settings: TrainSettings) -> LabelledFolder:
    """Check the output folder and find the classes; nothing is written.

    >>> len(find_classes(TrainSettings(output=Path("no such folder"))).class_names)
    10
    """
    check_output_folder(settings.output, overwrite=settings.overwrite)
    return find_images(settings.images or CLIPART)


def choose_data_config(model: FineTuneModel, settings: TrainSettings) -> dict[str, Any]:
    """Take timm's own data config of a model, but for the small clipart a small input, where the network allows it.

    >>> choose_data_config(FineTuneModel.from_timm("resnet18", num_classes=10), TrainSettings())["input_size"]
    (3, 96, 96)
    """
    small = settings.images is None and not model.pretrained_cfg.get("fixed_input_size", False)
    wanted = {"input_size": CLIPART_INPUT_SIZE} if small else {}
    config: dict[str, Any] = resolve_model_data_config(model, args=wanted)  # type: ignore[no-untyped-call]
    return config


def choose_fitting_config(model: FineTuneModel, architecture: str, settings: TrainSettings) -> dict[str, Any]:
    """Take the data config of `choose_data_config`, or timm's own where the network takes no image so small.

    >>> model = FineTuneModel.from_timm("halonet26t", num_classes=10)
    >>> choose_fitting_config(model, "halonet26t", TrainSettings())["input_size"]
    (3, 256, 256)

    Raises:
        ValueError: it takes none of timm's own size either.
    """
    twin = meta_copy(model)  # no weight is looked at, and no pass through the network itself costs time
    config = choose_data_config(model, settings)
    if find_size_problem(twin, config["input_size"]) is None:
        return config
    own: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    if problem := find_size_problem(twin, own["input_size"]):
        raise ValueError(
            f"{architecture} takes no image of {' x '.join(map(str, own['input_size']))}, which timm names as its "
            f"input size ({problem}); choose another --model"
        )
    return own
