"""Classifiers of layers and readouts of tokens are in a model file as sizes: they come back bit for bit, or not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import get_model_input_config
from timm_families import FAMILIES
from torch import nn

from backbone_finetune import FineTuneModel, TokenReadout
from backbone_finetune.recipes.models.base import remember_base
from backbone_finetune.recipes.models.classifiers import choose_classifier
from backbone_finetune.recipes.models.file import (
    TrainedModel,
    load_trained_model,
    save_trained_changes,
    save_trained_model,
    with_new_classifier,
)
from backbone_finetune.recipes.models.readouts import assemble, choose_readout

NAMES = ("blue", "green", "red")
SIDE = 32
HEADS: Mapping[str, Callable[[int], nn.Module] | None] = {
    "linear": None,
    "batchnorm-linear": choose_classifier("batchnorm-linear", 3),
    "mlp": choose_classifier("mlp", 3),
    "every layer": lambda width: nn.Sequential(
        nn.LayerNorm(width, eps=1e-3),
        nn.Dropout(0.25),
        nn.Linear(width, 7, bias=False),
        nn.BatchNorm1d(7, eps=1e-4, momentum=None),
        nn.ReLU(),
        nn.Linear(7, 3),
    ),
}
READOUTS = {"own": None, "last-4-blocks": {"blocks": 4, "patch_mean": False}}


def make_trained(readout: str = "own", head: str = "linear", **arguments: Any) -> TrainedModel:
    model = assemble(
        "test_vit", 3, readout=READOUTS[readout], classifier=HEADS[head], img_size=SIDE, **arguments
    ).freeze_backbone()
    config = timm.data.resolve_model_data_config(model, args={"input_size": (3, SIDE, SIDE)})
    return TrainedModel(model, "test_vit", NAMES, config, {"img_size": SIDE, **arguments})


def train_a_little(model: FineTuneModel) -> None:
    optimizer = torch.optim.SGD(model.param_groups(lr=0.1))
    model.train()
    model(torch.randn(4, 3, SIDE, SIDE)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("readout", "head"),
    [("own", "batchnorm-linear"), ("own", "mlp"), ("last-4-blocks", "linear"), ("last-4-blocks", "every layer")],
)
def test_it_round_trips_bit_for_bit(tmp_path: Path, readout: str, head: str) -> None:
    trained = make_trained(readout, head, drop_rate=0.5)
    train_a_little(trained.model)
    save_trained_model(trained, tmp_path / "model.safetensors", record={})
    loaded = load_trained_model(tmp_path / "model.safetensors")
    assert str(loaded.model.classifier) == str(trained.model.eval().classifier)
    states = trained.model.state_dict(), loaded.model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    inputs = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        assert torch.equal(loaded.model(inputs), trained.model(inputs))
        features = torch.randn(4, trained.model.num_features or 0)  # dropout before the classifier is kept too
        outputs = [loaded.model.train().classifier(features) for _ in range(2)]
    assert not torch.equal(*outputs)


def test_a_classifier_that_only_looks_linear_is_not_written(tmp_path: Path) -> None:
    class Cosine(nn.Linear):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.normalize(features))

    trained = make_trained()
    other = FineTuneModel.from_timm("test_vit", classifier=Cosine(64, 3), img_size=SIDE)
    with pytest.raises(ValueError, match=r"its classifier is a Cosine, not a Linear; a file holds a Linear, or an nn"):
        save_trained_model(replace(trained, model=other), tmp_path / "model.safetensors", record={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_readouts_file_of_changes_loads_onto_its_base(tmp_path: Path, head: str) -> None:
    network = timm.create_model("test_vit", img_size=SIDE)
    torch.save(network.state_dict(), tmp_path / "base.pth")
    model = assemble(network, 3, readout=READOUTS["last-4-blocks"], classifier=HEADS[head])
    base = remember_base(model.freeze_backbone(), "file", "weights from base.pth")
    train_a_little(model)
    path = tmp_path / "changes.safetensors"
    save_trained_changes(replace(make_trained(), model=model), base, path, record={})
    assert all(name.startswith("classifier.") for name in load_file(path))
    loaded = load_trained_model(path, base=tmp_path / "base.pth").model
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_with_other_classes_the_layers_stay(tmp_path: Path) -> None:
    trained = make_trained("last-4-blocks", "every layer")
    save_trained_model(trained, tmp_path / "model.safetensors", record={})
    model = with_new_classifier(trained, tmp_path / "model.safetensors", ("ant", "bee"))
    assert str(model.classifier) == str(trained.model.classifier).replace("out_features=3", "out_features=2")
    assert isinstance(model.backbone, TokenReadout)
    own = trained.model.backbone.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.backbone.state_dict().items())


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("honest") / "model.safetensors"
    save_trained_model(make_trained(), path, record={})
    return path


LINEAR = {"kind": "Linear", "in_features": 64, "out_features": 3, "bias": True}
HUGE = {**LINEAR, "out_features": 2**20}


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("classifier", {"layers": []}, r"classifier layers"),
        ("classifier", {"layers": [LINEAR] * 17}, r"at most 16"),
        ("classifier", {"layers": [{"kind": "os.system", "command": "true"}]}, r"'Linear', 'BatchNorm1d'"),
        ("classifier", {"layers": [{**LINEAR, "in_features": 10**12}]}, r"less than or equal to 1048576"),
        ("classifier", {"layers": [{**LINEAR, "in_features": 2**20}]}, r"cannot take the backbone's features"),
        ("classifier", {"layers": [{**LINEAR, "out_features": 2**20}]}, r"last layer must be a Linear of 3 outputs"),
        ("classifier", {"layers": [LINEAR, {"kind": "GELU"}]}, r"last layer must be a Linear of 3 outputs"),
        ("classifier", {"layers": [{**LINEAR, "device": "cuda"}]}, r"extra inputs are not permitted"),
        ("classifier", {"layers": [LINEAR], "hook": "x"}, r"extra inputs are not permitted"),
        ("classifier", {"layers": [{"kind": "Dropout", "p": 2.0}, LINEAR]}, r"less than or equal to 1"),
        (
            "classifier",
            {"layers": [{**LINEAR, "out_features": 2**20}, {**LINEAR, "in_features": 2**20}]},
            r"classifier",
        ),
        ("readout", {"blocks": 0, "patch_mean": False}, r"greater than or equal to 1"),
        ("readout", {"blocks": 7, "patch_mean": False}, r"VisionTransformer has 6; pass 1 to 6"),
        ("readout", {"blocks": 10**9, "patch_mean": False}, r"less than or equal to 1000"),
        ("readout", {"blocks": 2, "patch_mean": True}, r"is missing"),
        ("readout", {"blocks": 2}, r"patch_mean"),
        ("arguments", {"img_size": SIDE, "fc_norm": "yes"}, r"fc_norm"),
    ],
)
def test_a_hostile_description_is_refused(honest: Path, tmp_path: Path, name: str, entry: object, message: str) -> None:
    path = tmp_path / "model.safetensors"
    with safe_open(honest, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(honest), path, {**metadata, name: json.dumps(entry)})
    with pytest.raises(ValueError, match=message) as caught:
        load_trained_model(path)
    assert "\n" not in str(caught.value)


MAPPED = [("vit_base_patch16_siglip_224", {"img_size": SIDE}), ("vit_pe_core_tiny_patch16_384", {"img_size": SIDE})]
POOLED = [
    ("test_vit", {"img_size": SIDE}),
    ("test_resnet", {}),
    *(pytest.param(*pooled, marks=pytest.mark.zoo) for pooled in MAPPED),
    *(
        pytest.param(FAMILIES[family].architecture, FAMILIES[family].keywords, marks=pytest.mark.zoo)
        for family in ("beit", "cait", "coat", "convit", "crossvit", "deit", "eva", "tnt", "volo", "xcit")
    ),
]


@pytest.mark.parametrize(("architecture", "arguments"), POOLED)
@torch.no_grad()
def test_the_mean_is_timms_own_network_with_other_arguments(architecture: str, arguments: dict[str, Any]) -> None:
    network = timm.create_model(architecture, num_classes=2, **arguments).eval()
    if not architecture.startswith("test_resnet"):
        for parameter in network.parameters():  # with timm's initial values, both places of the norm give the same
            nn.init.normal_(parameter, std=0.1)
    again, readout = choose_readout("mean", network, architecture, arguments)
    assert readout is None
    plain = timm.create_model(architecture, num_classes=0, **again).eval()
    plain.load_state_dict(network.state_dict())
    inputs = torch.randn(2, *get_model_input_config(network)["input_size"])
    assert torch.equal(plain(inputs), network(inputs))


def test_a_network_that_its_arguments_do_not_build_is_refused() -> None:
    with torch.device("meta"):
        network = timm.create_model("test_vit", depth=2)
    with pytest.raises(ValueError, match=r"timm builds another network with {'global_pool': 'avg', 'fc_norm': False}"):
        choose_readout("mean", network, "test_vit", {})


@pytest.mark.parametrize(
    ("architecture", "readout", "message"),
    [
        ("test_resnet", "token", r"test_resnet has no readout 'token' \(Invalid pool type: token"),
        ("test_vit_relpos", "token", r"Token pooling needs the class token"),
        ("deit_tiny_distilled_patch16_224", "mean", r"The distilled head reads the class and distillation tokens"),
        ("pit_ti_224", "mean", r"pit_ti_224 has no readout 'mean' .*; leave out --readout"),
    ],
)
def test_a_pooling_that_a_network_does_not_have_is_refused(architecture: str, readout: Any, message: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(architecture)
    with pytest.raises(ValueError, match=message):
        choose_readout(readout, network, architecture, {})
