"""How much memory it takes to find a frontier and to record it into files.

Run by itself, as `python -m subjects.frontier_memory COUNT`, it builds one cache and prints what that took: each
building has a process of its own, as memory that one has used is there for the next.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from caching.size import watching_memory
from harness.ratios import Target
from harness.results import median
from harness.timing import interval_of_median

from backbone_finetune.frontier import Frontier, find_frontier
from subjects.frontier_steps import build_partly_frozen

MODEL, IMAGE_SIZE, BATCH_SIZE = "resnet18", 64, 8
REPEATS = 8  # the peak of a process moves by some 5 MiB
TRAINABLE_GROUPS = 3  # what is kept, after layer1, is larger than the images


def build(count: int, *, on_disk: bool) -> dict[str, int]:
    """Record so many images, drawn when they are needed: gives the bytes kept, and of memory at the peak."""
    network = build_partly_frozen(MODEL, TRAINABLE_GROUPS, BATCH_SIZE, IMAGE_SIZE, torch.device("cpu"))
    kept, in_memory = 0, []
    with TemporaryDirectory() as folder, ExitStack() as files, watching_memory() as peak:
        found = find_frontier(network.model, network.images)
        if not isinstance(found, Frontier):
            raise ValueError(f"{MODEL}: no frontier: {found.reason}")
        slots = [files.enter_context(Path(folder, f"slot-{slot}.bin").open("wb")) for slot in range(len(found.kept))]
        for _ in range(0, count, BATCH_SIZE):
            tensors = found.record(torch.randn_like(network.images))
            kept += sum(rows.nbytes for rows in tensors)
            if on_disk:
                for file, rows in zip(slots, tensors, strict=True):
                    file.write(rows.contiguous().numpy().data)
            else:
                in_memory.append(tensors)
    return {"kept": kept, "memory": peak[0]}


def build_apart(count: int, *, on_disk: bool) -> dict[str, int]:
    """Build in a process of its own."""
    command = [sys.executable, "-m", "subjects.frontier_memory", str(count), *([] if on_disk else ["--in-memory"])]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    built: dict[str, int] = json.loads(answer.stdout)
    return built


def judge_memory(few: int, many: int) -> Target:
    """Compare the peak of memory with few images and with many: how much of what is kept is in it.

    Many are also kept in memory: were that not seen, no growth was.
    """
    pairs = [(build_apart(few, on_disk=True), build_apart(many, on_disk=True)) for _ in range(REPEATS)]
    growth = [(large["memory"] - small["memory"]) / (large["kept"] - small["kept"]) for small, large in pairs]
    small, large = (median([built["memory"] for built in column]) for column in zip(*pairs, strict=True))
    peaks = [f"{peak / 2**20:.0f} MiB" for peak in (small, large, build_apart(many, on_disk=False)["memory"])]
    return Target(
        f"{MODEL} at {IMAGE_SIZE} pixels",
        f"growth of peak memory while building / growth of what is kept, {few} to {many} images on disk",
        0.05,
        interval_of_median(growth),
        remark=f"{peaks[0]} and {peaks[1]}; {many} in memory: {peaks[2]}",
    )


if __name__ == "__main__":
    print(json.dumps(build(int(sys.argv[1]), on_disk="--in-memory" not in sys.argv)))
