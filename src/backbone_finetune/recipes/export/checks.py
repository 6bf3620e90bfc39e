"""Helpers of all exports: atomic writes, and the check that the logits are the model's."""

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from ..data.bands import Picture, from_array
from ..data.images import read_image
from ..models.file import TrainedModel, build_transform
from ..text import one_line

MOST_IMAGES = 16
# Relative to the largest logit. A runtime that sums in another order differs by 1e-6 to 1e-5.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Exported:
    """The result of an export, and the difference of its logits from the model's.

    ``difference`` and ``largest`` are absolute: of the logits, and the largest logit. ``images`` is 0 if none were
    given and noise was compared. ``use`` explains how to load it.
    """

    path: Path
    difference: float
    largest: float
    images: int
    use: str

    def describe(self) -> str:
        """Describe what was written, its difference from the model, and how to load it."""
        on = f"{self.images} of your images" if self.images else "noise (pass --images to compare on your own images)"
        return (
            f"wrote {self.path}\n"
            f"largest difference from the PyTorch logits: {self.difference:.2g} "
            f"(largest logit {self.largest:.2g}), on {on}\n"
            f"load it with {self.use}"
        )


class Comparison:
    """A trained model's logits on some images, to compare with what was exported.

    Args:
        trained: The model.
        images: Image files. Without any: two images of noise, a wide and a tall one.
    """

    def __init__(self, trained: TrainedModel, images: Sequence[Path]) -> None:
        # On the CPU, in float32, without training hooks.
        network = nn.Sequential(trained.model.backbone, trained.model.classifier)
        self.network = copy.deepcopy(network).float().cpu().eval()
        channels = trained.data_config["input_size"][0]
        chosen = images[:: -(-len(images) // MOST_IMAGES) or 1]
        self.pictures = [read_image(path, channels) for path in chosen] or _draw_noise(channels)
        self.images = len(self.pictures) if images else 0
        transform = build_transform(trained.data_config)
        self.inputs = torch.stack([transform(picture) for picture in self.pictures])

    @torch.no_grad()
    def prove(self, run: Callable[[Tensor], Tensor], path: Path, *, use: str, tolerance: float = TOLERANCE) -> Exported:
        """Compare the export with the model, on a batch and on a single input; ``run`` returns its logits.

        Raises:
            ValueError: they differ by more than ``tolerance``, relative to the largest logit.
        """
        batches = self.inputs, self.inputs[:1]
        difference = max(float((run(batch) - self.network(batch)).abs().max()) for batch in batches)
        largest = float(self.network(self.inputs).abs().max())
        if not difference <= tolerance * max(largest, 1e-3):
            raise ValueError(
                f"{path}: the exported model has different logits: off by {difference:.2g}, where the "
                f"largest is {largest:.2g}; nothing was written"
            )
        return Exported(path, difference, largest, self.images, use)


def _draw_noise(channels: int) -> list[Picture]:
    noise = torch.randint(256, (300, 400, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [from_array(noise.numpy()), from_array(noise.transpose(0, 1).contiguous().numpy())]


@contextmanager
def converting(converter: str) -> Iterator[None]:
    """Suppress a converter's warnings, and convert its errors to a ValueError of one line."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:
            raise ValueError(f"{converter} cannot convert this network ({one_line(error, most=300)})") from error


@contextmanager
def staging(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder; after the block, its files move to the folder of ``path``.

    Raises:
        FileExistsError: something of this name exists already.
        ValueError: the path has another suffix.
    """
    if suffix and path.suffix != suffix:
        raise ValueError(f"{path}: the file name must end in {suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        _check_free(path)
        yield Path(folder, path.name)
        moves = {written: path.with_name(written.name) for written in Path(folder).iterdir()}
        for target in moves.values():
            _check_free(target)
        (mode_of := Path(folder, ".mode")).touch()  # from the umask; safetensors' mode is 600
        for file in Path(folder).rglob("*"):
            if file.is_file():
                file.chmod(mode_of.stat().st_mode)
        for written, target in moves.items():
            os.replace(written, target)


def _check_free(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{path} exists already; remove it, or choose another name")
