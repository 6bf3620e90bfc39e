"""Rebuild the packaged clipart from its ``manifest.csv`` and the Debian package ``openclipart-png``; needs Pillow only.

Run it as ``python benchmarks/project/rebuild_clipart.py [--source DIR] [--output DIR]``.
"""

import argparse
import csv
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageChops

CLIPART = Path(__file__).resolve().parents[2] / "src" / "backbone_finetune" / "recipes" / "data" / "clipart"
MANIFEST = CLIPART / "manifest.csv"
OUTPUT = MANIFEST.with_name("pictures")
SOURCE = Path("/usr/share/openclipart/png")
SIDE = 64
JPEG_QUALITY = 85
# The package holds pictures of up to 168 megapixels, which take gigabytes to decode and end as 64x64 all the same.
LARGEST_SOURCE = 30_000_000


class Entry(NamedTuple):
    """One row of the manifest: ``class_name/file_name`` is made from ``source``, a path inside the package's folder."""

    class_name: str
    file_name: str
    source: str


def read_manifest(path: Path) -> list[Entry]:
    """Read the chosen pictures, in the order of the file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Entry(row["class"], row["file"], row["source"]) for row in csv.DictReader(file)]


def read_source(path: Path) -> Image.Image:
    """Decode one picture of the package with its transparency, unless its header says that it is too large."""
    with Image.open(path) as file:
        if file.width * file.height > LARGEST_SOURCE:
            raise ValueError(f"{file.width}x{file.height} pixels, allowed are {LARGEST_SOURCE:,} in all")
        # Pillow's __enter__ has no type.
        picture: Image.Image = file.convert("RGBA")
        return picture


def compose(source: Image.Image) -> Image.Image:
    """Put a picture on white, crop it to what is drawn, pad it to a square and shrink it.

    >>> compose(Image.new("RGBA", (300, 100), "red")).getpixel((32, 0))
    (255, 255, 255)
    """
    flat = Image.alpha_composite(Image.new("RGBA", source.size, "white"), source).convert("RGB")
    box = ImageChops.difference(flat, Image.new("RGB", flat.size, "white")).getbbox()
    if box is None:
        raise ValueError("it shows nothing on white")
    drawn = flat.crop(box)
    side = max(drawn.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def check_replaceable(output: Path, entries: list[Entry]) -> None:
    """Refuse an output whose replacement would delete anything but pictures of an earlier run."""
    class_names = {entry.class_name for entry in entries}
    for path in output.rglob("*"):
        parts = path.relative_to(output).parts
        if parts[0] not in class_names or len(parts) > 2 or (path.is_file() and path.suffix != ".jpg"):
            raise ValueError(f"{output} is replaced as a whole, but holds {path}; remove it or give another --output")


def rebuild(manifest: Path, source: Path, output: Path) -> int:
    """Write every picture of the manifest and count them; an existing output stays until all of them are written."""
    entries = read_manifest(manifest)
    check_replaceable(output, entries)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that the moves stay on one file system.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        written = Path(temporary, "new")
        for entry in entries:
            path = source / entry.source
            if not path.is_file():
                raise FileNotFoundError(f"{path}: not there; install openclipart-png or give --source its png folder")
            try:
                picture = compose(read_source(path))
            # Pillow's own words for damage and for more than 89 megapixels name no file.
            except (
                OSError,
                SyntaxError,
                ValueError,
                Image.DecompressionBombError,
                Image.DecompressionBombWarning,
            ) as error:
                raise ValueError(f"{path}: {error}; repair it, or remove it from {manifest}") from error
            target = written / entry.class_name / entry.file_name
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target, "JPEG", quality=JPEG_QUALITY)
        if output.exists():
            output.rename(Path(temporary, "old"))
        written.rename(output)
    return len(entries)


def main() -> None:
    """Read the command line and rebuild."""
    parser = argparse.ArgumentParser(description="Rebuild the clip-art pictures from the Debian package.")
    parser.add_argument("--source", type=Path, default=SOURCE, help="the package's png folder (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        count = rebuild(MANIFEST, arguments.source, arguments.output)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"rebuild_clipart.py: {error}")
    print(f"wrote {count} pictures to {arguments.output}")


if __name__ == "__main__":
    main()
