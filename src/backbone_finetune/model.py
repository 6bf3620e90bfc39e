"""FineTuneModel: a backbone and a classifier, and what follows from which of their parameters train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from . import freezing, verification
from .distributed import reshard
from .eval_caches import clear_caches_on_load
from .features import classify, detach_from_storage
from .guards.combined import Guards
from .guards.frozen_statistics import release
from .layers import trainable as trainable_parts
from .layers.groups import LayerGroup, as_layer_groups
from .layers.param_groups import build_param_groups
from .splitting import Reassembly, SequentialReassembly, Split, check_width, split_module, split_timm
from .summary import describe_by_group, describe_by_name
from .timm_protocol import TimmProtocol
from .validation import check_module, check_shares_nothing


class FineTuneModel(TimmProtocol):
    """A backbone and the classifier that stands on it, two explicit submodules.

    >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> model = FineTuneModel(backbone, nn.Linear(8, 10)).freeze_backbone()
    >>> model(torch.zeros(4, 3, 32, 32)).shape, model.trainable_groups
    (torch.Size([4, 10]), 0)

    A parameter is frozen when its ``requires_grad`` is False; nothing else records it.

    Args:
        backbone: takes all inputs, ``(B, 3, H, W)`` for images, and returns features, ``(B, num_features)``.
        classifier: takes the features and returns logits, ``(B, num_classes)``, or anything else.
        layer_groups: LayerGroups or submodules of the backbone, input to output; found where they are left out.
        norm_eval: keep the backbone's running statistics fixed even where its weights train (mmpretrain's name).

    Raises:
        TypeError: a part is no module.
        ValueError: the parts share a parameter or do not fit, or a part is compiled or wrapped already.
    """

    backbone: nn.Module
    classifier: nn.Module
    norm_eval: bool

    def __init__(
        self,
        backbone: nn.Module,
        classifier: nn.Module,
        *,
        layer_groups: Sequence[LayerGroup | nn.Module] | None = None,
        norm_eval: bool = False,
    ) -> None:
        super().__init__()
        check_module(backbone, "backbone", "FineTuneModel")
        check_module(classifier, "classifier", "FineTuneModel")
        check_shares_nothing(backbone, classifier)
        check_width(backbone, classifier)
        self.backbone = backbone
        self.classifier = classifier
        self.training = backbone.training  # so that freezing a network that came in eval does not wake it
        self.norm_eval = norm_eval
        self._layer_groups = as_layer_groups(backbone, layer_groups)
        self._reassembly: Reassembly = SequentialReassembly()
        self._left_off = trainable_parts.find_fixed(backbone, self._layer_groups)
        self._guards = Guards(self)
        clear_caches_on_load(self)

    @classmethod
    def from_timm(
        cls,
        model: str | nn.Module,
        num_classes: int | None = None,
        *,
        classifier: nn.Module | Callable[[int], nn.Module] | None = None,
        pretrained: bool = False,
        drop_rate: float | None = None,
        layer_groups: Sequence[LayerGroup | nn.Module] | None = None,
        norm_eval: bool = False,
        **create_model_kwargs: Any,
    ) -> FineTuneModel:
        """Wrap a timm architecture by name, or a timm network, which is taken over as by its ``reset_classifier``.

        >>> FineTuneModel.from_timm("resnet18", num_classes=10).classifier
        Linear(in_features=512, out_features=10, bias=True)

        Without ``num_classes`` and ``classifier`` the network keeps its own classifier, with the dropout in it. A probe
        proves in eval and in train mode (where dropout draws the same twice) that it is the same function.

        Args:
            model: a name of timm's, or a timm network, which is taken over.
            num_classes: makes a new linear classifier, beside pretrained weights and a ``checkpoint_path`` too.
            classifier: a module, or a function from the feature width to a module.
            pretrained: load timm's pretrained weights.
            drop_rate: dropout before the classifier, on above a frozen backbone too; a hook, which changes no key.
            layer_groups, norm_eval: as for ``FineTuneModel``.
            **create_model_kwargs: go to ``timm.create_model``.

        Raises:
            ValueError: unknown name, no classifier or pooling, wrong width, or an own classifier that cannot be kept.
        """
        split = split_timm(
            model,
            num_classes,
            classifier=classifier,
            pretrained=pretrained,
            drop_rate=drop_rate,
            create_model_kwargs=create_model_kwargs,
        )
        return cls._from_split(split, layer_groups, norm_eval)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        classifier: nn.Module,
        *,
        new_classifier: nn.Module | None = None,
        example_input: torch.Tensor | tuple[Any, ...] | None = None,
        layer_groups: Sequence[LayerGroup | nn.Module] | None = None,
        norm_eval: bool = False,
    ) -> FineTuneModel:
        """Wrap a whole custom network, cut at the very submodule object that is its classifier.

        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 10))
        >>> FineTuneModel.from_module(net, net[3], example_input=torch.zeros(1, 3, 2, 2)).classifier is net[3]
        True

        ``net`` still runs and shares its parameters, until the model is moved to another dtype or device.

        Args:
            module: the whole network.
            classifier: the submodule object of ``module`` to cut at.
            new_classifier: takes its place.
            example_input: one input, or a tuple of several; the cut is then proved at construction in both modes.
            layer_groups, norm_eval: as for ``FineTuneModel``.

        Raises:
            ValueError: the classifier is not in it exactly once; in any forward, the network computes on after it.
        """
        check_module(module, "network", "from_module")
        split = split_module(module, classifier, new_classifier=new_classifier, example_input=example_input)
        return cls._from_split(split, layer_groups, norm_eval)

    @classmethod
    def _from_split(
        cls, split: Split, layer_groups: Sequence[LayerGroup | nn.Module] | None, norm_eval: bool
    ) -> FineTuneModel:
        model = cls(split.backbone, split.classifier, layer_groups=layer_groups, norm_eval=norm_eval)
        model._reassembly = split.reassembly
        model._left_off |= split.reassembly.unused_parameters
        return model

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Compute features, then classify them; ValueError says why where the classifier cannot take them."""
        self._guards.look_at_forward(self)
        return classify(self.classifier, detach_from_storage(self.backbone(*inputs, **kwargs)))

    def to_module(self) -> nn.Module:
        """Return the original architecture with the trained classifier attached; parameters are shared.

        >>> network = FineTuneModel.from_timm("resnet18", num_classes=10).to_module()
        >>> type(network).__name__, network.fc
        ('ResNet', Linear(in_features=512, out_features=10, bias=True))

        ``FineTuneModel(backbone, classifier)`` gives an ``nn.Sequential``. Dropout from ``drop_rate`` is left out. A
        classifier that is a 1x1 convolution in the network is another Parameter there, on the same memory: build a new
        optimizer to train it. Layers with caches (levit's attention) keep the hook that clears them at a load.

        Raises:
            ValueError: the network cannot hold the classifier.
        """
        release(self.modules())
        return self._reassembly.reassemble(self.backbone, self.classifier)

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The ordered partition of the backbone's parameters into stages or blocks, input to output.

        >>> FineTuneModel(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)).layer_groups
        (LayerGroup(name='0', parameter_names=('0.weight', '0.bias')),)
        """
        return self._layer_groups

    @property
    def trainable_groups(self) -> int | None:
        """How many of the last layer groups train, None where what trains is not the last ones.

        >>> FineTuneModel.from_timm("resnet18", num_classes=10).freeze_backbone(trainable_groups=2).trainable_groups
        2
        """
        return trainable_parts.count_trainable_groups(self.backbone, self._layer_groups, self._left_off)

    def freeze_backbone(
        self, *, trainable_groups: int = 0, trainable: Sequence[LayerGroup | nn.Module] | None = None
    ) -> FineTuneModel:
        """Freeze the backbone but for its last ``trainable_groups`` layer groups, whatever was frozen before.

        >>> model = FineTuneModel.from_timm("resnet18", num_classes=10).freeze_backbone(trainable_groups=1)
        >>> model = model.freeze_backbone(trainable=[model.backbone.layer1])  # surgical fine-tuning, Lee et al. 2023
        >>> model.backbone.layer1.training, model.backbone.layer4.training
        (True, False)

        It takes effect at once on ``requires_grad``, modes and gradients. Adapters in the backbone are frozen too.

        Args:
            trainable_groups: how many of the last layer groups train, 0 to ``len(layer_groups)``.
            trainable: instead, submodules of the backbone or LayerGroups that train, anywhere in it.

        Raises:
            ValueError: a count out of range, both given, a part that is not in the backbone, or shared memory.
        """
        reshard(self)
        chosen = trainable_parts.choose_parameters(self.backbone, self._layer_groups, trainable_groups, trainable)
        with self._guards.change(self, self._frozen_modules):
            trainable_parts.set_trainable(self.backbone, chosen, self._left_off)
        return self.train(self.training)

    def unfreeze_backbone(self) -> FineTuneModel:
        """Let all of the backbone train that can, but for what its author had fixed when it was wrapped.

        >>> FineTuneModel(nn.Linear(2, 2), nn.Linear(2, 2)).freeze_backbone().unfreeze_backbone().trainable_groups
        1

        Fixed is what came frozen beside parameters that trained (a table of positions, weights under adapters), and
        what timm's ``reset_classifier`` leaves unused. Whole groups that came frozen train. Quantised weights cannot.
        """
        trainable_parts.warn_of_fixed(self.backbone, self._left_off)
        return self.freeze_backbone(trainable_groups=len(self._layer_groups))

    def regroup(self, *, layer_groups: Sequence[LayerGroup | nn.Module] | None = None) -> FineTuneModel:
        """Find the layer groups anew, or take these, after adapters or parametrizations came into the backbone.

        >>> model = FineTuneModel(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
        >>> _ = model.backbone.append(nn.Linear(2, 2))
        >>> [group.name for group in model.regroup().layer_groups]  # what trains and the way back stay as they are
        ['0', '1']
        """
        self._layer_groups = as_layer_groups(self.backbone, layer_groups)
        return self.train(self.training)

    def train(self, mode: bool = True) -> FineTuneModel:
        """Set the mode, keep what is frozen in eval mode, and drop gradients left on frozen parameters.

        >>> model = FineTuneModel(nn.BatchNorm1d(2), nn.Linear(2, 2)).freeze_backbone().train()
        >>> model.backbone.training, model.classifier.training
        (False, True)
        """
        reshard(self)
        # Set the mode everywhere first: some timm modules clear caches inside train().
        super().train(mode)
        frozen = self._frozen_modules()
        for module in frozen:
            module.train(False)
        freezing.drop_frozen_gradients(self)
        self._guards.settle(self, frozen)
        return self

    def param_groups(
        self,
        lr: float | torch.Tensor,
        *,
        backbone_lr: float | torch.Tensor | None = None,
        weight_decay: float = 0.0,
        layer_decay: float | None = None,
        include_frozen: bool = False,
    ) -> list[dict[str, Any]]:
        """Give optimizer groups of what trains, each parameter once.

        >>> model = FineTuneModel.from_timm("resnet18", num_classes=10).freeze_backbone()
        >>> optimizer = torch.optim.AdamW(model.param_groups(lr=1e-3, weight_decay=0.05))
        >>> [(group["name"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [('classifier', 0.001, 0.05), ('classifier.no_decay', 0.001, 0.0)]

        Biases, 1-d weights and what the backbone's ``no_weight_decay()`` names do not decay.

        Args:
            lr: learning rate of the classifier, and of the backbone without ``backbone_lr``.
            backbone_lr: learning rate of the backbone.
            weight_decay: for all that decays.
            layer_decay: factor of the rate per layer towards the input, as ``timm.optim.param_groups_layer_decay``
                (BEiT); by layer group where timm has no ``group_matcher``.
            include_frozen: the same groups whatever is frozen, for one optimizer through every unfreezing.

        Raises:
            ValueError: nothing trains, a rate is negative, or the backbone gained or lost parameters.
        """
        reshard(self)
        return build_param_groups(
            self.backbone,
            self.classifier,
            self._layer_groups,
            lr=lr,
            backbone_lr=backbone_lr,
            weight_decay=weight_decay,
            layer_decay=layer_decay,
            include_frozen=include_frozen,
        )

    def print_trainable_parameters(self, *, by_name: bool = False) -> None:
        """Print what trains and what does not: a table by layer group, or each parameter by its plain name.

        >>> FineTuneModel(nn.Linear(2, 2, False), nn.Linear(2, 3, False)).print_trainable_parameters(by_name=True)
        Trainable parameter: backbone.weight
        Trainable parameter: classifier.weight
        """
        if by_name:
            named = ((self._reassembly.original_name(name), parameter) for name, parameter in self.named_parameters())
            print(describe_by_name(named))
        else:
            print(describe_by_group(self.backbone, self.classifier, self._layer_groups))

    def frozen_fingerprint(self) -> dict[str, str]:
        """Digest everything that is frozen, parameters and buffers, by state-dict name.

        >>> sorted(FineTuneModel(nn.Linear(2, 2), nn.Linear(2, 2)).freeze_backbone().frozen_fingerprint())
        ['backbone.bias', 'backbone.weight']

        Buffers count where their module belongs in eval. A DTensor counts by its local shard.
        """
        reshard(self)
        return verification.fingerprint(verification.frozen_tensors(self, self._frozen_modules()))

    def frozen_names(self) -> set[str]:
        """Name what ``frozen_fingerprint`` digests, without reading it.

        >>> FineTuneModel(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)).freeze_backbone().frozen_names()
        {'backbone.weight'}
        """
        return set(verification.frozen_tensors(self, self._frozen_modules()))

    def assert_frozen(self) -> AbstractContextManager[None]:
        """Raise AssertionError, naming what moved, unless all that is frozen on entry is bit-equal on exit.

        >>> model = FineTuneModel(nn.Linear(2, 2), nn.Linear(2, 2)).freeze_backbone()
        >>> with model.assert_frozen():
        ...     _ = model.backbone.bias.data.zero_()
        Traceback (most recent call last):
        AssertionError: assert_frozen: 1 of 2 frozen tensors changed...
        """
        return verification.assert_unchanged(self, self._frozen_modules, self._layer_groups)

    def _frozen_modules(self) -> list[nn.Module]:
        return list(freezing.frozen_modules(self, self.backbone, self._layer_groups, norm_eval=self.norm_eval))
