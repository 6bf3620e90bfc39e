"""How large a cache of features is on disk, and how much memory its building takes.

Run by itself, as `python benchmarks/cache_size.py COUNT`, it builds one cache and prints what that took: each building
has a process of its own, as memory that one has used is there for the next.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
from harness.ratios import Target
from harness.timing import Interval
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import FeatureCache, extract_features

WIDTH = 3 * 64 * 64
FEW, MANY = 2_000, 10_000


class DrawnImages(Dataset[tuple[Tensor, int]]):
    """Random images that are drawn when they are asked for, so that they are never all in memory."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(index)), index % 10


def build(count: int, *, on_disk: bool) -> dict[str, int]:
    """Build the features of so many images: gives the bytes of the features, on disk, and of memory at the peak."""
    model = FineTuneModel(nn.Flatten(), nn.Linear(WIDTH, 10))
    with TemporaryDirectory() as folder:
        where = Path(folder, "features")
        cache = FeatureCache(where, str(count), memory_share=0.0) if on_disk else None
        with watching_memory() as peak:
            features = extract_features(
                model, DataLoader(DrawnImages(count), 32), device=torch.device("cpu"), cache=cache
            )
        files = sum(path.stat().st_size for path in where.iterdir()) if on_disk else 0
        return {"features": features.tensors[0].nbytes, "files": files, "memory": peak[0]}


@contextmanager
def watching_memory() -> Iterator[list[int]]:
    """Watch by how many bytes this process grows at most; the list holds the answer after the block."""
    process = psutil.Process()
    before = process.memory_info().rss
    peak = [0]
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        finished.set()
        watcher.join()
        peak[0] = max(peak[0], process.memory_info().rss - before)


def build_apart(count: int, *, on_disk: bool) -> dict[str, int]:
    """Build in a process of its own."""
    command = [sys.executable, "-m", "caching.size", str(count), *([] if on_disk else ["--in-memory"])]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    built: dict[str, int] = json.loads(answer.stdout)
    return built


def judge_size(model: str, count: int, features_bytes: int, folder_bytes: int) -> Target:
    """Compare a cache's files with the features in it."""
    ratio = folder_bytes / features_bytes
    remark = f"{folder_bytes:,} bytes for {count} images"
    return Target(model, "cache on disk / (N * D * bytes)", 1.01, Interval(ratio, ratio, ratio), remark=remark)


def judge_memory(few: int = FEW, many: int = MANY, build: Callable[..., dict[str, int]] = build_apart) -> Target:
    """Compare the peak of memory with few images and with many: how much of the further features is in it.

    The same is measured without a cache on disk, where the features are in memory: were that not seen, nothing was.
    """
    growth, peaks = {}, {}
    for on_disk in (True, False):
        small, large = build(few, on_disk=on_disk), build(many, on_disk=on_disk)
        growth[on_disk] = (large["memory"] - small["memory"]) / (large["features"] - small["features"])
        peaks[on_disk] = [f"{built['memory'] / 2**20:.0f} MiB" for built in (small, large)]
    return Target(
        "any",
        f"growth of peak memory while building / growth of the features, {few} to {many} images on disk",
        0.05,
        Interval(growth[True], growth[True], growth[True]),
        remark=f"{' and '.join(peaks[True])}; in memory, which must grow: {' and '.join(peaks[False])}",
    )


if __name__ == "__main__":
    print(json.dumps(build(int(sys.argv[1]), on_disk="--in-memory" not in sys.argv)))
