"""The networks whose frontiers are examined: each family of timm, and those of other libraries."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from backbone_finetune import FineTuneModel, LayerGroup
from zoo.frontier_cases import CLASSES

# The module whose children are the blocks, None where the groups that are found will do; and the side of the images.
TORCHVISION = {
    "resnet18": (None, 64),
    "efficientnet_b0": ("features", 64),
    "densenet121": ("features", 64),
    "regnet_y_400mf": ("trunk_output", 64),
    "mobilenet_v3_small": ("features", 64),
    "convnext_tiny": ("features", 64),
    "swin_t": ("features", 64),
    "vit_b_16": ("encoder.layers", 224),
    "googlenet": (None, 64),
    "inception_v3": (None, 96),
}
TRANSFORMERS = {"ViT": 64, "Dinov2": 64, "ConvNextV2": 64, "Swin": 224}  # Swin takes whole windows alone
TRANSFORMERS_BLOCKS = ("layers", "encoder.layer", "encoder.layers", "encoder.stages")
OPEN_CLIP = {"ViT-B-32": ("transformer.resblocks", 224), "RN50": (None, 64)}


class Subject(NamedTuple):
    """A network, the side of the images it takes here, and how it is built."""

    family: str
    name: str
    side: int
    build: Callable[[], FineTuneModel]


def subjects() -> Iterator[Subject]:
    """Yield the smallest network of each timm family below 50 M parameters, then the other libraries' networks."""
    for name, family in _families().SMALL.items():
        build = partial(FineTuneModel.from_timm, family.architecture, num_classes=CLASSES, **family.keywords)
        yield Subject(name, family.architecture, family.side, build)
    if importlib.util.find_spec("torchvision"):
        for name, (blocks, side) in TORCHVISION.items():
            yield Subject("torchvision", name, side, partial(_torchvision, name, blocks))
    if importlib.util.find_spec("transformers"):
        for name, side in TRANSFORMERS.items():
            yield Subject("transformers", name, side, partial(_transformers, name))
    if importlib.util.find_spec("open_clip"):
        for name, (blocks, side) in OPEN_CLIP.items():
            yield Subject("open_clip", name, side, partial(_open_clip, name, blocks))


def _families() -> ModuleType:
    """The table of families is the tests' own."""
    path = Path(__file__).parents[2] / "tests" / "helpers" / "timm_families.py"
    spec = importlib.util.spec_from_file_location("timm_families", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["timm_families"] = module
    spec.loader.exec_module(module)
    return module


def _torchvision(name: str, blocks: str | None) -> FineTuneModel:
    import torchvision  # noqa: PLC0415

    keywords = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    network = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **keywords)
    heads = [module for module in network.modules() if isinstance(module, nn.Linear)]
    return FineTuneModel.from_module(network, heads[-1], layer_groups=_groups(network, blocks, but=heads[-1]))


class PooledFeatures(nn.Module):
    """A transformers backbone that takes images and gives what its own head takes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        output: Any = self.network(pixel_values=images)
        pooled: Tensor = output.last_hidden_state[:, 0] if output.pooler_output is None else output.pooler_output
        return pooled


def _transformers(name: str) -> FineTuneModel:
    import transformers  # noqa: PLC0415

    small = {"ViT": {"image_size": 64, "num_hidden_layers": 6}, "Dinov2": {"image_size": 64, "patch_size": 16}}
    config = getattr(transformers, f"{name}Config")(**small.get(name, {}))
    network = getattr(transformers, f"{name}Model")(config)
    width = config.hidden_size if hasattr(config, "hidden_size") else config.hidden_sizes[-1]
    backbone = PooledFeatures(network)
    paths = {path for path, _ in network.named_modules()}
    blocks = next(f"network.{path}" for path in TRANSFORMERS_BLOCKS if path in paths)
    return FineTuneModel(backbone, nn.Linear(width, CLASSES), layer_groups=_groups(backbone, blocks))


def _open_clip(name: str, blocks: str | None) -> FineTuneModel:
    import open_clip  # noqa: PLC0415

    keywords = {"force_image_size": 64} if name == "RN50" else {}
    network = open_clip.create_model(name, pretrained=None, **keywords).visual
    width = getattr(network, "output_dim", None) or 512
    return FineTuneModel(network, nn.Linear(width, CLASSES), layer_groups=_groups(network, blocks))


def _groups(network: nn.Module, blocks: str | None, but: nn.Module | None = None) -> list[LayerGroup] | None:
    """A stem, and a group for each child of `blocks` that has parameters; what follows goes with the last of them."""
    if blocks is None:
        return None
    left_out = {id(parameter) for parameter in but.parameters()} if but is not None else set()
    groups: dict[str, list[str]] = {}
    current = "stem"
    for name, parameter in network.named_parameters():
        if id(parameter) not in left_out:
            if name.startswith(f"{blocks}."):
                current = f"{blocks}.{name[len(blocks) + 1 :].partition('.')[0]}"
            groups.setdefault(current, []).append(name)
    return [LayerGroup(name, tuple(names)) for name, names in groups.items()]
