"""Fingerprints of backbones: all that they compute with is seen, in every process alike, and nothing else."""

from __future__ import annotations

import enum
import functools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm_families
import torch
from torch import Tensor, nn

from backbone_finetune import FineTuneModel
from backbone_finetune.eval_caches import preserve_modes
from backbone_finetune.recipes import FeatureCache, extract_features
from backbone_finetune.recipes.data.fingerprint import backbone_fingerprint
from backbone_finetune.recipes.features.extract import open_cache
from backbone_finetune.recipes.features.object_description import Describer, UndescribableError

CPU = torch.device("cpu")
# With a recurrent layer's weak references, tables filled in a forward, partials, named tuples and configurations.
KINDS = [
    *("test_byobnet", "test_convnext", "test_efficientnet", "test_mambaout", "test_nfnet", "test_resnet", "test_vit"),
    *("test_vit_relpos", "mobilenetv3_small_050", "regnetx_002", "ghostnet_050", "repghostnet_050", "mobilevit_xxs"),
    *("edgenext_xx_small", "efficientvit_m0", "vit_tiny_patch16_dinov3_qkvb", "xcit_nano_12_p8_224", "lcnetv2_small"),
    *("efficientformerv2_s0", "levit_128s", "sequencer2d_s", "pvt_v2_b0", "starnet_s050", "pit_ti_224"),
]


class Base(nn.Module):
    def __init__(self, held: Any = None) -> None:
        super().__init__()
        self.held = held

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * 2


def make(**attributes: Any) -> nn.Module:
    """Build a module of a class of the same name each time, with these attributes in its class."""
    return type("Base", (Base,), {"__qualname__": "Base", "__module__": __name__, **attributes})()


def with_default(scale: float) -> nn.Module:
    def forward(self: Any, images: Tensor, scale: float = scale) -> Tensor:
        return images.flatten(1) * scale

    return make(forward=forward)


def with_keyword_default(scale: float) -> nn.Module:
    def forward(self: Any, images: Tensor, *, scale: float = scale) -> Tensor:
        return images.flatten(1) * scale

    return make(forward=forward)


def with_closure(scale: float) -> nn.Module:
    return make(forward=lambda self, images: images.flatten(1) * scale)


def with_class_attribute(scale: float) -> nn.Module:
    return make(scale=scale, forward=lambda self, images: images.flatten(1) * self.scale)


def with_method_of_kind(kind: Callable[..., Any]) -> Callable[[float], nn.Module]:
    def build(scale: float) -> nn.Module:
        if scale == 1.0:
            return make(scale=kind(lambda *_: 1.0))
        return make(scale=kind(lambda *_: 2.0))

    return build


def with_mixin(scale: float) -> nn.Module:
    mixin = type("Mixin", (), {"scale": scale, "__module__": __name__})
    return type("Base", (Base, mixin), {"__qualname__": "Base", "__module__": __name__})()


@dataclass
class Options:
    scale: float
    deeper: Any = None


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale


class Colour(enum.Enum):
    RED = 1.0
    BLUE = 2.0


def holding(build: Callable[[float], Any]) -> Callable[[float], nn.Module]:
    return lambda scale: Base(build(scale))


def using_one_of_two(scale: float) -> nn.Module:
    """Hold two objects, one of them in a list, and use the one or the other."""
    model = Base([torch.zeros(2)])
    model.other = torch.ones(2)
    model.used = model.held[0] if scale == 1.0 else model.other
    return model


def within_each_other(scale: float) -> Any:
    inner: list[Any] = []
    outer = [inner]
    inner.append(outer if scale == 1.0 else inner)
    return outer


def cyclic(scale: float) -> Any:
    entries: list[Any] = [scale]
    entries.append((entries, Options(scale, entries)))
    return entries


@pytest.mark.parametrize(
    "build",
    [
        with_default,
        with_keyword_default,
        with_closure,
        with_class_attribute,
        with_mixin,
        using_one_of_two,
        *(
            pytest.param(with_method_of_kind(kind), id=kind.__name__)
            for kind in (property, staticmethod, classmethod, functools.cached_property, functools.lru_cache)
        ),
        *(
            pytest.param(holding(held), id=name)
            for name, held in {
                "partial": lambda scale: functools.partial(torch.mul, scale),
                "partial keyword": lambda scale: functools.partial(torch.mul, other=scale),
                "dict": lambda scale: {"scale": [{"deeper": scale}]},
                "order of a dict": lambda scale: dict.fromkeys(("a", "b") if scale == 1.0 else ("b", "a")),
                "list of tensors": lambda scale: [torch.tensor(scale)],
                "dict of tensors": lambda scale: {1: (torch.tensor(scale),)},
                "slice": lambda scale: slice(int(scale), None),
                "NumPy scalar": numpy.float32,
                "NumPy array": lambda scale: numpy.full(3000, scale),
                "set": lambda scale: {scale, "a", "b"},
                "bytes": lambda scale: bytes([int(scale)]),
                "dtype": lambda scale: torch.float32 if scale == 1.0 else torch.bfloat16,
                "bound method": lambda scale: torch.tensor(scale).mul,
                "own bound method": lambda scale: Options(scale).__repr__,
                "module in a list": lambda scale: [nn.Dropout(scale / 2)],
                "object": Options,
                "nested object": lambda scale: Options(0.0, [Options(scale)]),
                "object with slots": Slotted,
                "enumeration": Colour,
                "cycle": cyclic,
                "cycle of lists": within_each_other,
                "pattern": lambda scale: re.compile(str(scale)),
                "builtin": lambda scale: abs if scale == 1.0 else divmod,
                "graph": lambda scale: torch.fx.symbolic_trace(with_closure(scale)),
            }.items()
        ),
    ],
)
def test_all_that_a_backbone_computes_with_is_seen(build: Callable[[float], nn.Module]) -> None:
    assert backbone_fingerprint(build(1.0)) == backbone_fingerprint(build(1.0))
    assert backbone_fingerprint(build(1.0)) != backbone_fingerprint(build(2.0))


def test_hooks_and_modes_and_where_weights_came_from_are_not_seen() -> None:
    model = timm_families.FAMILIES["resnet"].build()
    before = backbone_fingerprint(model)
    model.pretrained_cfg = {**model.pretrained_cfg, "file": "elsewhere.safetensors"}
    model.eval().register_forward_hook(lambda *_: None)
    assert backbone_fingerprint(model) == before
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.0, 0.0, 0.0)}
    assert backbone_fingerprint(model) != before


def test_a_compiled_function_is_what_it_compiles() -> None:
    def scaled(scale: float) -> nn.Module:
        return Base(torch.compile(lambda images: images * scale))

    assert backbone_fingerprint(scaled(1.0)) == backbone_fingerprint(scaled(1.0))
    assert backbone_fingerprint(scaled(1.0)) != backbone_fingerprint(scaled(2.0))


@pytest.mark.parametrize(
    "held", [threading.Lock(), [{"deep": threading.Lock()}], (entry for entry in ()), Options(1.0, threading.Lock())]
)
def test_what_cannot_be_compared_makes_features_be_computed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], held: Any
) -> None:
    model = FineTuneModel(Base(held), nn.Linear(3, 2))
    passes: list[None] = []
    model.backbone.register_forward_hook(lambda *_: passes.append(None))
    with pytest.raises(UndescribableError, match=r"^held\S* is a \w+, of which nothing can be said"):
        backbone_fingerprint(model.backbone)
    loader: Any = torch.utils.data.DataLoader([(torch.ones(3), 0)])
    for _ in range(2):
        extract_features(model, loader, device=CPU, cache=FeatureCache(tmp_path / "features", "data"))
    assert len(passes) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"features in {tmp_path / 'features'}: held") for line in lines)
    assert lines[1].endswith("; computing them again")


class Lazy(Base):
    @functools.cached_property
    def table(self) -> Tensor:
        return torch.ones(3)


class Cached:
    @functools.cached_property
    def table(self) -> Tensor:
        return torch.ones(3)


class Flags(enum.Flag):
    A = 1
    B = 2


def test_what_was_worked_out_since_is_not_seen() -> None:
    model = Lazy([Cached(), Flags.A])
    before = backbone_fingerprint(model)
    assert model.table is model.table
    assert model.held[0].table is model.held[0].table
    assert Flags.A | Flags.B
    assert backbone_fingerprint(model) == before


def test_a_forward_leaves_the_fingerprint_as_it_was() -> None:
    """Neither what is proved by then of a cut network, nor the attention biases that levit caches in eval, count."""
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    levit = timm_families.FAMILIES["levit"]
    for model, images in (
        (FineTuneModel.from_module(network, network[1]), torch.ones(2, 3)),
        (FineTuneModel.from_timm(levit.architecture, num_classes=2, **levit.keywords), levit.pictures()),
    ):
        before = backbone_fingerprint(model.backbone)
        with torch.no_grad():
            model.eval()(images)
        assert backbone_fingerprint(model.backbone) == before
        assert not model.backbone.training


def test_features_of_a_backbone_that_cannot_be_compared_are_never_those_of_another(tmp_path: Path) -> None:
    """A process that does not see the main one's folder must not take what stands in its own from an earlier run."""
    cache = FeatureCache(tmp_path / "features", "data")
    first, second = (open_cache(cache, Base(threading.Lock()), None, None)[1]["backbone"] for _ in range(2))
    assert first != second


def test_what_is_too_deep_cannot_be_compared() -> None:
    entries: list[Any] = []
    for _ in range(10_000):
        entries = [entries]
    with pytest.raises(UndescribableError, match="too deep"):
        backbone_fingerprint(Base(entries))


def test_a_set_of_objects_is_in_the_same_order_each_time() -> None:
    described = [json.dumps(Describer().describe({Slotted(float(each)) for each in order})) for order in ("123", "321")]
    assert described[0] == described[1]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return next(family for family in timm_families.FAMILIES.values() if family.architecture == name).build()


def fingerprints() -> dict[str, str]:
    return {name: backbone_fingerprint(build(name)) for name in KINDS}


def test_networks_of_timm_have_the_same_fingerprint_in_every_process() -> None:
    script = "import json, test_recipes_object_description as test; print(json.dumps(test.fingerprints()))"
    paths = [str(Path(__file__).parent), *sys.path]
    found = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", script],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": seed},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for seed in ("1", "2")
    ]
    assert found[0] == found[1]
    assert len(set(found[0].values())) == len(KINDS)


@pytest.mark.parametrize("name", ["levit_128s", "efficientformerv2_s0", "test_vit", "sequencer2d_s"])
def test_a_pass_leaves_the_fingerprint_as_it_was(name: str) -> None:
    family = next(family for family in timm_families.FAMILIES.values() if family.architecture == name)
    model = family.build()
    before = backbone_fingerprint(model)
    with preserve_modes(model), torch.no_grad():
        model.eval()(family.pictures())
    assert backbone_fingerprint(model) == before
