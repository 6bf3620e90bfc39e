"""What ``backbone-finetune predict`` does: images in, class names and probabilities out."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..checking import expect, is_whole
from ..data.images import read_image
from ..files import replacing
from ..models.file import TrainedModel, build_transform

__all__ = ["Prediction", "predict", "writing_csv", "writing_json"]

# Of a resized image: half a gigabyte. The largest networks of timm come nowhere near it.
MOST_PIXELS = 2**27


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, best first, as ``(class name, probability)``; or why it can't be read.

    >>> Prediction(Path("tom.jpg"), (("cat", 0.9), ("dog", 0.1))).error is None
    True
    """

    path: Path
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None


def predict(
    trained: TrainedModel, images: Iterable[Path], *, top_k: int = 3, batch_size: int = 32
) -> Iterator[Prediction]:
    """Name the likeliest classes of each image, in order. One that can't be read does not stop the others.

    Images go through the model ``batch_size`` at a time, on the device that it is on; no more are in memory at once.

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
    """
    expect("top_k", top_k, "a whole number from 1", is_whole(top_k, least=1))
    expect("batch_size", batch_size, "a whole number from 1", is_whole(batch_size, least=1))
    transform, elongated = build_transform(trained.data_config), most_elongated(trained.data_config)
    trained.model.eval()
    remaining = iter(images)
    while batch := list(islice(remaining, batch_size)):
        outcomes = [read_input(path, transform, elongated) for path in batch]
        inputs = [outcome for outcome in outcomes if isinstance(outcome, Tensor)]
        answers = iter(classify(trained, torch.stack(inputs), top_k) if inputs else ())
        for path, outcome in zip(batch, outcomes, strict=True):
            yield Prediction(path, error=outcome) if isinstance(outcome, str) else Prediction(path, next(answers))


def read_input(path: Path, transform: Callable[[Image.Image], Tensor], elongated: float) -> Tensor | str:
    """Read an image as a model takes it, ``(3, H, W)``; or say why it can't be, or is too elongated to be.

    >>> read_input(Path("nowhere.jpg"), lambda image: torch.zeros(3, 8, 8), 100)
    'nowhere.jpg: there is no such file'
    """
    try:
        image = read_image(path)
        if max(image.size) > elongated * min(image.size):
            return (
                f"{path}: {image.width} x {image.height} pixels; as large as this model takes images, at most "
                f"1 to {elongated:.1f} is allowed"
            )
        return transform(image)
    except (ValueError, OSError) as error:
        return str(error)
    except MemoryError:
        return f"{path}: takes more memory than there is"


def most_elongated(data_config: Mapping[str, Any]) -> float:
    """Say how many times as long as wide an image may be: its shorter side becomes the input's, before it is cropped.

    >>> most_elongated({"input_size": (3, 224, 224), "crop_pct": 0.875}) > 1000
    True
    >>> most_elongated({"input_size": (3, 4096, 4096), "crop_pct": 1.0})
    8.0
    """
    return float(MOST_PIXELS / (max(data_config["input_size"]) / data_config["crop_pct"]) ** 2)


@torch.no_grad()
def classify(trained: TrainedModel, inputs: Tensor, top_k: int) -> list[tuple[tuple[str, float], ...]]:
    """Name the likeliest classes of each input, ``(B, 3, H, W)``, with their probabilities, best first."""
    device = next(trained.model.parameters()).device
    probabilities = trained.model(inputs.to(device)).float().softmax(-1).cpu()
    values, indices = probabilities.topk(min(top_k, len(trained.class_names)))
    return [
        tuple((trained.class_names[index], value) for index, value in zip(*row, strict=True))
        for row in zip(indices.tolist(), values.tolist(), strict=True)
    ]


@contextmanager
def writing_csv(path: Path, top_k: int) -> Iterator[Callable[[Prediction], None]]:
    """Give a function that adds a prediction to a CSV file, a row each; the file is there when the block has ended.

    It is in UTF-8; a byte of a name that is no text goes out as it is.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     with writing_csv(Path(folder, "answers.csv"), top_k=1) as write:
    ...         write(Prediction(Path("tom.jpg"), (("cat", 0.9),)))
    ...     Path(folder, "answers.csv").read_text().splitlines()
    ['image,class_1,probability_1,error', 'tom.jpg,cat,0.9,']
    """
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        rows = csv.writer(file)
        columns = (f"{column}_{rank}" for rank in range(1, top_k + 1) for column in ("class", "probability"))
        rows.writerow(["image", *columns, "error"])

        def write(prediction: Prediction) -> None:
            cells = [cell for pair in prediction.classes for cell in pair]
            rows.writerow([prediction.path, *cells, *[""] * (2 * top_k - len(cells)), prediction.error or ""])

        yield write


@contextmanager
def writing_json(path: Path) -> Iterator[Callable[[Prediction], None]]:
    r"""Give a function that adds a prediction to a JSON file, which holds a list of them when the block has ended.

    A byte of a name that is no text goes out as Python knows it, ``\udcff`` for 255: ``os.fsencode`` gives it back.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     with writing_json(Path(folder, "answers.json")) as write:
    ...         write(Prediction(Path("tom.jpg"), (("cat", 0.9),)))
    ...     json.loads(Path(folder, "answers.json").read_text())
    [{'image': 'tom.jpg', 'classes': [{'name': 'cat', 'probability': 0.9}], 'error': None}]
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        separator = "[\n"

        def write(prediction: Prediction) -> None:
            nonlocal separator
            classes = [{"name": name, "probability": probability} for name, probability in prediction.classes]
            entry = {"image": str(prediction.path), "classes": classes, "error": prediction.error}
            file.write(separator + json.dumps(entry))
            separator = ",\n"

        yield write
        file.write("\n]\n" if separator == ",\n" else "[]\n")
