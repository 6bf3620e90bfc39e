"""A network to (backbone, classifier) and back."""

from .custom import CutProof, Reassembly, SequentialReassembly, Split, split_module
from .heads import count_classes
from .timm_network import split_timm

__all__ = [
    "CutProof",
    "Reassembly",
    "SequentialReassembly",
    "Split",
    "count_classes",
    "split_module",
    "split_timm",
]
