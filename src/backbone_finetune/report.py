"""What a FineTuneModel reports of its frozen parts: a table, names, digests, and whether they changed."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn

from . import freezing, verification
from .distributed import reshard
from .layers.groups import LayerGroup
from .splitting import Reassembly
from .summary import describe_by_group, describe_by_name


class FrozenReport(nn.Module):
    """The methods of a FineTuneModel that show and check what is frozen.

    >>> from backbone_finetune import FineTuneModel
    >>> FineTuneModel(nn.Linear(2, 2), nn.Linear(2, 3)).freeze_backbone().print_trainable_parameters()
    group       parameters  state      mode
    (root)               6  frozen     eval
    classifier           9  trainable  train
    trainable parameters: 9 of 15 (60.00%)
    """

    backbone: nn.Module
    classifier: nn.Module
    norm_eval: bool
    _layer_groups: tuple[LayerGroup, ...]
    _reassembly: Reassembly

    def print_trainable_parameters(self, *, by_name: bool = False) -> None:
        """Print which parameters are frozen and which train.

        >>> from backbone_finetune import FineTuneModel
        >>> FineTuneModel(nn.Linear(2, 2, False), nn.Linear(2, 3, False)).print_trainable_parameters(by_name=True)
        Trainable parameter: backbone.weight
        Trainable parameter: classifier.weight

        Args:
            by_name: list each parameter by its name in the original network. Default: a table by layer group.
        """
        if by_name:
            named = ((self._reassembly.original_name(name), parameter) for name, parameter in self.named_parameters())
            print(describe_by_name(named))
        else:
            print(describe_by_group(self.backbone, self.classifier, self._layer_groups))

    def frozen_fingerprint(self) -> dict[str, str]:
        """Return a digest of each frozen parameter and buffer, by state-dict name.

        >>> from backbone_finetune import FineTuneModel
        >>> sorted(FineTuneModel(nn.Linear(2, 2), nn.Linear(2, 2)).freeze_backbone().frozen_fingerprint())
        ['backbone.bias', 'backbone.weight']

        A buffer is frozen if its module is. The digest of a DTensor is that of its local shard.
        """
        reshard(self)
        return verification.fingerprint(verification.frozen_tensors(self, self._frozen_modules()))

    def frozen_names(self) -> set[str]:
        """Return the names that ``frozen_fingerprint`` returns, without reading the tensors.

        >>> from backbone_finetune import FineTuneModel
        >>> FineTuneModel(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)).freeze_backbone().frozen_names()
        {'backbone.weight'}
        """
        return set(verification.frozen_tensors(self, self._frozen_modules()))

    def assert_frozen(self) -> AbstractContextManager[None]:
        """Return a context that raises AssertionError if a tensor that is frozen on entry has changed on exit.

        >>> from backbone_finetune import FineTuneModel
        >>> model = FineTuneModel(nn.Linear(2, 2), nn.Linear(2, 2)).freeze_backbone()
        >>> with model.assert_frozen():
        ...     _ = model.backbone.bias.data.zero_()
        Traceback (most recent call last):
        AssertionError: assert_frozen: 1 of 2 frozen tensors changed...

        Digests of all bits are compared, on a CUDA device checksums. The message lists those that changed, with the
        likely cause.
        """
        return verification.assert_unchanged(self, self._frozen_modules, self._layer_groups)

    def _frozen_modules(self) -> list[nn.Module]:
        return list(freezing.frozen_modules(self, self.backbone, self._layer_groups, norm_eval=self.norm_eval))
