"""The limit: read, transform and run each image once, with Pillow, timm and torch alone.

python benchmarks/reading/one_pass.py FOLDER MODEL
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform


def run_once(folder: Path, name: str, batch_size: int = 32) -> list[torch.Tensor]:
    """Return the features of all images, in bf16 and channels last as the library computes them."""
    network = timm.create_model(name, num_classes=0).eval()
    transform = create_transform(**resolve_model_data_config(network), is_training=False)  # type: ignore[no-untyped-call]
    paths = sorted(folder.rglob("*.jpg"))
    narrow = torch.cpu._is_avx512_bf16_supported()
    features = []
    for start in range(0, len(paths), batch_size):
        images = [transform(Image.open(path).convert("RGB")) for path in paths[start : start + batch_size]]
        batch = torch.stack(images).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            features.append(network(batch).float())
    return features


if __name__ == "__main__":
    run_once(Path(sys.argv[1]), sys.argv[2])
