"""The model that a run starts from: a network with a new classifier, or a model file that is trained further."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from backbone_finetune.names import shortened
from backbone_finetune.splitting.copies import meta_copy

from ..models.classifiers import choose_classifier
from ..models.file import TrainedModel, describe_model_file, load_trained_model, with_new_classifier
from ..models.inputs import Size, find_size_problem, input_arguments, resolve_data_config
from ..models.metadata import ModelDescription
from ..models.readouts import assemble, choose_readout
from ..models.weights import PACKAGED_ARCHITECTURE, Source, load_network, model_arguments
from ..objectives.kinds import SingleLabel
from .settings import TrainSettings

# The clipart is stored at 64 pixels. Five-fold cross-validation on its training images alone gave .66 at 96 pixels,
# .69 at 128 and .73 at 160, in 2 and 4 times the time; the demo should be quick.
CLIPART_INPUT_SIZE = (96, 96)


def load_start(settings: TrainSettings, class_names: tuple[str, ...]) -> tuple[TrainedModel, Source, str, bool]:
    """Load the initial model; return the source of its weights, a description, and whether its classifier is trained.

    A model file is trained further: with its classifier if the classes are the same, else with a new one.
    """
    path = settings.checkpoint
    if path is not None and (description := describe_model_file(path)) is not None:
        _check_file(settings, path, description)
        return _load_file(settings, path, class_names)
    if settings.base is not None:
        raise ValueError(f"--base {settings.base} is for a --checkpoint that `train --trainable-only` wrote")
    size = _size(settings)
    given = input_arguments(settings.architecture or PACKAGED_ARCHITECTURE, size, settings.in_chans)
    architecture, source, words, network = load_network(
        settings.architecture, pretrained=settings.pretrained, checkpoint=settings.checkpoint, **given
    )
    arguments = model_arguments(network) | given if ":" in (settings.architecture or "") else given
    readout = None
    if settings.readout is not None:
        arguments, readout = choose_readout(settings.readout, network, architecture, arguments)
    classifier = choose_classifier(settings.head or "linear", len(class_names))
    model = assemble(network, len(class_names), readout=readout, classifier=classifier)
    data_config = choose_data_config(network, small=settings.images is None, size=size)
    return TrainedModel(model, architecture, class_names, data_config, arguments), source, words, False


def _size(settings: TrainSettings) -> Size | None:
    return (settings.input_size,) * 2 if isinstance(settings.input_size, int) else settings.input_size


def _check_file(settings: TrainSettings, path: Path, description: ModelDescription) -> None:
    """Raise ValueError if a setting is not for a model file, or not for this one."""
    if settings.pretrained or settings.architecture not in {None, description.architecture}:
        raise ValueError(f"{path} is a model on {description.architecture}; leave out --model and --pretrained with it")
    if settings.trainable_only and description.base is not None:
        raise ValueError(
            f"{path} has only what training changed, so it cannot be the base of another such file; leave out "
            "--trainable-only"
        )
    if settings.readout is not None or settings.head is not None:
        raise ValueError(f"{path} has the readout and the head it was trained with; leave out --readout and --head")


def _load_file(
    settings: TrainSettings, path: Path, class_names: tuple[str, ...]
) -> tuple[TrainedModel, Source, str, bool]:
    """Load a model to train it further."""
    trained = _resize(load_trained_model(path, base=settings.base), path, _size(settings), settings.in_chans)
    words = f"weights from {path}"
    if trained.class_names == class_names:
        return replace(trained, model=trained.model.unfreeze_backbone()), "file", f"{words}, with its classifier", True
    words = f"{words}, with a new classifier, as its classes are {shortened(trained.class_names)}"
    model = with_new_classifier(trained, path, class_names)
    return replace(trained, model=model, class_names=class_names, objective=SingleLabel()), "file", words, False


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


def choose_data_config(network: Any, *, small: bool, size: Size | None = None) -> dict[str, Any]:
    """Return timm's data config of a network; with ``small`` that of a small input, if the network supports it."""
    if size is None and small and not network.pretrained_cfg.get("fixed_input_size", False):
        config = resolve_data_config(network, CLIPART_INPUT_SIZE)
        if find_size_problem(meta_copy(network), config["input_size"]) is None:
            return config
    return resolve_data_config(network, size)
