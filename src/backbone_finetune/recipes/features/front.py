"""What of a partly frozen model is computed once for each image, and the rest, which trains on it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from backbone_finetune import FineTuneModel
from backbone_finetune.eval_caches import preserve_modes
from backbone_finetune.frontier import Frontier, NoFrontier, find_frontier


@dataclass(frozen=True)
class Front:
    """The part of a model that computes the same for an image in every epoch."""

    backbone: nn.Module
    module: nn.Module  # in eval while ``run`` runs
    run: Callable[..., Any]  # takes the inputs of a batch, and returns what ``rest`` takes
    rest: nn.Module  # trains, and returns the logits
    description: str = "the output of the backbone"  # what is kept for each image
    trained: frozenset[str] = frozenset()  # parameters and buffers of the backbone that training changes


def front_of_backbone(model: FineTuneModel) -> Front:
    """Return the front of a model whose whole backbone is frozen: the backbone, and its classifier as the rest."""
    if has_trainable(model.backbone):
        raise ValueError("features of a backbone that trains change with every step; call freeze_backbone() first")
    return Front(model.backbone, model.backbone, model.backbone, model.classifier)


def find_front(model: FineTuneModel, inputs: Sequence[Tensor]) -> Front | NoFrontier:
    """Find the front of a model that is frozen as it will train, and prove it on a batch; see ``find_frontier``."""
    if not has_trainable(model.backbone):
        return front_of_backbone(model)
    if not len(inputs[0]) > 2:
        return NoFrontier("it is proved on 3 images or more")
    with preserve_modes(model):
        model.train()
        found = find_frontier(model, *inputs)
    if isinstance(found, NoFrontier):
        return found
    names = {*dict(model.named_parameters()), *dict(model.named_buffers())} - model.frozen_names()
    trained = frozenset(name.removeprefix("backbone.") for name in names if name.startswith("backbone."))
    return Front(model.backbone, model, found.record, Replay(found), str(found), trained)


class Replay(nn.Module):
    """The rest of a model behind its frontier, as a module of one argument: the tensors that were recorded."""

    def __init__(self, frontier: Frontier) -> None:
        super().__init__()
        self.rest = frontier.rest

    def forward(self, tensors: Sequence[Tensor]) -> Any:
        """Compute the logits."""
        return self.rest(*tensors)


def has_trainable(module: nn.Module) -> bool:
    """Tell whether any parameter of a module trains."""
    return any(parameter.requires_grad for parameter in module.parameters())


@contextmanager
def in_eval(module: nn.Module) -> Iterator[None]:
    """Set a module to eval in the block, and restore the mode of each of its submodules after it."""
    with preserve_modes(module):
        module.eval()
        yield
