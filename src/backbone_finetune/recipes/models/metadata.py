"""The metadata of a model file as a pydantic schema, which checks everything in a file before it is used."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated, Any, Literal

import timm
import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, Json, ValidationError, model_validator

from backbone_finetune import __version__
from backbone_finetune.validation import check_architecture

from ..checking import Above0, Finite, Schema, Share
from ..objectives.kinds import MultiLabel, Regression, SingleLabel
from ..objectives.objective import Objective
from ..text import describe_fault, has_control_characters
from .classifiers import ClassifierDescription, LinearLayer

LARGEST_SIDE = 4096
MOST_CHANNELS = 1024


def _check_known(architecture: str) -> str:
    """Raise ValueError unless a name is one of timm's: timm may download other names."""
    if not timm.is_model(architecture):
        raise ValueError(f"timm {timm.__version__} has no architecture of this name")
    check_architecture(architecture)
    return architecture


def _check_printable(text: str) -> str:
    """Raise ValueError for control characters."""
    if has_control_characters(text):
        raise ValueError("control characters are not allowed")
    return text


def _parse_class_names(text: str) -> tuple[str, ...]:
    """Read class names with Python's parser: pydantic's does not support the surrogates of undecodable bytes."""
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("invalid JSON") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("expected a list of two names or more")
    for name in names:
        _check_printable(name).encode(errors="surrogateescape")  # raises a ValueError for any other surrogate
    if len(set(names)) < len(names):
        raise ValueError("two classes have the same name")
    return tuple(names)


Channels = Annotated[int, Field(ge=1, le=MOST_CHANNELS)]
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
Drop = Annotated[float, Field(ge=0, lt=1)]
Number = Annotated[float, Field(ge=-1e6, le=1e6)]
Deviation = Annotated[float, Field(ge=1e-6, le=1e6)]
Printable = Annotated[str, Field(max_length=200), AfterValidator(_check_printable)]


class DataConfig(Schema):
    """The arguments of timm's evaluation transform for a network."""

    input_size: tuple[Channels, Side, Side]
    mean: tuple[Number, ...]
    std: tuple[Deviation, ...]
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"]
    crop_pct: Annotated[float, Field(ge=0.1, le=10)]
    crop_mode: Literal["center", "squash", "border"]

    @model_validator(mode="after")
    def _check_resized(self) -> "DataConfig":
        if (side := max(self.input_size[1:]) / self.crop_pct) > LARGEST_SIDE:
            raise ValueError(f"images would be resized to {side:,.0f} pixels; at most {LARGEST_SIDE:,} are allowed")
        return self

    @model_validator(mode="after")
    def _check_channels(self) -> "DataConfig":
        channels = self.input_size[0]
        if not len(self.mean) == len(self.std) == channels:
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} standard deviations of {channels} channels")
        if channels != 3 and (self.interpolation not in {"bilinear", "bicubic"} or self.crop_mode == "border"):
            raise ValueError(
                f"interpolation {self.interpolation} and crop mode {self.crop_mode} of {channels} channels; other "
                "numbers than 3 take bilinear or bicubic, and center or squash"
            )
        return self


class NetworkArguments(Schema):
    """The arguments of a network that a file may have: none that reads a file, downloads, or repeats layers."""

    drop_rate: Drop | None = None
    drop_path_rate: Drop | None = None
    attn_drop_rate: Drop | None = None
    proj_drop_rate: Drop | None = None
    patch_drop_rate: Drop | None = None
    global_pool: Annotated[str, Field(max_length=20)] | None = None
    fc_norm: bool | None = None
    use_fc_norm: bool | None = None
    img_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    dynamic_img_size: bool | None = None
    in_chans: Channels | None = None


class FreezeState(Schema):
    """The names of trainable parameters, and whether running statistics are fixed."""

    norm_eval: bool = False
    trainable: tuple[str, ...] = ()


class BaseReference(Schema):
    """The weights that are not in a file of changes; ``fingerprint`` is their digest."""

    source: Literal["package", "hub", "file"]
    words: Printable
    fingerprint: str


class ReadoutDescription(Schema):
    """The arguments of `TokenReadout`."""

    blocks: Annotated[int, Field(ge=1, le=1000)]
    patch_mean: bool


class MultiLabelDescription(Schema):
    """An image has each class whose probability is above its threshold."""

    kind: Literal["MultiLabel"]
    thresholds: tuple[Share, ...] | None = None


class RegressionDescription(Schema):
    """The class names are names of values; a value is ``output * std + mean``."""

    kind: Literal["Regression"]
    mean: tuple[Finite, ...]
    std: tuple[Above0, ...]


ObjectiveDescription = Annotated[MultiLabelDescription | RegressionDescription, Field(discriminator="kind")]


class ModelDescription(BaseModel, strict=True, extra="ignore"):
    """Everything to build a model and preprocess images, except its tensors.

    ``arguments`` are further arguments of ``FineTuneModel.from_timm``, and ``base`` is the base of a file of changes.
    Without an ``objective`` an image has one class; without a ``readout`` the features are the network's own, and
    without a ``classifier`` it is linear.
    """

    architecture: Annotated[str, AfterValidator(_check_known)]
    class_names: Annotated[tuple[str, ...], BeforeValidator(_parse_class_names)]
    data_config: Json[DataConfig]
    arguments: Json[NetworkArguments] = NetworkArguments()
    freeze_state: Json[FreezeState] = FreezeState()
    versions: Json[dict[Printable, Printable]] = Field(default_factory=dict)
    base: Json[BaseReference] | None = None
    objective: Json[ObjectiveDescription] | None = None
    readout: Json[ReadoutDescription] | None = None
    classifier: Json[ClassifierDescription] | None = None

    @model_validator(mode="after")
    def _check_objective(self) -> "ModelDescription":
        names = len(self.class_names)
        if self.objective is None and names < 2:
            raise ValueError("class_names: expected a list of two names or more")
        entries = {} if self.objective is None else self.objective.model_dump(exclude={"kind"}, exclude_none=True)
        for name, numbers in entries.items():
            if len(numbers) not in {names, 1 if name in {"mean", "std"} else names}:
                raise ValueError(f"objective: {name} has {len(numbers)} entries for {names} outputs")
        return self

    @model_validator(mode="after")
    def _check_classifier(self) -> "ModelDescription":
        if self.classifier is not None:
            last = self.classifier.layers[-1]
            if not (isinstance(last, LinearLayer) and last.out_features == len(self.class_names)):
                raise ValueError(f"classifier: its last layer must be a Linear of {len(self.class_names)} outputs")
        return self

    def make_objective(self) -> Objective:
        """Return the objective, which defines the meaning of the outputs."""
        if self.objective is None:
            return SingleLabel()
        kind = MultiLabel if self.objective.kind == "MultiLabel" else Regression
        return kind(**self.objective.model_dump(exclude={"kind"}))

    @property
    def given_arguments(self) -> dict[str, Any]:
        """The arguments in the file."""
        return self.arguments.model_dump(exclude_unset=True)

    @property
    def given_readout(self) -> dict[str, Any] | None:
        """The arguments of `TokenReadout` in the file."""
        return None if self.readout is None else self.readout.model_dump()


def describe_objective(objective: Objective) -> dict[str, Any] | None:
    """Return an objective as the metadata of a model file; None for one class per image."""
    if isinstance(objective, MultiLabel):
        return {"kind": "MultiLabel", "thresholds": objective.thresholds}
    if isinstance(objective, Regression):
        return {"kind": "Regression", "mean": objective.mean, "std": objective.std}
    return None


def parse_metadata(metadata: Mapping[str, str]) -> ModelDescription:
    """Read a description from the metadata of a file; raise ValueError with one sentence if it is invalid."""
    try:
        return ModelDescription.model_validate(dict(metadata))
    except ValidationError as error:
        raise ValueError(describe_fault(error)) from error


def installed_versions() -> dict[str, str]:
    """Return the versions that a run, and the file that it writes, depend on."""
    return {
        "accelerate": version("accelerate"),  # importing it would take seconds
        "backbone-finetune": __version__,
        "python": platform.python_version(),
        "timm": timm.__version__,
        "torch": torch.__version__,
    }
