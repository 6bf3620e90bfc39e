"""The parts of a first run on a card, in order: what each one runs, and for how long at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One command, as Python's arguments from the top of the repository; its files go into a folder of its own.

    `result` is the file that it writes there; a part with one ends with 1 where it missed a target or refused a row,
    which is a result and no failure.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    result: str | None = None


def list_parts(*, on_cuda: bool, folder: str) -> list[Part]:
    """List the parts: at full size for a card; else small, on a CPU, to see that all of it runs.

    `folder` is where each part gets its own, as seen from the top of the repository.
    """

    def benchmark(name: str, script: str, minutes: float, full: Sequence[str], small: Sequence[str]) -> Part:
        sizes = ["--device", "cuda", *full] if on_cuda else ["--device", "cpu", "--threads", "1", *_SMALL, *small]
        command = (f"benchmarks/{script}.py", *sizes, "--output", f"{folder}/{name}")
        return Part(name, command, minutes, f"{script}.json")

    one_model = ["--models", "test_resnet"]
    narrow = ["--amp", "bf16", "--channels-last"]
    train = ["-m", "backbone_finetune.cli", "train", "--device", "cuda" if on_cuda else "cpu"]
    train += ["--output", f"{folder}/train", *([] if on_cuda else ["--model", "test_resnet", "--epochs", "1"])]
    return [
        Part("tests", ("-m", "pytest", "-m", "cuda", "-ra", "-W", "default"), 8),
        Part("train", tuple(train), 3),
        benchmark("backward_float32", "backward_time", 6, ["--models", "resnet50", "--repeats", "20"], one_model),
        benchmark(
            "backward_bf16",
            "backward_time",
            8,
            ["--models", "resnet50", "vit_small_patch16_224", *narrow, "--batch-size", "256", "--repeats", "20"],
            [*one_model, *narrow],
        ),
        benchmark("targets", "targets", 8, ["--repeats", "12"], one_model),
        benchmark("peers", "peers", 6, [*narrow, "--repeats", "12"], [*one_model, *narrow]),
        benchmark("wrapper_overhead", "wrapper_overhead", 4, ["--repeats", "12"], [*one_model, "--ladder"]),
        benchmark(
            "feature_cache",
            "feature_cache",
            8,
            ["--pictures", "2048", "--repeats", "3", "--seeds", "0"],
            ["--model", "test_resnet", "--pictures", "8", "--features", "16", "--epochs", "2", "--seeds", "0"],
        ),
        benchmark("frontier", "frontier", 6, ["--repeats", "12"], [*one_model, "--batch-size", "4", "--images", "20"]),
    ]


_SMALL = ["--image-size", "32", "--batch-size", "2", "--repeats", "2"]
