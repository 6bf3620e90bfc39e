"""The smallest architecture of each family of timm 1.0.31, and the smallest image that it runs on.

For byoanet it is the smallest that runs on 32 pixels; the smallest has halo attention, which needs 256 pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import nn


class Family(NamedTuple):
    """An architecture, and the image side that it runs on; with `takes_img_size`, it is built for that side.

    With `is_configured_for_side`, its configuration has that side too, so that a probe is cheaper.
    """

    architecture: str
    side: int
    million_parameters: float
    takes_img_size: bool = False
    is_configured_for_side: bool = True

    @property
    def keywords(self) -> dict[str, Any]:
        """Return keyword arguments of `timm.create_model` or `FineTuneModel.from_timm` for that side."""
        keywords: dict[str, Any] = {"img_size": self.side} if self.takes_img_size else {}
        if self.is_configured_for_side:
            keywords["pretrained_cfg_overlay"] = {"input_size": (3, self.side, self.side)}
        return keywords

    def build(self, **keywords: Any) -> nn.Module:
        """Build timm's own network."""
        return timm.create_model(self.architecture, **self.keywords, **keywords)

    def images(self, count: int = 2) -> torch.Tensor:
        """Return random images, (count, 3, side, side)."""
        return torch.randn(count, 3, self.side, self.side, generator=torch.Generator().manual_seed(count))


FAMILIES = {
    "beit": Family("beit_base_patch16_224", 32, 86.5, takes_img_size=True),
    "byoanet": Family("lambda_resnet26t", 32, 11.0),
    "byobnet": Family("test_byobnet", 32, 0.5),
    "cait": Family("cait_xxs24_224", 32, 12.0, takes_img_size=True),
    "coat": Family("coat_tiny", 32, 5.5, takes_img_size=True),
    "convit": Family("convit_tiny", 32, 5.7, takes_img_size=True),
    "convmixer": Family("convmixer_768_32", 32, 21.1),
    "convnext": Family("test_convnext", 32, 0.3),
    "cpubone": Family("cpubone_nano", 32, 6.5),
    "crossvit": Family("crossvit_tiny_240", 32, 7.0, is_configured_for_side=False),
    "csatv2": Family("csatv2", 64, 11.1),
    "cspnet": Family("cs3darknet_focus_s", 32, 3.3),
    "cspnext": Family("cspnext_tiny", 32, 2.7),
    "davit": Family("davit_tiny", 32, 28.4),
    "deepseek_vit": Family("deepseek_vit_412m", 224, 411.8),
    "deit": Family("deit_tiny_patch16_224", 32, 5.7, takes_img_size=True),
    "densenet": Family("densenet121", 32, 8.0),
    "dla": Family("dla46x_c", 32, 1.1),
    "dpn": Family("dpn48b", 32, 9.1),
    "edgenext": Family("edgenext_xx_small", 32, 1.3),
    "efficientformer": Family("efficientformer_l1", 224, 12.3),
    "efficientformer_v2": Family("efficientformerv2_s0", 32, 3.6, takes_img_size=True),
    "efficientnet": Family("test_efficientnet", 32, 0.4),
    "efficientvim": Family("efficientvim_m1", 32, 6.7),
    "efficientvit_mit": Family("efficientvit_b0", 32, 3.4),
    "efficientvit_msra": Family("efficientvit_m0", 32, 2.3),
    "eva": Family("vit_tiny_patch16_dinov3_qkvb", 32, 5.5),
    "fasternet": Family("fasternet_t0", 32, 3.9),
    "fastvit": Family("fastvit_t8", 32, 4.0),
    "focalnet": Family("focalnet_tiny_srf", 32, 28.4),
    "gcvit": Family("gcvit_xxtiny", 32, 12.0, takes_img_size=True),
    "gemma4_vit": Family("gemma4_vit_167m", 32, 167.4),
    "ghostnet": Family("ghostnet_050", 32, 2.6),
    "hardcorenas": Family("hardcorenas_b", 32, 5.2),
    "hgnet": Family("hgnetv2_b0", 32, 6.0),
    "hiera": Family("hiera_tiny_224", 32, 27.9, takes_img_size=True),
    "hieradet_sam2": Family("sam2_hiera_tiny", 32, 26.9),
    "hrnet": Family("hrnet_w18_small", 32, 13.2),
    "iformer": Family("iformer_t", 32, 2.9),
    "inception_next": Family("inception_next_atto", 32, 4.2),
    "inception_resnet_v2": Family("inception_resnet_v2", 96, 55.8),
    "inception_v3": Family("inception_v3", 96, 23.8),
    "inception_v4": Family("inception_v4", 96, 42.7),
    "lcnetv2": Family("lcnetv2_small", 32, 4.1),
    "levit": Family("levit_128s", 32, 7.8, takes_img_size=True),
    "lowformer": Family("lowformer_b0", 32, 14.1),
    "mambaout": Family("test_mambaout", 32, 0.4),
    "maxxvit": Family("test_coatnet", 32, 0.6, takes_img_size=True),
    "metaformer": Family("poolformerv2_s12", 32, 11.9),
    "mlp_mixer": Family("gmlp_ti16_224", 32, 5.9, takes_img_size=True),
    "mobilenetv3": Family("mobilenetv3_small_050", 32, 1.6),
    "mobilenetv5": Family("mobilenetv5_base", 32, 82.6),
    "mobilevit": Family("mobilevit_xxs", 32, 1.3),
    "mvitv2": Family("mvitv2_tiny", 32, 24.2),
    "naflexvit": Family("naflexvit_base_patch16_parfac_gap", 32, 86.5),
    "nasnet": Family("nasnetalarge", 32, 88.8),
    "nest": Family("nest_tiny", 32, 17.1, takes_img_size=True),
    "nextvit": Family("nextvit_small", 32, 31.8),
    "nfnet": Family("test_nfnet", 32, 0.4),
    "pit": Family("pit_ti_224", 32, 4.8, takes_img_size=True),
    "pnasnet": Family("pnasnet5large", 32, 86.1),
    "pvt_v2": Family("pvt_v2_b0", 32, 3.7),
    "qwen3_vit": Family("qwen3_vit_88m", 32, 87.4),
    "rdnet": Family("rdnet_tiny", 32, 23.9),
    "regnet": Family("regnetx_002", 32, 2.7),
    "repghost": Family("repghostnet_050", 32, 2.3),
    "repvit": Family("repvit_m1", 32, 5.5),
    "res2net": Family("res2next50", 32, 24.7),
    "resnest": Family("resnest14d", 32, 10.6),
    "resnet": Family("test_resnet", 32, 0.5),
    "resnetv2": Family("resnetv2_18", 32, 11.7),
    "rexnet": Family("rexnet_100", 32, 4.8),
    "selecsls": Family("selecsls42", 32, 30.4),
    "senet": Family("legacy_seresnet18", 32, 11.8),
    "sequencer": Family("sequencer2d_s", 32, 27.7),
    "shvit": Family("shvit_s1", 32, 6.3),
    "sknet": Family("skresnet18", 32, 12.0),
    "starnet": Family("starnet_s050", 32, 0.5),
    "swiftformer": Family("swiftformer_xs", 32, 3.5),
    "swin_transformer": Family("swin_tiny_patch4_window7_224", 32, 28.3, takes_img_size=True),
    "swin_transformer_v2": Family("swinv2_tiny_window8_256", 32, 28.3, takes_img_size=True),
    "swin_transformer_v2_cr": Family("swinv2_cr_tiny_224", 32, 28.3, takes_img_size=True),
    "tiny_vit": Family("tiny_vit_5m_224", 32, 12.1),
    "tnt": Family("tnt_s_legacy_patch16_224", 32, 23.8, takes_img_size=True),
    "tresnet": Family("tresnet_m", 32, 31.4),
    "twins": Family("twins_svt_small", 32, 24.1),
    "vgg": Family("vgg11", 32, 132.9),
    "visformer": Family("visformer_tiny", 32, 10.3, takes_img_size=True),
    "vision_transformer": Family("test_vit", 32, 0.4),
    "vision_transformer_hybrid": Family("vit_tiny_r_s16_p8_224", 32, 6.3, takes_img_size=True),
    "vision_transformer_relpos": Family("test_vit_relpos", 32, 0.8, takes_img_size=True),
    "vision_transformer_sam": Family("samvit_base_patch16_224", 32, 86.5),
    "vitamin": Family("vitamin_small_224", 32, 22.2, takes_img_size=True),
    "volo": Family("volo_d1_224", 32, 26.6, takes_img_size=True),
    "vovnet": Family("ese_vovnet19b_slim_dw", 32, 1.9),
    "xception": Family("legacy_xception", 32, 22.9),
    "xception_aligned": Family("xception41p", 32, 26.9),
    "xcit": Family("xcit_nano_12_p8_224", 32, 3.0),
}

# A training step over all of these takes seconds.
SMALL = {name: family for name, family in FAMILIES.items() if family.million_parameters < 50}

# The quick tier: families that differ in kind. Convolutions with BatchNorm and without, tokens, branches, a head that
# is a 1x1 convolution or two layers, no matcher, parameters that the reset turns off, caches in eval.
REPRESENTATIVE = frozenset(
    [
        *("convnext", "crossvit", "dla", "efficientnet", "efficientvim", "levit", "metaformer", "mobilenetv3", "nfnet"),
        *("resnet", "vision_transformer", "xcit"),
    ]
)


def each(names: Iterable[str], *, costly: Iterable[str] = ()) -> list[Any]:
    """Return test parameters, one for each family; those outside the quick tier, and costly ones, run with `-m zoo`."""
    quick = REPRESENTATIVE - {*costly}
    return [pytest.param(name, marks=() if name in quick else pytest.mark.zoo) for name in names]
