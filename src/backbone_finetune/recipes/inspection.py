"""What ``backbone-finetune inspect`` prints: the layer groups of an architecture, without building a single weight."""

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

from backbone_finetune import FineTuneModel
from backbone_finetune.architectures import check_architecture

__all__ = ["inspect"]


def inspect(architecture: str) -> str:
    """Describe the layer groups and parameters of a timm architecture, and how to train each.

    Built on the meta device: nothing is downloaded, and no memory taken, however large the network.

    >>> print(inspect("test_resnet").splitlines()[-2])
    layer4              267,840   71.9%  --trainable-groups 1

    Raises:
        ValueError: timm has no such architecture.
    """
    check_architecture(architecture)
    with torch.device("meta"):
        network = timm.create_model(architecture)
        has_classifier = hasattr(network, "reset_classifier")  # a few pure encoders have not
        model = (
            FineTuneModel.from_timm(network, num_classes=1) if has_classifier else FineTuneModel(network, nn.Identity())
        )
    sizes = {name: parameter.numel() for name, parameter in model.backbone.named_parameters()}
    total = sum(sizes.values())
    groups = model.layer_groups
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    width = max(len("layer group"), *(len(group.name) for group in groups))
    features = f"{model.num_features:,} features" if has_classifier else "tokens or maps"
    lines = [
        f"{architecture}: {total:,} parameters in {len(groups)} layer groups, input to output; "
        f"makes {features} of a picture of {' x '.join(map(str, config['input_size']))}",
        "",
        f"{'layer group':{width}}  {'parameters':>14}  {'share':>6}  trains, with all below, by",
    ]
    for index, group in enumerate(groups):
        size = sum(sizes[name] for name in group.parameter_names)
        lines.append(
            f"{group.name:{width}}  {size:>14,}  {size / total:>6.1%}  --trainable-groups {len(groups) - index}"
        )
    if has_classifier:
        lines.append(
            f"{'classifier':{width}}  {f'{model.num_features:,} + 1':>14}  {'':>6}  always; this many per class"
        )
    else:
        lines.append("no classifier: `train` can't use it; in Python, FineTuneModel(backbone, classifier) can")
    return "\n".join(lines)
