"""What ``backbone-finetune predict`` does: pictures in, class names and probabilities out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .model_file import TrainedModel, build_transform
from .pictures import read_picture

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of a picture, best first, as ``(class name, probability)``; or why it can't be read.

    >>> Prediction(Path("tom.jpg"), (("cat", 0.9), ("dog", 0.1))).error is None
    True
    """

    path: Path
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None


def predict(trained: TrainedModel, pictures: Iterable[Path], *, top_k: int = 3) -> Iterator[Prediction]:
    """Name the likeliest classes of each picture, in order. One that can't be read does not stop the others.

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
    transform = build_transform(trained.data_config)
    trained.model.eval()
    for path in pictures:
        try:
            picture = read_picture(path)
        except (ValueError, OSError) as error:
            yield Prediction(path, error=str(error))
            continue
        with torch.no_grad():
            probabilities = trained.model(transform(picture).unsqueeze(0)).softmax(-1)[0]
        values, indices = probabilities.topk(min(top_k, len(trained.class_names)))
        names = (trained.class_names[index] for index in indices.tolist())
        yield Prediction(path, tuple(zip(names, values.tolist(), strict=True)))
