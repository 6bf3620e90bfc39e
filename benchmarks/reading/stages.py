"""What an image costs on its way from a file to a cached feature, stage by stage, in CPU milliseconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

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
from backbone_finetune.recipes.features.frozen_pass import FrozenPass, autocast_dtype, front_of_backbone
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
    name: str, batches: int = 8, batch_size: int = 32, compiler: Compile = compile_openvino
) -> tuple[float, float, float] | None:
    """Return the CPU time per image of the pass, compiled by OpenVINO and not, and the seconds that compiling takes.

    It is compiled once: compiling varies by more seconds than the batches take. These take turns; medians.
    """
    try:
        compiler(torch.nn.Identity())
    except ModuleNotFoundError:
        return None
    model = FineTuneModel.from_timm(timm.create_model(name), num_classes=10).freeze_backbone().eval()
    size = resolve_model_data_config(model)["input_size"]  # type: ignore[no-untyped-call]
    batch = [torch.randn(batch_size, *size), torch.zeros(batch_size)]
    cpu = torch.device("cpu")
    dtype = autocast_dtype(model.backbone, cpu)
    eager, compiled = (FrozenPass(front_of_backbone(model), cpu, dtype, compile=each) for each in (None, compiler))
    eager(batch)
    first = cpu_milliseconds(lambda: compiled(batch), batch_size)
    taken = [
        [cpu_milliseconds(lambda run=run: run(batch), batch_size) for run in (compiled, eager)]  # type: ignore[misc]
        for _ in range(batches)
    ]
    of_compiled, of_eager = (statistics.median(each) for each in zip(*taken, strict=True))
    # The first batch also runs as it is, to compare the features.
    return of_compiled, of_eager, (first - of_compiled - of_eager) * batch_size / 1e3
