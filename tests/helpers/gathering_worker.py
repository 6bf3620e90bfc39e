"""What torchrun starts for test_shared_features.py: python gathering_worker.py FOLDER, on two processes.

Each process writes what it found, as FOLDER/told-0.json and told-1.json: how its memory grew while features were
gathered, whether they are what the backbone computes, and what became of errors that only one of the processes met.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from caching.size import watching_memory
from torch import Tensor, nn
from torch.utils.data import Dataset

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import FeatureCache, make_accelerator
from backbone_finetune.recipes.data.loading import DeviceLoader
from backbone_finetune.recipes.features.frozen_pass import FrozenPass, front_of_backbone
from backbone_finetune.recipes.features.rows import compute_rows

WIDTH = 1 << 14
COUNT = 1025  # of 64 KiB each: 64 MiB, and no even shares


class Drawn(Dataset[tuple[Tensor, int]]):
    """Images that are created when they are read; with `broken`, one of them raises."""

    def __init__(self, count: int = COUNT, broken: int | None = None, error: type[Exception] = ValueError) -> None:
        self.count, self.broken, self.error = count, broken, error

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == self.broken:
            raise self.error(f"image {index} is broken")
        return torch.tensor([float(index), 1.0]), index


class Widened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("row", torch.arange(float(WIDTH)))

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :1] + self.row


def is_whole(features: Tensor, targets: Tensor) -> bool:
    """Compare small pieces, which need little memory."""
    expected = torch.arange(len(targets))
    return torch.equal(targets, expected) and all(
        torch.equal(features[:, column], expected + float(column)) for column in (0, 1, WIDTH - 1)
    )


def main(folder: str) -> None:
    accelerator = make_accelerator(torch.device("cpu"))
    index = accelerator.process_index
    model = FineTuneModel(Widened(), nn.Linear(WIDTH, 2))
    seen: list[int] = []
    model.backbone.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    told: dict[str, Any] = {}

    def gather(name: str, data: Any, where: Path | None, share: float = 0.0) -> None:
        cache = None if where is None else FeatureCache(where, "images", memory_share=share)
        seen.clear()
        with watching_memory() as peak:
            dataset = compute_rows(
                FrozenPass(front_of_backbone(model), accelerator.device, None),
                DeviceLoader(data, accelerator.device, batch_size=4),
                cache=cache,
                memory_share=share if cache else 0.25,
                accelerator=accelerator,
            )
        told[name] = {"grown": peak[0] / 2**20, "seen": sum(seen), "count": len(dataset)}
        told[name]["whole"] = is_whole(*dataset.tensors)

    def fail(name: str, gathering: Callable[[], None]) -> None:
        try:
            gathering()
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"

    # The first call loads modules that later calls use.
    gather("few", Drawn(33), Path(folder, "few"))
    gather("built", Drawn(), Path(folder, "all"))
    gather("kept", Drawn(), Path(folder, "all"))
    gather("apart", Drawn(99), Path(folder, f"of machine {index}"))
    gather("in memory", Drawn(), None)
    fail("broken", lambda: gather("", Drawn(broken=501), Path(folder, "broken")))
    fail("broken in memory", lambda: gather("", Drawn(broken=501), None))
    fail("of another kind", lambda: gather("", Drawn(broken=500, error=KeyError), Path(folder, "broken")))
    for process, name in enumerate(("main full", "other full")):
        with full_disk(index == process):
            gather(name, Drawn(33), Path(folder, "broken"))
    gather("afterwards", Drawn(33), Path(folder, "few"))
    Path(folder, f"told-{index}.json").write_text(json.dumps(told))
    accelerator.end_training()


@contextmanager
def full_disk(fails: bool) -> Any:
    """Fail on one process when it writes its rows, like a full disk."""
    sync = os.fsync

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "the disk is full")

    os.fsync = fail if fails else sync  # type: ignore[assignment]
    yield
    os.fsync = sync


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
