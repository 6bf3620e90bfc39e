"""``backbone-finetune predict``: predict class names and probabilities of images."""

from __future__ import annotations  # help() shows the names of types, not what pydantic checks

import glob
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Strict
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ..checking import Positive, Whole, validated
from ..data.bands import Picture, size_of
from ..data.images import read_image
from ..data.loading import map_batches
from ..data.sources.finding import list_images
from ..data.transforms import of_one_dtype, split_transform
from ..features.running import Runner
from ..models.file import TrainedModel, build_transform
from ..models.named import NamedModel
from ..objectives.kinds import MultiLabel, Regression

# For a resized image: half a gigabyte in float32. The largest timm networks need far less.
MOST_PIXELS = 2**27


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of an image, best first, as ``(class name, probability)``, or the reason of an error.

    For a model of labels, ``classes`` has all labels above their thresholds, possibly none. A model of values sets
    ``values``.

    >>> Prediction(Path("tom.jpg"), (("cat", 0.9), ("dog", 0.1))).error is None
    True
    """

    path: Path
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None
    values: tuple[tuple[str, float], ...] = ()


@validated
def predict(
    trained: TrainedModel | NamedModel,
    images: Iterable[Annotated[Path, Strict()]],  # strict: a str is a sequence of characters, not of paths
    *,
    top_k: Positive = 3,
    batch_size: Positive = 32,
    workers: Whole | None = None,
    tta: bool = False,
) -> Iterator[Prediction]:
    """Predict the most likely classes of each image, in order, in float32. Unreadable images do not stop the others.

    >>> import timm
    >>> from tempfile import TemporaryDirectory
    >>> from PIL import Image
    >>> from backbone_finetune import FineTuneModel
    >>> model = FineTuneModel.from_timm("test_resnet", num_classes=2)
    >>> trained = TrainedModel(model, "test_resnet", ("cat", "dog"), timm.data.resolve_model_data_config(model))
    >>> with TemporaryDirectory() as folder:
    ...     Image.new("RGB", (32, 32)).save(Path(folder, "tom.png"))
    ...     (prediction,) = predict(trained, [Path(folder, "tom.png")])
    >>> sorted(name for name, probability in prediction.classes)
    ['cat', 'dog']

    Args:
        trained: The model; it runs on its device.
        images: Paths of image files.
        top_k: The number of classes per image. A model of labels returns all labels of the image.
        batch_size: The number of images per batch.
        workers: The number of processes that read images; None chooses by cores and images.
        tta: Whether to average over the image and its mirror image (test-time augmentation), at twice the cost.

    Raises:
        ValueError: a number is out of range (pydantic's ``ValidationError``).
    """
    for path, outcome in predict_rows(trained, images, batch_size=batch_size, workers=workers, tta=tta):
        yield Prediction(path, error=outcome) if isinstance(outcome, str) else _name(trained, path, outcome, top_k)


def _name(trained: TrainedModel | NamedModel, path: Path, row: Tensor, top_k: int) -> Prediction:
    """Convert the probabilities or values of an image, ``(K,)``, to a `Prediction`."""
    names, objective = trained.class_names, trained.objective
    if isinstance(objective, Regression):
        return Prediction(path, values=tuple(zip(names, row.tolist(), strict=True)))
    values, indices = row.sort(descending=True, stable=True)
    pairs = [(names[index], value) for index, value in zip(indices.tolist(), values.tolist(), strict=True)]
    if isinstance(objective, MultiLabel):
        chosen = objective.choose(row.double())[indices].tolist()
        return Prediction(path, tuple(pair for pair, is_chosen in zip(pairs, chosen, strict=True) if is_chosen))
    return Prediction(path, tuple(pairs[:top_k]))


def predict_rows(
    trained: TrainedModel | NamedModel, images: Iterable[Path], *, batch_size: int, workers: int | None, tta: bool
) -> Iterator[tuple[Path, Tensor | str]]:
    """Predict the probabilities or values of each image, ``(K,)`` on the CPU, or return why it cannot be read."""
    trained.model.eval()
    config = trained.data_config
    to_bytes: Callable[[Picture], Tensor] = _whole
    normalize: Callable[[Tensor], Tensor] | None = None
    if isinstance(trained, NamedModel) and trained.preprocesses:
        batch_size = 1  # images may then have any size
    else:
        to_bytes, normalize = split_transform(build_transform(config))
    # The shorter side of an image is resized to that of the input before cropping, for any length of the other one.
    most_elongated = MOST_PIXELS / (max(config["input_size"][1:]) / config["crop_pct"]) ** 2
    paths = list(images)
    channels = config["input_size"][0]
    read = partial(_read_input, channels=channels, transform=to_bytes, most_elongated=most_elongated)
    device = next((parameter.device for parameter in trained.model.parameters()), torch.device("cpu"))
    runner = Runner()
    position = iter(paths)
    for outcomes in map_batches(read, paths, batch_size=batch_size, workers=workers):
        loaded = [outcome for outcome in outcomes if isinstance(outcome, Tensor)]
        answers: Iterator[Tensor] = iter(())
        if loaded:
            inputs = torch.stack(of_one_dtype(loaded)).to(device)
            inputs = inputs if normalize is None else normalize(inputs)
            answers = iter(runner.in_fast_layout(partial(_run, trained, tta=tta), [inputs], trained.model))
        for path, outcome in zip(islice(position, len(outcomes)), outcomes, strict=True):
            yield path, outcome if isinstance(outcome, str) else next(answers)


def _read_input(
    path: Path, channels: int, transform: Callable[[Picture], Tensor], most_elongated: float
) -> Tensor | str:
    """Read an image as input of a model, ``(C, H, W)``; or return why that is not possible."""
    try:
        image = read_image(path, channels)
        width, height = size_of(image)
        if max(width, height) > most_elongated * min(width, height):
            return (
                f"{path}: {width} x {height} pixels; as large as this model takes images, at most "
                f"1 to {most_elongated:.1f} is allowed"
            )
        if transform is _whole and isinstance(image, Tensor):
            return f"{path}: more than 8 bits per channel, and a model with preprocessing takes 8; export it without"
        with torch.device("cpu"):  # a worker has no other device
            return transform(image)
    except (ValueError, OSError) as error:
        return str(error)
    except MemoryError:
        return f"{path}: takes more memory than there is"


def _whole(image: Picture) -> Tensor:
    """Return a whole image as bytes ``(C, height, width)``."""
    octets: Tensor = pil_to_tensor(image)
    return octets


@torch.no_grad()
def _run(trained: TrainedModel | NamedModel, batch: Sequence[Tensor], *, tta: bool) -> Tensor:
    """Compute the probabilities or values of inputs ``(B, C, H, W)``: ``(B, K)`` on the CPU."""
    (inputs,) = batch
    views = (inputs, inputs.flip(-1)) if tta else (inputs,)
    return torch.stack([trained.objective.predict(trained.model(view).float()) for view in views]).mean(0).cpu()


def list_inputs(given: Sequence[str]) -> list[Path]:
    """List images from paths, folders, patterns (``photos/**/*.jpg``), and ``-`` for the lines of stdin.

    Of a folder, tar files (as `find_splits` reads them) and a dataset of Hugging Face they are all images.
    """
    paths: list[Path] = []
    for name in given:
        if name == "-":
            lines = [line.rstrip(b"\r\n") for line in sys.stdin.buffer]
            paths += [Path(os.fsdecode(line)) for line in lines if line]
        elif glob.has_magic(name) and not os.path.lexists(name):
            found = sorted(glob.glob(name, recursive=True))
            if not found:
                raise ValueError(f"{name}: no file matches this pattern")
            # What is in a folder matches ** as well as the folder.
            paths += [Path(each) for each in found if not ("**" in name and os.path.isdir(each))]
        else:
            paths.append(Path(name))
    if not paths:
        raise ValueError("stdin holds no path of an image")
    return [image for path in paths for image in list_images(path)]
