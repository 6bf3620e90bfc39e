"""What an image costs on its way from a file to a cached feature, stage by stage, in CPU milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader, TensorDataset

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import FeatureCache, extract_features
from backbone_finetune.recipes.data.images import read_image
from backbone_finetune.recipes.data.transforms import split_transform
from backbone_finetune.recipes.features.compiled import Compile, compile_openvino
from backbone_finetune.recipes.files import digest_file


def cpu_milliseconds(work: Callable[[], object], images: int) -> float:
    """Return the CPU time of some work, per image."""
    start = time.process_time()
    work()
    return (time.process_time() - start) * 1e3 / images


def time_stages(paths: list[Path], name: str) -> dict[str, float]:
    """Take each stage by itself over a batch of images."""
    model = FineTuneModel.from_timm(timm.create_model(name), num_classes=10).freeze_backbone().eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)  # type: ignore[no-untyped-call]
    to_bytes, normalize = split_transform(transform)
    assert normalize is not None
    count = len(paths)
    decoded = [read_image(path) for path in paths]
    loaded = torch.stack([to_bytes(image) for image in decoded])
    inputs = normalize(loaded)
    targets = torch.zeros(count, dtype=torch.long)
    tensors = DataLoader(TensorDataset(inputs, targets), batch_size=count)
    taken = {
        "digest of the file, for the cache's key": cpu_milliseconds(lambda: list(map(digest_file, paths)), count),
        "read and decode": cpu_milliseconds(lambda: list(map(read_image, paths)), count),
        "resize and crop, to bytes": cpu_milliseconds(lambda: list(map(to_bytes, decoded)), count),
        "normalise": cpu_milliseconds(lambda: normalize(loaded), count),
        "timm's transform, for comparison": cpu_milliseconds(lambda: list(map(transform, decoded)), count),
        "backbone": cpu_milliseconds(lambda: extract_features(model, tensors), count),
    }
    with TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder, "features"), "stages")
        cached = cpu_milliseconds(lambda: extract_features(model, tensors, cache=cache), count)
    taken["backbone, and the features to the cache"] = cached
    return taken


def time_openvino(
    name: str, batches: int = 4, batch_size: int = 32, compiler: Compile = compile_openvino
) -> tuple[float, float, float] | None:
    """Return the CPU time per image of the pass, compiled by OpenVINO and not, and the seconds that compiling takes."""
    try:
        compiler(torch.nn.Identity())
    except ModuleNotFoundError:
        return None
    model = FineTuneModel.from_timm(timm.create_model(name), num_classes=10).freeze_backbone().eval()
    size = resolve_model_data_config(model)["input_size"]  # type: ignore[no-untyped-call]
    few, many = (
        DataLoader(TensorDataset(torch.randn(count * batch_size, *size), torch.zeros(count * batch_size)), batch_size)
        for count in (1, 1 + batches)
    )

    def time_pass(loader: DataLoader[Any], compile_with: Compile | None) -> float:
        return cpu_milliseconds(lambda: extract_features(model, loader, compile=compile_with), 1)

    time_pass(few, None)  # the first pass of a process
    once = [time_pass(few, compile_with) for compile_with in (None, compiler)]
    more = [time_pass(many, compile_with) for compile_with in (None, compiler)]
    eager, compiled = ((b - a) / (batches * batch_size) for a, b in zip(once, more, strict=True))
    return compiled, eager, (once[1] - batch_size * compiled) / 1e3
