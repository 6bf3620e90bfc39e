"""Fine-tune any timm or custom backbone: explicit submodules, freezing that really freezes.

>>> from backbone_finetune import FineTuneModel
>>> model = FineTuneModel.from_timm("resnet18", num_classes=10).freeze_backbone()
"""

from .layers.groups import LayerGroup
from .model import FineTuneModel
from .splitting import TokenReadout

__version__ = "0.1.0"

__all__ = ["FineTuneModel", "LayerGroup", "TokenReadout", "__version__"]
