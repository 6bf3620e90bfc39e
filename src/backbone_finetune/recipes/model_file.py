"""A trained model as one file: the tensors, and all it takes to build the network again and feed it a picture."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

from backbone_finetune import FineTuneModel
from backbone_finetune.checkpoint import load_tensors, read_checkpoint, save_checkpoint

__all__ = ["TrainedModel", "build_transform", "load_trained_model", "save_trained_model"]


@dataclass(frozen=True)
class TrainedModel:
    """A model with the names of its classes and timm's data config: what a picture needs to become an answer.

    ``data_config`` holds ``input_size`` (channels, height, width), ``mean``, ``std``, ``interpolation``, ``crop_pct``
    and ``crop_mode``, as ``timm.data.resolve_model_data_config`` gives them.

    >>> model = FineTuneModel.from_timm("test_resnet", num_classes=2)
    >>> data_config = timm.data.resolve_model_data_config(model)
    >>> TrainedModel(model, "test_resnet", ("cat", "dog"), data_config).class_names
    ('cat', 'dog')
    """

    model: FineTuneModel
    architecture: str
    class_names: tuple[str, ...]
    data_config: Mapping[str, Any]


def build_transform(data_config: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """Build timm's evaluation transform: resize, centre crop, normalise. The same picture always gives the same tensor.

    >>> model = timm.create_model("test_resnet")
    >>> tuple(build_transform(timm.data.resolve_model_data_config(model))(Image.new("RGB", (64, 48))).shape)
    (3, 160, 160)
    """
    transform: Callable[[Image.Image], Tensor] = create_transform(**data_config, is_training=False)
    return transform


def save_trained_model(trained: TrainedModel, path: Path, *, record: Mapping[str, object]) -> None:
    """Write a trained model and the record of its training (anything JSON can hold) to a ``.safetensors`` file.

    The file appears whole, or not at all.

    >>> from tempfile import TemporaryDirectory
    >>> model = FineTuneModel.from_timm("test_resnet", num_classes=2)
    >>> trained = TrainedModel(model, "test_resnet", ("cat", "dog"), timm.data.resolve_model_data_config(model))
    >>> with TemporaryDirectory() as folder:
    ...     save_trained_model(trained, Path(folder, "model.safetensors"), record={"seed": 0})
    ...     load_trained_model(Path(folder, "model.safetensors")).class_names
    ('cat', 'dog')
    """
    save_checkpoint(
        trained.model,
        path,
        {
            "architecture": trained.architecture,
            "class_names": json.dumps(trained.class_names),
            "data_config": json.dumps(dict(trained.data_config)),
            "record": json.dumps(record),
        },
    )


def load_trained_model(path: Path) -> TrainedModel:
    """Read a file of ``save_trained_model`` and build its model again, on the CPU and in eval mode.

    See `save_trained_model` for an example.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, foreign, or does not fit the network that it names.
    """
    tensors, metadata = read_checkpoint(path)
    try:
        architecture = metadata["architecture"]
        class_names = parse_class_names(metadata["class_names"])
        data_config = parse_data_config(metadata["data_config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a model that `backbone-finetune train` wrote; in its metadata: {error!r}"
        ) from error
    # Only a plain name: timm would fetch what another one points to.
    if not timm.is_model(architecture):
        raise ValueError(f"{path}: timm {timm.__version__} has no architecture {architecture!r}, which the file names")
    model = FineTuneModel.from_timm(architecture, num_classes=len(class_names))
    try:
        load_tensors(model, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {architecture} as timm {timm.__version__} builds it: {error}") from error
    return TrainedModel(model.eval(), architecture, class_names, data_config)


def parse_class_names(text: str) -> tuple[str, ...]:
    """Read the class names of a file's metadata.

    >>> parse_class_names('["cat", "dog"]')
    ('cat', 'dog')

    Raises:
        ValueError: they are not a list of two names or more.
    """
    names = json.loads(text)
    if not (isinstance(names, list) and len(names) > 1 and all(isinstance(name, str) for name in names)):
        raise ValueError(f"class_names: {text[:80]}; expected a list of two names or more")
    return tuple(names)


def parse_data_config(text: str) -> dict[str, Any]:
    """Read timm's data config of a file's metadata.

    >>> parse_data_config(
    ...     '{"input_size": [3, 96, 96], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], '
    ...     '"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}'
    ... )["input_size"]
    (3, 96, 96)

    Raises:
        KeyError: an entry is missing.
        TypeError: an entry is of another kind.
        ValueError: it is not JSON, or has other entries as well.
    """
    entries = json.loads(text)
    config: dict[str, Any] = {
        "input_size": tuple(int(length) for length in entries["input_size"]),
        "mean": tuple(float(value) for value in entries["mean"]),
        "std": tuple(float(value) for value in entries["std"]),
        "interpolation": str(entries["interpolation"]),
        "crop_pct": float(entries["crop_pct"]),
        "crop_mode": str(entries["crop_mode"]),
    }
    if len(entries) != len(config):
        raise ValueError(f"data_config: {sorted(entries)}; expected {sorted(config)}")
    return config
