"""A folder with a sub-folder per class: find its images, hold some out for the test, read them."""

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ..text import has_control_characters

__all__ = ["ImageDataset", "LabelledFolder", "find_images", "list_images", "read_image", "split"]

# All that Pillow reads by itself: not EPS, which runs Ghostscript, nor formats that are a name and no decoder.
NO_DECODER = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
IMAGE_EXTENSIONS = frozenset(
    extension
    for extension, name in Image.registered_extensions().items()
    if name in Image.OPEN and name not in NO_DECODER
)
EXAMPLES = ".jpg, .png, .webp and all that Pillow reads"

# The target of an image that cannot be read: it keeps its place, without weight. torch's losses ignore it by default.
IGNORED = -100

# Resized by its shorter side, a line of 1 x 100,000 pixels would become an image of many gigabytes.
MOST_ELONGATED = 100


@dataclass(frozen=True)
class LabelledFolder:
    """Images and their classes: ``paths[i]`` shows ``class_names[targets[i]]``.

    >>> LabelledFolder(Path("animals"), ("cat", "dog"), (Path("animals/dog/1.jpg"),), (1,)).targets
    (1,)
    """

    root: Path
    class_names: tuple[str, ...]
    paths: tuple[Path, ...]
    targets: tuple[int, ...]


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images as ``(tensor, target)`` pairs, read from disk each time.

    An image that cannot be read raises. Passes of the recipes skip it instead: ``broken`` has a message for each that
    they met, by its path.

    >>> folder = LabelledFolder(Path("animals"), ("cat", "dog"), (Path("animals/dog/1.jpg"),), (1,))
    >>> len(ImageDataset(folder, transform=lambda image: torch.zeros(3, 8, 8)))
    1
    """

    def __init__(self, folder: LabelledFolder, transform: Callable[[Image.Image], Tensor]) -> None:
        self.folder = folder
        self.transform = transform
        self.broken: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.folder.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(read_image(self.folder.paths[index])), self.folder.targets[index]

    def skip_ignored(self, targets: Tensor) -> None:
        """Remember the images that have the target ``IGNORED``, in the targets that a pass over all of them gave."""
        for index in (targets == IGNORED).nonzero().flatten().tolist():
            path = self.folder.paths[index]
            if str(path) not in self.broken:
                self.broken[str(path)] = f"{path}: could not be read before"
                try:
                    read_image(path)
                except (ValueError, OSError) as error:
                    self.broken[str(path)] = str(error)

    def check_classes(self) -> None:
        """Raise ValueError unless each class still has an image that can be read."""
        faults: dict[int, str] = {}
        readable: set[int] = set()
        for path, target in zip(self.folder.paths, self.folder.targets, strict=True):
            if str(path) in self.broken:
                faults.setdefault(target, self.broken[str(path)])
            else:
                readable.add(target)
        if lost := sorted(faults.keys() - readable):
            raise ValueError(
                f"class folder {self.folder.root / self.folder.class_names[lost[0]]} needs at least 2 readable images, "
                f"one to train, one to test, and lacks one of these; the first that is broken is {faults[lost[0]]}"
            )


def read_image(path: Path) -> Image.Image:
    """Read an image as RGB: upright as its EXIF entry says, and on white where it is transparent.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image, or not a whole one; the message names it.
    """
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path}: a link that leads nowhere")
    if path.exists() and not path.is_file():  # a pipe would be waited for without end
        raise ValueError(f"{path}: not a readable image (it is no file)")
    try:
        with warnings.catch_warnings():
            # What Pillow remarks on damaged metadata of an image that it reads all the same is of no use here.
            warnings.simplefilter("ignore")
            # Pillow warns of a decompression bomb first and refuses it at twice the size; here the warning is enough.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                if max(file.size) > MOST_ELONGATED * min(file.size):
                    raise ValueError(f"{file.width} x {file.height} pixels; at most 1 to {MOST_ELONGATED} is allowed")
                image = ImageOps.exif_transpose(file)
                if image.mode.startswith("I;16"):  # converted as it is, all above 255 of 65,535 would be white
                    # By way of 32 bits, as Pillow computes on 16 in the one order of bytes only.
                    image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
                if image.mode in {"I", "F"}:
                    raise ValueError("its 32-bit values have no known range; save it with 8 or 16 bits")
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except MemoryError:
        raise ValueError(f"{path}: takes more memory than there is") from None
    except Exception as error:  # what Pillow says of a damaged file can be anything, struct.error and KeyError included
        reason = str(error).replace(f" {str(path)!r}", "")  # Pillow repeats the path in some of its messages
        raise ValueError(f"{path}: not a readable image ({reason})") from error


def find_images(root: Path) -> LabelledFolder:
    """List the images of a folder with a sub-folder per class, in an order that does not depend on the file system.

    Only names are looked at. A class is a direct sub-folder; images in deeper folders belong to it as well.
    Hidden files and folders are passed over.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.png"):
    ...         Path(folder, name).parent.mkdir(exist_ok=True)
    ...         Path(folder, name).touch()
    ...     images = find_images(Path(folder))
    >>> images.class_names, images.targets
    (('cat', 'dog'), (0, 0, 1))

    Raises:
        FileNotFoundError: there is no such folder.
        NotADirectoryError: it is a file.
        ValueError: it has fewer than two class folders, or one of them holds no image or has a name that no terminal
            should be given.
    """
    expected = "expected a folder with a sub-folder of images per class"
    if not root.exists():
        raise FileNotFoundError(f"{root}: there is no such folder; {expected}")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; {expected}")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if named := [path for path in folders if has_control_characters(path.name)]:
        raise ValueError(f"class folder {str(named[0])!r} has control characters in its name; rename it")
    if not folders:
        raise ValueError(f"{root} has no sub-folders; {expected}")
    if len(folders) == 1:
        raise ValueError(f"{root} has one class only ({folders[0].name}); {expected}, two classes or more")
    found = [images_below(folder) for folder in folders]
    if empty := [folder for folder, paths in zip(folders, found, strict=True) if not paths]:
        raise ValueError(f"class folder {empty[0]} holds no image ({EXAMPLES}); add images to it, or remove it")
    targets = tuple(target for target, paths in enumerate(found) for _ in paths)
    return LabelledFolder(root, tuple(folder.name for folder in folders), tuple(chain(*found)), targets)


def images_below(folder: Path) -> list[Path]:
    """List the images in a folder and in those below it, sorted; hidden files and folders are passed over.

    Names count: a link that leads nowhere, or a pipe, is in the list, so that whoever reads it names it.
    """
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_EXTENSIONS
        and not path.is_dir()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def list_images(given: Sequence[Path]) -> list[Path]:
    """Replace each folder among paths by the images below it, one at least; any other path stays, whatever it is."""
    paths: list[Path] = []
    for path in given:
        found = images_below(path) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path}: a folder without images ({EXAMPLES})")
        paths += found
    return paths


def split(folder: LabelledFolder, *, test_share: float, seed: int) -> tuple[LabelledFolder, LabelledFolder]:
    """Hold out a share of each class, drawn by ``seed``: returns ``(train, test)``, disjoint and together everything.

    Each class has at least one image on both sides. The draw depends on the order of the images alone, so the
    same folder gives the same split on every machine. A class of one image is a ValueError.
    """
    generator = random.Random(seed)
    held_out: set[int] = set()
    for target, name in enumerate(folder.class_names):
        members = [index for index, other in enumerate(folder.targets) if other == target]
        if len(members) == 1:
            raise ValueError(
                f"class folder {folder.root / name} holds 1 image, and needs at least 2: one to train, one to test"
            )
        count = min(max(round(test_share * len(members)), 1), len(members) - 1)
        held_out.update(generator.sample(members, count))

    def select(indices: Sequence[int]) -> LabelledFolder:
        paths, targets = tuple(folder.paths[i] for i in indices), tuple(folder.targets[i] for i in indices)
        return replace(folder, paths=paths, targets=targets)

    return select([i for i in range(len(folder.paths)) if i not in held_out]), select(sorted(held_out))
