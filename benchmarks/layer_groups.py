"""List the layer groups of popular networks: their number, the last one, and what `trainable_groups=1` trains.

    python benchmarks/layer_groups.py

Counts parameters; nothing is timed, downloaded or run. `pip install "backbone-finetune[peers]" torchvision` installs
the packages of the networks; missing packages are listed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from harness.environment import describe_command, describe_environment, installed_version
from harness.results import write_text
from subjects.popular_networks import PopularNetwork, popular_networks
from torch import nn

from backbone_finetune import FineTuneModel

PACKAGES = ("torchvision", "transformers", "open_clip_torch", "peft")
SMALLEST, LARGEST = 0.005, 0.6


def main() -> None:
    """Group each network, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "layer_groups.md")
    options = parser.parse_args()
    command = describe_command(__file__, sys.argv[1:])
    write_text(options.output, as_markdown(popular_networks(), command))
    print(f"wrote {options.output}")


def as_markdown(networks: Sequence[PopularNetwork], command: str) -> str:
    """Return a row for each network, and the networks outside of the limits."""
    environment = describe_environment(torch.device("cpu"))
    versions = ", ".join(f"{name} {installed_version(name) or 'not installed'}" for name in PACKAGES)
    rows: list[str] = []
    outside: list[str] = []
    for network in networks:
        if installed_version(network.package) is None:
            rows.append(f"| {network.name} | {network.package} is not installed | | | | |")
            continue
        model = FineTuneModel(build_without_values(network), nn.Identity())
        share = share_of_last_group(model)
        model.freeze_backbone(trainable_groups=1)
        every = list(model.backbone.parameters())
        trained = sum(p.numel() for p in every if p.requires_grad) / sum(p.numel() for p in every)
        if not SMALLEST <= share <= LARGEST:
            outside.append(f"{network.name} {share:.1%}")
        depth = model.group_matcher()("classifier")
        groups = model.layer_groups
        rows.append(f"| {network.name} | {len(groups)} | `{groups[-1].name}` | {share:.1%} | {trained:.1%} | {depth} |")
    return (
        "\n".join(
            [
                "# Layer groups of popular networks",
                "",
                f"`{command}`, {environment['date']}, {environment['cpu']}, Python {environment['python']}, torch "
                f"{environment['torch']}, timm {environment['timm']}, {versions}.",
                "",
                "The networks are built with random weights and without their classifiers. *Share*: of the backbone's "
                "parameters, those in the last group. *Trained*: those that `freeze_backbone(trainable_groups=1)` "
                "trains, fewer where something was fixed when the network was wrapped, as PEFT fixes all but its "
                "adapters. *Depth*: of the classifier, counted from the input, for `layer_decay`.",
                "",
                "| network | groups | last group | share | trained | depth |",
                "|---|--:|---|--:|--:|--:|",
                *rows,
                "",
                f"Shares outside of {SMALLEST:.1%} to {LARGEST:.0%}: {', '.join(outside) or 'none'}. A ResNet or "
                "RegNet holds that much in its last stage, which stays one group.",
            ]
        )
        + "\n"
    )


def build_without_values(network: PopularNetwork) -> nn.Module:
    """Build a network on the meta device, or with values if its library needs them."""
    try:
        with torch.device("meta"):
            return network.build()
    except NotImplementedError:
        return network.build()


def share_of_last_group(model: FineTuneModel) -> float:
    """Return the share of the backbone's parameters that are in its last layer group."""
    sizes = {name: parameter.numel() for name, parameter in model.backbone.named_parameters()}
    return sum(sizes[name] for name in model.layer_groups[-1].parameter_names) / sum(sizes.values())


if __name__ == "__main__":
    main()
