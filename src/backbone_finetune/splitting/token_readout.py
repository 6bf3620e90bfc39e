"""The tokens of a timm transformer as one feature vector: class tokens of several blocks, and the mean patch token."""

from __future__ import annotations

from inspect import signature
from typing import Any, cast

import torch
from torch import nn

from ..validation import check_module


class TokenReadout(nn.Module):
    """A backbone whose features are the class tokens of a timm transformer's last blocks, and its mean patch token.

    >>> import timm
    >>> from backbone_finetune import FineTuneModel
    >>> readout = TokenReadout(timm.create_model("test_vit"), blocks=4, patch_mean=True)
    >>> model = FineTuneModel(readout, nn.Linear(readout.num_features, 10)).freeze_backbone(trainable_groups=1)
    >>> readout(torch.zeros(2, 3, 160, 160)).shape, model.layer_groups[-1].name
    (torch.Size([2, 320]), 'network.blocks.5')

    The linear evaluation of DINOv2 (Oquab et al. 2023) chooses between 1 and 4 blocks, with and without the mean. As
    there, the tokens of each block go through the final norm. If the network's norm comes after its pooling, each
    pooled token goes through that. For the mean alone use timm's pooling: ``network.reset_classifier(0, "avg")``, then
    ``FineTuneModel.from_timm(network, num_classes)``.

    Args:
        network: a timm transformer with a class token, which loses its classifier in place. It takes images
            ``(B, C, H, W)``, and its readout has width ``num_features = (blocks + patch_mean) * network.embed_dim``.
        blocks: the number of last blocks whose class tokens are concatenated, from input to output.
        patch_mean: append the mean of the patch tokens of the last block. Register tokens are left out.

    Raises:
        TypeError: the network is not an ``nn.Module``.
        ValueError: it has no class token, timm cannot return it for each block, or there are fewer blocks.
    """

    network: nn.Module
    blocks: int
    patch_mean: bool

    def __init__(self, network: nn.Module, *, blocks: int = 1, patch_mean: bool = False) -> None:
        super().__init__()
        check_module(network, "network", "TokenReadout")
        timm_network: Any = network
        intermediates = getattr(network, "forward_intermediates", None)
        if (
            getattr(network, "cls_token", None) is None
            or intermediates is None
            or "return_prefix_tokens" not in signature(intermediates).parameters
        ):
            raise ValueError(
                f"TokenReadout: {type(network).__name__} has no class token that timm's forward_intermediates returns "
                "for each block (return_prefix_tokens); wrap it with FineTuneModel.from_timm, which keeps the "
                "network's own pooling."
            )
        depth = len(timm_network.blocks)
        if not 1 <= blocks <= depth:
            raise ValueError(f"TokenReadout: blocks={blocks}: {type(network).__name__} has {depth}; pass 1 to {depth}.")
        if getattr(network, "attn_pool", None) is None:
            timm_network.reset_classifier(0)
        else:  # the weights of its pooling would not train
            timm_network.reset_classifier(0, global_pool="token")
        self.network = network
        self.blocks, self.patch_mean = blocks, patch_mean
        self.training = network.training

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute features: images ``(B, C, H, W)`` to ``(B, num_features)``."""
        network: Any = self.network
        tokens = network.forward_intermediates(
            images, self.blocks, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        pooled = [prefix[:, 0] for _, prefix in tokens]
        if self.patch_mean:
            pooled.append(tokens[-1][0].mean(1))
        # What timm's forward_head does between pooling and classifier.
        norm, dropout = (getattr(network, name, nn.Identity()) for name in ("fc_norm", "head_drop"))
        return cast(torch.Tensor, dropout(torch.cat([norm(token) for token in pooled], 1)))

    def extra_repr(self) -> str:
        """Describe the readout in the representation of the module."""
        return f"blocks={self.blocks}, patch_mean={self.patch_mean}"

    @property
    def num_features(self) -> int:
        """The width of the features."""
        return (self.blocks + self.patch_mean) * cast(int, self.network.embed_dim)

    head_hidden_size = num_features  # timm's name for the width that a classifier takes

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The network's configuration, for ``timm.data.resolve_model_data_config``."""
        return cast("dict[str, Any]", self.network.pretrained_cfg)

    @property
    def _traits(self) -> dict[str, Any]:
        """The input that timm has built the network for, which ``timm.models.get_model_input_config`` reads."""
        return cast("dict[str, Any]", getattr(self.network, "_traits", {}))
