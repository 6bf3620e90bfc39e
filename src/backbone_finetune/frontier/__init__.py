"""What of a partly frozen network can be computed once for each image, found and proved on one batch."""

from .rest import Frontier, KeptTensor, NoFrontier
from .search import find_frontier

__all__ = ["Frontier", "KeptTensor", "NoFrontier", "find_frontier"]
