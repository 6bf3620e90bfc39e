"""Run a network on batches: in channels_last, which is faster for convolutions, and in parts if memory is too small."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten

from backbone_finetune.eval_caches import preserve_modes

from ..rng import preserve_rng_state

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Runner:
    """Runs a network on batches ``(B, ...)``, and keeps for later ones what it finds out on one.

    >>> runner, network = Runner(), nn.Conv2d(3, 2, 1)
    >>> slots, _ = runner.run(lambda images: network(images).view(2, -1), [torch.ones(2, 3, 4, 4)], network)
    >>> slots[0].shape, runner
    (torch.Size([2, 32]), Runner(name='the model', contiguous=True, most=0))
    """

    name: str = "the model"  # of what runs, for the log
    contiguous: bool = False  # whether the network is known to take contiguous images alone
    most: int = 0  # images at a time, 0 for any number

    def run(
        self, function: Callable[..., Any], inputs: Sequence[Tensor], module: nn.Module
    ) -> tuple[list[Any], TreeSpec]:
        """Call a function of a module's inputs without gradients; return the outputs' tensors, and their structure.

        While the device runs out of memory, the number of images at a time is halved.

        Raises:
            torch.OutOfMemoryError: the memory is too small for one image.
        """
        return self.in_fast_layout(partial(self._in_parts, function), inputs, module)

    def in_fast_layout(
        self, function: Callable[[Sequence[Tensor]], T], inputs: Sequence[Tensor], module: nn.Module
    ) -> T:
        """Call a function of a module's inputs with images in channels_last, or contiguous if that fails.

        A network that reshapes with ``view`` fails.
        """
        faster = inputs if self.contiguous else to_channels_last(inputs, module)
        try:
            return function(faster)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or all(map(torch.Tensor.is_contiguous, faster)):
                raise
            result = function(inputs)
        self.contiguous = True
        return result

    def _in_parts(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[list[Any], TreeSpec]:
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


def takes_channels_last(module: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Find out on two images whether a module takes channels_last; it runs in eval mode, and does not change.

    >>> takes_channels_last(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten()), [torch.ones(2, 3, 4, 4)])
    True
    """
    runner = Runner()
    with preserve_rng_state(), preserve_modes(module), torch.no_grad():
        module.eval()
        runner.in_fast_layout(lambda images: module(*images), [each[:2] for each in inputs], module)
    return not runner.contiguous


def to_channels_last(inputs: Sequence[Tensor], module: nn.Module) -> list[Tensor]:
    """Convert images ``(B, C, H, W)`` to channels_last if a module has convolutions, which follow their input."""
    # The weights are not converted: a batch of EfficientNet-Lite0 took .73 of the time, with converted weights .70.
    if not all(each.device.type in {"cpu", "cuda"} for each in inputs):
        return list(inputs)
    if not any(isinstance(part, nn.Conv2d) for part in module.modules()):
        return list(inputs)
    return [each.contiguous(memory_format=torch.channels_last) if each.ndim == 4 else each for each in inputs]
