"""Run a network on a batch without gradients, in parts if the device's memory is too small for all of it."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten

logger = logging.getLogger(__name__)


@dataclass
class Parts:
    """Runs batches in parts of at most ``most`` images, which are halved while the device runs out of memory.

    >>> slots, structure = Parts("the network").run(lambda images: {"double": 2 * images}, [torch.ones(3)])
    >>> slots
    [tensor([2., 2., 2.])]
    """

    name: str  # of what runs, for the log
    most: int = 0  # 0 for any number

    def run(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[list[Any], TreeSpec]:
        """Run on inputs ``(B, ...)``; return the outputs' tensors, and the structure that they form.

        Raises:
            torch.OutOfMemoryError: the memory is too small for one image.
        """
        count = len(inputs[0])
        while True:
            try:
                if not 0 < self.most < count:
                    return tree_flatten(function(*inputs))
                parts = zip(*(torch.split(each, self.most) for each in inputs), strict=True)
                results = [tree_flatten(function(*part)) for part in parts]
                slots = zip(*(slots for slots, _ in results), strict=True)
                return [torch.cat(part) for part in slots], results[0][1]
            except torch.OutOfMemoryError:
                if self.most == 1 or count == 1:
                    raise
                self.most = -(-min(self.most or count, count) // 2)
                logger.warning("out of memory: %s runs on %d images at a time from here on", self.name, self.most)
            if inputs[0].device.type == "cuda":  # not in the except block, where the error refers to its tensors
                torch.cuda.empty_cache()
