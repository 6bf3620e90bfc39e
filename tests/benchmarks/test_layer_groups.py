"""The table of layer groups of popular networks, and the committed table."""

from __future__ import annotations

import re
from pathlib import Path

import layer_groups
import pytest
import timm
from subjects.popular_networks import PopularNetwork, popular_networks

from backbone_finetune import FineTuneModel

PAGE = (Path(layer_groups.__file__).parent / "results" / "layer_groups.md").read_text(encoding="utf-8")


def test_rows_have_counts_and_names_or_the_missing_package() -> None:
    page = layer_groups.as_markdown(
        [
            PopularNetwork("a resnet", "timm", lambda: timm.create_model("test_resnet", num_classes=0)),
            PopularNetwork("another", "no-such-package", lambda: pytest.fail("it cannot be built")),
        ],
        "the command",
    )
    model = FineTuneModel(timm.create_model("test_resnet", num_classes=0), timm.layers.Linear(96, 2))
    trained = [p.numel() for p in model.freeze_backbone(trainable_groups=1).backbone.parameters() if p.requires_grad]
    share = sum(trained) / sum(parameter.numel() for parameter in model.backbone.parameters())
    assert (
        f"| a resnet | 5 | `layer4` | {share:.1%} | {share:.1%} | {model.group_matcher()('classifier.bias')} |" in page
    )
    assert "| another | no-such-package is not installed |" in page
    assert f"{'a resnet ' + format(share, '.1%') if share > 0.6 else 'none'}. A ResNet" in page


def test_all_networks_of_the_committed_table_are_within_limits_except_listed_ones() -> None:
    shares = dict(re.findall(r"^\| (.+?) \| \d+ \| `.+?` \| ([\d.]+)% \|", PAGE, flags=re.MULTILINE))
    assert list(shares) == [network.name for network in popular_networks()]
    outside = {name for name, share in shares.items() if not 0.5 <= float(share) <= 60}
    assert all("resnet" in name.lower() or "regnet" in name for name in outside)
    named = PAGE.split("Shares outside of 0.5% to 60%: ")[1]
    assert all(f"{name} {shares[name]}%" in named for name in outside)
    assert PAGE.count("not installed") == 0


# The others need real values, which takes long.
WITH_VALUES = ("open_clip", "torchvision regnet", "torchvision vgg")
ON_META = [network for network in popular_networks() if not network.name.startswith(WITH_VALUES)]


@pytest.mark.parametrize("network", ON_META, ids=lambda n: n.name)
def test_the_networks_have_the_groups_of_the_table(network: PopularNetwork) -> None:
    if layer_groups.installed_version(network.package) is None:
        pytest.skip(f"{network.package} is not installed")
    model = FineTuneModel(layer_groups.build_without_values(network), timm.layers.Linear(2, 2))
    share = layer_groups.share_of_last_group(model)
    assert f"| {network.name} | {len(model.layer_groups)} | `{model.layer_groups[-1].name}` | {share:.1%} |" in PAGE
