"""Split a network into backbone and classifier, and reassemble it."""

from .custom import Reassembly, SequentialReassembly, Split, split_module
from .measures import count_classes, measure_features
from .timm_network import split_timm
from .token_readout import TokenReadout

__all__ = [
    "Reassembly",
    "SequentialReassembly",
    "Split",
    "TokenReadout",
    "count_classes",
    "measure_features",
    "split_module",
    "split_timm",
]
