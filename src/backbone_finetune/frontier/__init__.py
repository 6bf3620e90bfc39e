"""Find which tensors of a partly frozen network can be cached for each image, and run the rest on them."""

from .rest import Frontier, KeptTensor, NoFrontier
from .search import find_frontier

__all__ = ["Frontier", "KeptTensor", "NoFrontier", "find_frontier"]
