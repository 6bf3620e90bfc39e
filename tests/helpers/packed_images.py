"""The images of a folder of classes in tar files, as folders of classes or as webdataset writes them."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_tar(path: Path, files: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items() if isinstance(files, Mapping) else files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def read_files(root: Path, prefix: str = "") -> dict[str, bytes]:
    """Return the files below a folder, by the names that they have in a tar file."""
    return {f"{prefix}{path.relative_to(root)}": path.read_bytes() for path in sorted(root.rglob("*.*"))}


def sample(key: str, image: bytes, **cells: Any) -> dict[str, bytes]:
    """Return the files of a sample of webdataset; ``json`` is encoded."""
    texts = {name: json.dumps(cell) if name == "json" else str(cell) for name, cell in cells.items()}
    return {f"{key}.png": image, **{f"{key}.{name}": text.encode() for name, text in texts.items()}}
