"""Examine one architecture of timm: its structure on the meta device, and its logits with real values."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import get_model_input_config
from torch import nn

from backbone_finetune import FineTuneModel
from backbone_finetune.freezing import keeps_running_statistics
from backbone_finetune.splitting.copies import assert_same
from zoo.dependencies import DependencyTrace
from zoo.record import Structure, Values, first_sentence

CLASSES = 7
# Not below 64: at a stride of 32 one pixel would be left, and one pixel is its own mean, whoever takes the mean.
SIDES = (64, 96, 224)


def examine_structure(name: str, family: str) -> Structure:
    """Build an architecture without values and ask all that shapes and names can tell."""
    with torch.device("meta"):
        default: Any = timm.create_model(name)
        facts: dict[str, Any] = {
            "name": name,
            "family": family,
            "parameters": sum(parameter.numel() for parameter in default.parameters()),
            "default_classes": getattr(default, "num_classes", 0),
            "input_size": tuple(get_model_input_config(default)["input_size"]),
        }
        try:
            headed = default if facts["default_classes"] else timm.create_model(name, num_classes=CLASSES)
            before = {path: type(module).__name__ for path, module in headed.named_modules()}
            expected_names = set(headed.state_dict())
            model = FineTuneModel.from_timm(headed, num_classes=CLASSES)
        except ValueError as error:
            return Structure(**facts, signature="", refused=first_sentence(error))
    facts["signature"] = _signature(model.backbone, before)
    backbone: Any = model.backbone
    names = tuple(group.name for group in model.layer_groups)
    image = torch.empty(2, *facts["input_size"], device="meta")
    model.train()
    with torch.no_grad(), DependencyTrace(backbone, model.layer_groups, image) as trace:
        backbone(image)
    return Structure(
        **facts,
        refused=None,
        width=model.num_features,
        num_features=backbone.num_features,
        round_trip_refused=_refuses_round_trip(model, expected_names),
        layer_groups=names,
        last_group_share=_share_of_last_group(model),
        grouped_by=_grouped_by(backbone),
        walked_through=tuple(f"{names[early]} after {names[late]}" for early, late in sorted(trace.walked_through)),
        running_statistics=sum(keeps_running_statistics(module) for module in model.modules()),
        random_operators=tuple(sorted(trace.random_operators)),
    )


def examine_values(structure: Structure) -> Values:
    """Compare logits of the bare network, of the wrapped one, and of what `to_module()` gives back."""
    torch.manual_seed(0)
    classes = structure.default_classes or CLASSES
    network, image = _build_small(structure, classes)
    _fill_zero_weights(network.get_classifier())
    expected_names = set(network.state_dict())
    with torch.no_grad():
        logits = network(image)
        refused = difference = keep_round_trip = None
        try:
            model = FineTuneModel.from_timm(network)
        except ValueError as error:
            refused = first_sentence(error)
        else:
            difference = (model(image) - logits).abs().max().item()
            assert_same(model(image), logits)
            keep_round_trip, network = _round_trip(model, image, expected_names)
        fresh = FineTuneModel.from_timm(network, num_classes=CLASSES)
        fresh_round_trip, _ = _round_trip(fresh, image, expected_names)
    return Values(
        name=structure.name,
        input_size=tuple(image.shape[1:]),
        classes=classes,
        logits_spread=(logits.max() - logits.min()).item(),
        keep_refused=refused,
        keep_difference=difference,
        keep_round_trip=keep_round_trip,
        fresh_round_trip=fresh_round_trip,
    )


def _round_trip(model: FineTuneModel, image: torch.Tensor, expected_names: set[str]) -> tuple[str, nn.Module]:
    """Describe how the plain network compares, and give it, or the backbone where there is none."""
    wrapped = model(image)
    try:
        plain = model.to_module()
    except ValueError as error:
        return first_sentence(error), model.backbone
    if set(plain.state_dict()) != expected_names:
        return "other state-dict names than timm's own network", plain
    assert_same(plain.eval()(image), wrapped)
    torch.testing.assert_close(model(image), wrapped, rtol=0, atol=0)
    return "equal", plain


def _refuses_round_trip(model: FineTuneModel, expected_names: set[str]) -> str | None:
    try:
        plain = model.to_module()
    except ValueError as error:
        return first_sentence(error)
    own_names = set(plain.state_dict())
    return None if own_names == expected_names else f"other names: {sorted(own_names ^ expected_names)[:4]}"


def _build_small(structure: Structure, classes: int) -> tuple[Any, torch.Tensor]:
    """Build it for the smallest image that it runs on, which says as much about the classifier at less cost."""
    sides = [side for side in SIDES if side < max(structure.input_size[1:])]
    for side in sides:
        size = (structure.input_size[0], side, side)
        try:
            network = timm.create_model(
                structure.name, num_classes=classes, pretrained_cfg_overlay={"input_size": size}
            )
            image = torch.randn(2, *get_model_input_config(network)["input_size"])
            with torch.no_grad():
                network.eval()(image)
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError, ZeroDivisionError):
            continue  # windows, patches and position tables each have their own way of refusing a size
        return network, image
    network = timm.create_model(structure.name, num_classes=classes).eval()
    return network, torch.randn(2, *structure.input_size)


def _fill_zero_weights(heads: nn.Module | tuple[nn.Module, ...]) -> None:
    """Give heads that timm initializes with zeros (gmlp, hiera, sequencer) other values: zeros agree with any."""
    for head in heads if isinstance(heads, tuple) else (heads,):
        for parameter in head.parameters():
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)


def _signature(backbone: Any, before: dict[str, str]) -> str:
    after = {path: type(module).__name__ for path, module in backbone.named_modules()}
    paths = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    changes = [f"{path}: {before.get(path)} -> {after.get(path)}" for path in paths]
    pooling = backbone.global_pool if isinstance(getattr(backbone, "global_pool", None), str) else ""
    return f"{type(backbone).__name__} {pooling} {'; '.join(changes)}"


def _share_of_last_group(model: FineTuneModel) -> float:
    sizes = {name: parameter.numel() for name, parameter in model.backbone.named_parameters()}
    return sum(sizes[name] for name in model.layer_groups[-1].parameter_names) / sum(sizes.values())


def _grouped_by(backbone: Any) -> str:
    if not hasattr(backbone, "group_matcher"):
        return "feature_info"
    try:
        backbone.group_matcher(coarse=True)
    except AssertionError:
        return "group_matcher(coarse=False)"
    return "group_matcher(coarse=True)"
