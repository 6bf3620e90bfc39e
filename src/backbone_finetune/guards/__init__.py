"""What a model looks at so that nothing it promises is broken without a word: each look is a file of its own."""

from .combined import Guards

__all__ = ["Guards"]
