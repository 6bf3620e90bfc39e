"""What cached features depend on, as digests: the backbone that computed them, and the images it was shown."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from os.path import relpath
from pathlib import Path
from typing import Any

import PIL
from timm.data import transforms as timm_transforms
from torch import Tensor, nn
from torchvision import transforms  # it comes with timm

from backbone_finetune import __version__
from backbone_finetune.eval_caches import clear_caches

from ..features.object_description import Describer, UndescribableError
from ..files import digest_file
from .images import ImageDataset

__all__ = ["backbone_fingerprint", "data_fingerprint", "is_deterministic"]

# Each gives the same tensor for the same image, and is fully described by its public attributes. A subclass may
# do anything, so only these very types count.
DETERMINISTIC: frozenset[type] = frozenset(
    {
        transforms.CenterCrop,
        transforms.ConvertImageDtype,
        transforms.Grayscale,
        transforms.Normalize,
        transforms.PILToTensor,
        transforms.Pad,
        transforms.Resize,
        transforms.ToTensor,
        timm_transforms.CenterCropOrPad,
        timm_transforms.MaybePILToTensor,
        timm_transforms.MaybeToTensor,
        timm_transforms.ToNumpy,
        timm_transforms.ToTensor,
        timm_transforms.TrimBorder,
    }
)


def is_deterministic(transform: Any) -> bool:
    """Say whether a transform of torchvision or timm is known to give the same tensor for the same image each time.

    >>> from timm.data import create_transform
    >>> is_deterministic(create_transform(64)), is_deterministic(create_transform(64, is_training=True))
    (True, False)

    One that is not known, a function or a class of your own, counts as random.
    """
    if type(transform) is transforms.Compose:
        return all(is_deterministic(part) for part in transform.transforms)
    if type(transform) is timm_transforms.ResizeKeepRatio:
        draws = (transform.random_scale_prob, transform.random_aspect_prob)
        return not any(draws) and not isinstance(transform.interpolation, tuple | list)
    return type(transform) in DETERMINISTIC


def data_fingerprint(dataset: ImageDataset) -> str:
    """Digest what a dataset shows a backbone: the content, order and targets of its images, and its transform.

    Contents are read, not sizes and times: these can stay the same when an image changes, and change when a folder
    is copied. Reading costs a small part of what decoding and a backbone cost. Where the folder is does not count.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from timm.data import create_transform
    >>> from backbone_finetune.recipes.data.images import LabelledFolder
    >>> with TemporaryDirectory() as folder:
    ...     image = Path(folder, "1.png")
    ...     PIL.Image.new("RGB", (4, 4)).save(image)
    ...     dataset = ImageDataset(LabelledFolder(Path(folder), ("a", "b"), (image,), (0,)), create_transform(8))
    ...     before = data_fingerprint(dataset)
    ...     PIL.Image.new("RGB", (4, 4), "red").save(image)
    ...     data_fingerprint(dataset) == before
    False

    Raises:
        OSError: an image can't be read.
        ValueError: the transform is random, or not known not to be.
    """
    if not is_deterministic(dataset.transform):
        raise ValueError(
            f"{dataset.transform!r}: not known to give the same tensor for the same image each time; use timm's "
            "evaluation transform, or pass a fingerprint of your own to FeatureCache"
        )
    folder = dataset.folder
    with ThreadPoolExecutor() as threads:
        contents = list(threads.map(_digest_image, folder.paths))
    paths = [relpath(path, folder.root) for path in folder.paths]
    images = list(zip(paths, folder.targets, contents, strict=True))
    # What reads and transforms the images, beyond the transform's own arguments.
    versions = {"backbone-finetune": __version__, "pillow": PIL.__version__, "torchvision": version("torchvision")}
    return digest_text([images, describe_transform(dataset.transform), versions])


def _digest_image(path: Path) -> str:
    """Digest a file; a pipe or a link to nothing, which would block or fail, is an image that a pass skips."""
    return digest_file(path) if path.is_file() else "no file"


def describe_transform(transform: Any) -> Any:
    """Write down a deterministic transform in full: a ``repr`` shortens tensors, and leaves arguments out.

    >>> describe_transform(transforms.CenterCrop(8))
    ['torchvision.transforms.transforms.CenterCrop', {'size': '(8, 8)'}]
    """
    if type(transform) is transforms.Compose:
        return [describe_transform(part) for part in transform.transforms]
    arguments = {
        name: repr(value.tolist() if isinstance(value, Tensor) else value)
        for name, value in vars(transform).items()
        if not name.startswith("_") and name != "training"
    }
    return [f"{type(transform).__module__}.{type(transform).__qualname__}", arguments]


def backbone_fingerprint(backbone: nn.Module) -> str:
    """Digest a backbone: its parameters and buffers to the bit, and what its modules are and do.

    >>> backbone_fingerprint(nn.AvgPool2d(2)) == backbone_fingerprint(nn.AvgPool2d(2))
    True
    >>> backbone_fingerprint(nn.AvgPool2d(2)) == backbone_fingerprint(nn.AvgPool2d(2, stride=1))
    False

    Of each module all attributes count, and its class with those that it inherits: the code of methods (a `forward`
    that was edited is another one), properties and the like, their default arguments and what they close over, and
    class attributes. An object counts by its class and what pickle would keep of it. Not seen are hooks, global names
    that a method looks up (functions that it calls, constants of its file), and, for which versions stand, what is
    torch's, NumPy's and Python's own and no module.

    Raises:
        UndescribableError: it holds an object that can't be compared with one in another process; the message names it.
    """
    clear_caches(backbone)  # as levit's in eval: worked out from what counts already
    try:
        described = Describer().describe(backbone)
    except RecursionError as error:
        raise UndescribableError("the backbone holds objects too deep within others") from error
    return digest_text(described)


def digest_text(value: object) -> str:
    """Digest anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
