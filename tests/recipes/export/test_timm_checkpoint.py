"""A plain checkpoint that timm loads strictly, with a class map for its scripts."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from exported_models import make_trained, names_in
from image_folders import COLOURS, make_image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm_families import SMALL, Family

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import export_timm
from backbone_finetune.recipes.export.timm_checkpoint import find_obstacle

# Families below 25 million parameters whose own classifier is more than one linear layer.
STAY = {
    *("crossvit", "efficientformer", "efficientformer_v2", "efficientvim", "efficientvit_msra", "iformer", "levit"),
    *("repvit", "shvit", "swiftformer"),
}


def test_timm_loads_the_checkpoint_strictly_with_the_same_logits(tmp_path: Path) -> None:
    images = [make_image(tmp_path / f"{name}.png", colour) for name, colour in COLOURS.items()]
    trained = make_trained()
    exported = export_timm(trained, tmp_path / "out" / "plain.safetensors", images=images)
    assert names_in(tmp_path / "out") == ["plain.classes.txt", "plain.safetensors"]
    network = timm.create_model("test_resnet", num_classes=3, checkpoint_path=exported.path).eval()
    inputs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network(inputs), trained.model(inputs))
    assert (exported.difference, exported.images) == (0, 3)
    assert exported.use == f"timm.create_model('test_resnet', num_classes=3, checkpoint_path={str(exported.path)!r})"


def test_the_class_map_has_the_order_of_the_classes(tmp_path: Path) -> None:
    trained = make_trained()
    for name in trained.class_names:
        make_image(tmp_path / "images" / name / "0.png", COLOURS["red"])
    export_timm(trained, tmp_path / "plain.safetensors")

    def targets(class_map: str) -> dict[str, int]:
        reader = ReaderImageFolder(str(tmp_path / "images"), class_map=class_map)
        return {Path(path).parent.name: target for path, target in reader.samples}

    assert targets(str(tmp_path / "plain.classes.txt")) == {"1": 0, "10": 1, "2": 2}
    assert targets("") == {"1": 0, "2": 1, "10": 2}


def test_the_loading_hint_has_the_arguments(tmp_path: Path) -> None:
    exported = export_timm(make_trained("test_vit", 96, img_size=96), tmp_path / "plain.safetensors")
    assert exported.use.startswith("timm.create_model('test_vit', num_classes=3, img_size=96, checkpoint_path=")


@pytest.mark.zoo
def test_ten_of_73_small_families_have_an_obstacle() -> None:
    def has_obstacle(family: Family) -> bool:
        model = FineTuneModel.from_timm(family.architecture, num_classes=3, **family.keywords)
        return find_obstacle(model, family.architecture, **family.keywords) is not None

    small = {name: family for name, family in SMALL.items() if family.million_parameters < 25}
    assert (len(small), len(STAY)) == (73, 10), "recipes/README.md says so"
    assert {name for name, family in small.items() if has_obstacle(family)} == STAY


QUICK = {"dla", "levit"}  # a convolution as classifier; two classifiers with a norm
FAMILIES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name, family in SMALL.items()
    if family.million_parameters < 25
]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_exports_or_raises(name: str, tmp_path: Path) -> None:
    family = SMALL[name]
    arguments = {"img_size": family.side} if family.takes_img_size else {}
    trained = make_trained(family.architecture, family.side, **arguments)
    obstacle = find_obstacle(trained.model, family.architecture, **arguments)
    assert (obstacle is not None) == (name in STAY)
    if obstacle is None:
        exported = export_timm(trained, tmp_path / "plain.safetensors")
        assert exported.difference <= 1e-5 * exported.largest
    else:
        with pytest.raises(ValueError, match="more in its classifier than one linear layer"):
            export_timm(trained, tmp_path / "plain.safetensors")
        assert names_in(tmp_path) == []
