"""The accuracy of the nearest neighbours on a model's features, which needs no classifier."""

import copy
from pathlib import Path

import torch

from ..data.images import ImageDataset, LabelledFolder, is_read
from ..data.loading import DeviceLoader, default_workers
from ..data.sources.finding import find_splits
from ..features.dataset import Features
from ..features.extract import extract_features, find_device_of
from ..heads.neighbors import predict_neighbors
from ..models.file import TrainedModel, build_transform
from ..models.named import NamedModel
from .reporting.figures import Interval, bootstrap


def score_neighbors(train: Features, test: Features, num_classes: int) -> Interval:
    """Return the accuracy of the 20 nearest training images on the readable test images."""
    *_, targets = test.tensors
    read = is_read(targets)
    predicted = predict_neighbors(train, test.tensors[0][read], num_classes=num_classes).argmax(1)
    return bootstrap(lambda right: float(right.mean()), (predicted == targets[read]).numpy())


def measure_neighbors(
    trained: TrainedModel | NamedModel,
    source: Path,
    test: LabelledFolder,
    *,
    batch_size: int,
    workers: int | None,
    title: str | None,
) -> Interval:
    """Return the accuracy of the nearest neighbours among the training images in ``source``, a folder or table.

    Raises:
        FileNotFoundError: there is no such folder or table.
        ValueError: it has images of ``test``, or of classes that the model does not have; or the model is no
            `TrainedModel`, which alone has a backbone.
    """
    if not isinstance(trained, TrainedModel):
        raise ValueError("neighbours are found by the features of a backbone; pass the model.safetensors of `train`")
    train = next(iter(find_splits(source, trained.class_names).values()))  # "train", or all
    if shared := {path.resolve() for path in train.paths} & {path.resolve() for path in test.paths}:
        raise ValueError(
            f"{source}: {len(shared)} of its images are evaluated, and would be their own neighbours; pass the images "
            "that the model was trained on"
        )
    model = copy.deepcopy(trained.model).freeze_backbone()
    transform = build_transform(trained.data_config)
    channels = trained.data_config["input_size"][0]
    features = []
    for images in (ImageDataset(folder, transform, channels=channels) for folder in (train, test)):
        count = default_workers(len(images)) if workers is None else workers
        loader = DeviceLoader(images, find_device_of(model), batch_size=batch_size, workers=count)
        with torch.no_grad():  # in float32, as the model predicts
            features.append(extract_features(model, loader, autocast=False, title=title))
    return score_neighbors(features[0], features[1], len(trained.class_names))
