"""Checks that detect, repair or report what would change frozen tensors or leave unfrozen ones untrained."""

from .combined import Guards

__all__ = ["Guards"]
