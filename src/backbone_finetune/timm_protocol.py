"""The attributes of a network that timm's helpers use: classifier, widths, configuration and groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from . import grad_checkpointing
from .features import entry_width
from .layers.groups import LayerGroup
from .layers.param_groups import build_group_matcher, exempt_names
from .splitting import count_classes, measure_features


class TimmProtocol(nn.Module):
    """The methods and properties that timm's scripts, optimizer factory and data helpers use.

    >>> from timm.optim import create_optimizer_v2
    >>> from backbone_finetune import FineTuneModel
    >>> model = FineTuneModel.from_timm("test_resnet", num_classes=2)
    >>> optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, layer_decay=0.75)
    """

    backbone: nn.Module
    classifier: nn.Module
    _layer_groups: tuple[LayerGroup, ...]

    def get_classifier(self) -> nn.Module:
        """Return the classifier.

        >>> from backbone_finetune import FineTuneModel
        >>> FineTuneModel(nn.Flatten(), nn.Linear(4, 2)).get_classifier()
        Linear(in_features=4, out_features=2, bias=True)
        """
        return self.classifier

    @property
    def num_classes(self) -> int | None:
        """The number of classes of the classifier; None if it is unknown.

        >>> from backbone_finetune import FineTuneModel
        >>> FineTuneModel(nn.Flatten(), nn.Linear(4, 2)).num_classes
        2
        """
        return count_classes(self.classifier, self.num_features)

    @property
    def num_features(self) -> int | None:
        """The width of the features that enter the classifier; None if it is unknown.

        >>> from backbone_finetune import FineTuneModel
        >>> FineTuneModel(nn.Flatten(), nn.Linear(4, 2)).num_features
        4
        """
        return entry_width(self.classifier) or measure_features(self.backbone)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn gradient checkpointing of a timm or transformers backbone on or off.

        >>> from backbone_finetune import FineTuneModel
        >>> FineTuneModel.from_timm("resnet18", num_classes=10).set_grad_checkpointing()

        Raises:
            AttributeError: the backbone has none.
        """
        grad_checkpointing.set_grad_checkpointing(self.backbone, enable)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The timm configuration of the backbone, so that ``timm.data.resolve_model_data_config(model)`` works.

        >>> from backbone_finetune import FineTuneModel
        >>> FineTuneModel.from_timm("resnet18", num_classes=10).pretrained_cfg["input_size"]
        (3, 224, 224)
        """
        configuration: dict[str, Any] = self.backbone.pretrained_cfg  # type: ignore[assignment]
        return configuration

    default_cfg = pretrained_cfg  # the older name, used by timm's ONNX export and test-time pooling

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, for timm's optimizer factory.

        >>> from backbone_finetune import FineTuneModel
        >>> sorted(FineTuneModel.from_timm("test_vit", num_classes=10).no_weight_decay())
        ['backbone.cls_token', 'backbone.dist_token', 'backbone.pos_embed', 'backbone.reg_token']
        """
        return {f"backbone.{name}" for name in exempt_names(self.backbone)}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return a function from parameter name to depth, for timm's optimizer factory (``layer_decay``).

        >>> from backbone_finetune import FineTuneModel
        >>> FineTuneModel.from_timm("resnet18", num_classes=10).group_matcher(coarse=True)("backbone.layer4.0.bn1.bias")
        4
        """
        return build_group_matcher(self.backbone, self._layer_groups, coarse=coarse)
