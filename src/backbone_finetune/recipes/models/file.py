"""A trained model as one file: its tensors, and everything to build the network and preprocess images.

A file may be untrusted: nothing in it is executed, no path or URL in it is opened, and no weight is loaded
before the layouts of all tensors are compared with the network of the file, built on the meta device.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data.transforms_factory import create_transform
from torch import Tensor

from backbone_finetune import FineTuneModel
from backbone_finetune.checkpoint import (
    Layout,
    check_fit,
    distinct_tensors,
    load_tensors,
    peek_checkpoint,
    read_checkpoint,
    save_tensors,
)

from ..checking import validated
from ..data.augmentation import Augmentation
from ..data.bands import Picture
from ..objectives.kinds import SingleLabel
from ..objectives.objective import Objective
from ..text import one_line
from .base import BaseWeights, find_base
from .classifiers import KINDS, describe_classifier
from .inputs import find_size_problem
from .metadata import ModelDescription, describe_objective, installed_versions, parse_metadata
from .readouts import assemble, describe_readout

# Limit for buffers that a network computes (masks, positions) and that are not in the file.
MOST_BYTES_BESIDE = 2**28


@dataclass(frozen=True)
class TrainedModel:
    """A model with the names of its classes and timm's data config.

    ``data_config`` holds ``input_size`` (channels, height, width), ``mean``, ``std``, ``interpolation``, ``crop_pct``
    and ``crop_mode``, as in ``timm.data.resolve_model_data_config``. ``arguments`` are further arguments of
    ``FineTuneModel.from_timm``, such as ``drop_rate``. ``objective`` says what the outputs mean, by default a
    class.

    >>> model = FineTuneModel.from_timm("test_resnet", num_classes=2)
    >>> data_config = timm.data.resolve_model_data_config(model)
    >>> TrainedModel(model, "test_resnet", ("cat", "dog"), data_config).class_names
    ('cat', 'dog')
    """

    model: FineTuneModel
    architecture: str
    class_names: tuple[str, ...]
    data_config: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    objective: Objective = field(default_factory=SingleLabel)


def build_transform(
    data_config: Mapping[str, Any], augmentation: Augmentation | None = None
) -> Callable[[Picture], Tensor]:
    """Build timm's evaluation transform, which is deterministic, or the training transform of an augmentation.

    It takes what `read_image` returns.
    """
    with torch.device("cpu"):  # normalization holds tensors
        if augmentation is not None:
            return augmentation.make_transform(data_config)
        transform: Callable[[Picture], Tensor] = create_transform(**data_config)
    return transform


def save_trained_model(trained: TrainedModel, path: Path, *, record: Mapping[str, object]) -> None:
    """Write a trained model to a ``.safetensors`` file, atomically; ``record`` is JSON about its training.

    >>> from tempfile import TemporaryDirectory
    >>> model = FineTuneModel.from_timm("test_resnet", num_classes=2)
    >>> trained = TrainedModel(model, "test_resnet", ("cat", "dog"), timm.data.resolve_model_data_config(model))
    >>> with TemporaryDirectory() as folder:
    ...     save_trained_model(trained, Path(folder, "model.safetensors"), record={"seed": 0})
    ...     load_trained_model(Path(folder, "model.safetensors")).class_names
    ('cat', 'dog')

    Raises:
        ValueError: ``load_trained_model`` could not load it: another head, another architecture, an argument
            that is not allowed in a file.
    """
    save_tensors(distinct_tensors(trained.model), path, _make_metadata(trained, record))


def save_trained_changes(trained: TrainedModel, base: BaseWeights, path: Path, *, record: Mapping[str, object]) -> None:
    """Write the classifier and the backbone tensors that training changed; see ``save_trained_model``.

    The file has the name of its base (``remember_base``) and a fingerprint of it: it loads onto this base only.
    """
    kept = base.find_kept(trained.model)
    changes = {name: tensor for name, tensor in distinct_tensors(trained.model).items() if name not in kept}
    metadata = _make_metadata(trained, record) | {"base": base.refer(kept).model_dump_json()}
    save_tensors(changes, path, metadata)


@validated
def load_trained_model(path: Path, *, base: Path | None = None) -> TrainedModel:
    """Read a model file, and build its model on the CPU in eval mode; see ``save_trained_model``.

    Parameters are frozen as they were. Nothing is downloaded.

    Args:
        path: A file of ``save_trained_model``, or of ``train`` with ``trainable_only``: a file of changes.
        base: The base weights of a file of changes. None finds those of the package, and of the Hugging Face hub if
            they are in its cache on this machine.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, foreign, or does not fit its network, or its base is another one or
            not on this machine.
    """
    description, outline = load_outline(path)
    tensors, _ = read_checkpoint(path)
    with _naming(path):
        missing = [name for name in distinct_tensors(outline) if name not in tensors]
        if base is not None and not missing:
            raise ValueError(f"it holds the whole model, and takes no base (given: {base})")
        below = find_base(description, missing, base) if missing else {}
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"{name} holds values that are not finite; training diverged (lower --lr) or the file is damaged"
                )
        model = _build_model(description)
        load_tensors(model, {**below, **tensors})
    for parameter, described in zip(model.parameters(), outline.parameters(), strict=True):
        parameter.requires_grad_(described.requires_grad)
    names, config = description.class_names, description.data_config.model_dump()
    objective, arguments = description.make_objective(), description.given_arguments
    return TrainedModel(model.eval(), description.architecture, names, config, arguments, objective)


def describe_model_file(path: Path) -> ModelDescription | None:
    """Read the description of a model file; None for any other file of weights."""
    try:
        with safe_open(path, framework="pt") as opened:
            if "class_names" not in (opened.metadata() or {}):
                return None
    except (SafetensorError, OSError):  # reading its weights raises an error that names the file
        return None
    return _read_description(path)[0]


def _read_description(path: Path) -> tuple[ModelDescription, dict[str, Layout]]:
    layouts, metadata = peek_checkpoint(path)
    with _naming(path, "not a model that `backbone-finetune train` wrote; "):
        return parse_metadata(metadata), layouts


def load_outline(path: Path) -> tuple[ModelDescription, FineTuneModel]:
    """Read the description of a model file, and build its model on the meta device, frozen as it was."""
    description, layouts = _read_description(path)
    with _naming(path):
        model = _check_layouts(description, layouts)
        parameters, trainable = dict(model.named_parameters()), set(description.freeze_state.trainable)
        if unknown := [name for name in trainable if name not in parameters]:
            raise ValueError(f"trainable: {unknown[0][:80]!r} is no parameter of {description.architecture}")
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trainable)
    return description, model


@contextmanager
def _naming(path: Path, what: str = "") -> Iterator[None]:
    """Put the name of a file before the message of a ValueError, all on one line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {what}{one_line(error, most=1000)}") from error


def describe_use(trained: TrainedModel) -> dict[str, str]:
    """Return what a network is used with, by name, in JSON: class names, preprocessing, objective and versions.

    It is in the metadata of a model file, and in exported files. Without an objective an image has one class.
    """
    entries: dict[str, object] = {
        "class_names": trained.class_names,
        "data_config": dict(trained.data_config),
        "versions": installed_versions(),
        "objective": describe_objective(trained.objective),
    }
    return {name: json.dumps(entry) for name, entry in entries.items() if entry is not None}


def _make_metadata(trained: TrainedModel, record: Mapping[str, object]) -> dict[str, str]:
    """Describe a model as the metadata of a file, and check that the model can be built again from it."""
    trainable = [name for name, parameter in trained.model.named_parameters() if parameter.requires_grad]
    entries: dict[str, object] = {
        "arguments": dict(trained.arguments),
        "freeze_state": {"norm_eval": trained.model.norm_eval, "trainable": trainable},
        "record": record,
        "readout": describe_readout(trained.model.backbone),
        "classifier": describe_classifier(trained.model.classifier),
    }
    written = {name: json.dumps(entry) for name, entry in entries.items() if entry is not None}
    metadata = {"architecture": trained.architecture, **describe_use(trained), **written}
    try:
        built = _check_layouts(parse_metadata(metadata), distinct_tensors(trained.model))
        kinds = type(trained.model.classifier), type(built.classifier)
        if kinds[0] is not kinds[1]:  # a subclass of Linear may compute anything else
            raise ValueError(f"its classifier is a {kinds[0].__name__}, not a {kinds[1].__name__}")
    except ValueError as error:
        raise ValueError(
            f"a file of this model could not be loaded again: {error}; a file holds {KINDS} as classifier"
        ) from error
    return metadata


def with_new_classifier(trained: TrainedModel, path: Path, class_names: tuple[str, ...]) -> FineTuneModel:
    """Return the model of a file with a new classifier, of the same layers, for other classes."""
    description = load_outline(path)[0]
    layers = None if description.classifier is None else description.classifier.with_outputs(len(class_names))
    model = _build_model(description.model_copy(update={"class_names": class_names, "classifier": layers}))
    model.backbone.load_state_dict(trained.model.backbone.state_dict())
    return model


def _build_model(description: ModelDescription) -> FineTuneModel:
    """Build the network of a description with random weights."""
    try:
        return assemble(
            description.architecture,
            len(description.class_names),
            readout=description.given_readout,
            classifier=None if description.classifier is None else description.classifier.build(),
            norm_eval=description.freeze_state.norm_eval,
            **description.given_arguments,
        )
    except Exception as error:  # an architecture may raise any error for an argument that it does not support
        raise ValueError(
            f"timm {timm.__version__} cannot build {description.architecture} with {description.given_arguments} "
            f"({one_line(error, most=200)})"
        ) from error


def _check_layouts(description: ModelDescription, layouts: Mapping[str, Layout | Tensor]) -> FineTuneModel:
    """Compare the layouts of a file's tensors with its network, built on the meta device; return the network.

    A file with a base may leave out tensors of the backbone.
    """
    with torch.device("meta"):
        model = _build_model(description)
    own = distinct_tensors(model)
    left_out = {name: tensor for name, tensor in own.items() if description.base and name.startswith("backbone.")}
    architecture, size = description.architecture, description.data_config.input_size
    try:
        check_fit(model, {**left_out, **layouts})
    except ValueError as error:
        wrote = description.versions.get("timm", "?")
        by = f"as timm {timm.__version__} builds it (the file was written with timm {wrote})"
        raise ValueError(f"{architecture} {by}: {error}") from error
    beside = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in own)
    if beside > MOST_BYTES_BESIDE:
        raise ValueError(
            f"{architecture} with {description.given_arguments} would compute tables of {beside:,} bytes "
            f"beside its tensors; at most {MOST_BYTES_BESIDE:,} are allowed"
        )
    if problem := find_size_problem(model, size):
        raise ValueError(
            f"{architecture} takes no image of {' x '.join(map(str, size))}, which the file names as its "
            f"input_size ({problem})"
        )
    return model
