"""FineTuneModel: a backbone and a classifier as two explicit submodules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from . import freezing
from .distributed import reshard
from .eval_caches import clear_caches_on_load
from .features import classify, detach_from_storage
from .guards.combined import Guards
from .guards.frozen_statistics import release
from .layers import trainable as trainable_parts
from .layers.groups import LayerGroup, as_layer_groups
from .layers.param_groups import build_param_groups
from .report import FrozenReport
from .splitting import Reassembly, SequentialReassembly, Split, split_module, split_timm
from .timm_protocol import TimmProtocol
from .validation import check_module, check_shares_nothing


class FineTuneModel(FrozenReport, TimmProtocol):
    """A backbone and a classifier as two explicit submodules.

    >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> model = FineTuneModel(backbone, nn.Linear(8, 10)).freeze_backbone()
    >>> model(torch.zeros(4, 3, 32, 32)).shape, model.trainable_groups
    (torch.Size([4, 10]), 0)

    A parameter is frozen when its ``requires_grad`` is False; nothing else records it.

    Args:
        backbone: takes all inputs, for images ``(B, 3, H, W)``, and returns features ``(B, num_features)``.
        classifier: takes the features and returns logits ``(B, num_classes)``, or any other output.
        layer_groups: LayerGroups or submodules of the backbone, from input to output. Default: found automatically.
        norm_eval: keep the backbone's running statistics fixed even if its weights train (mmpretrain's name).

    Raises ValueError if the parts share a parameter, or a part is already compiled or wrapped.
    """

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
        self.backbone = backbone
        self.classifier = classifier
        self.training = backbone.training  # a network in eval mode stays in eval mode when it is frozen
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
        """Wrap a timm architecture by name, or a timm network, whose classifier is removed in place.

        >>> FineTuneModel.from_timm("resnet18", num_classes=10).classifier
        Linear(in_features=512, out_features=10, bias=True)

        Without ``num_classes`` and ``classifier`` the network keeps its own classifier and its dropout. Random images
        in eval and in train mode (with the same dropout masks) then check that the split changes no output.

        Args:
            model: an architecture name, or a timm network, which is modified in place.
            num_classes: create a new linear classifier, also with pretrained weights or a ``checkpoint_path``.
            classifier: a module, or a function from the feature width to a module.
            pretrained: load timm's pretrained weights.
            drop_rate: dropout before the classifier, also active if the backbone is frozen. It is a forward pre-hook,
                so state-dict keys do not change.
            layer_groups, norm_eval: as for ``FineTuneModel``.
            **create_model_kwargs: passed to ``timm.create_model``.

        Raises:
            ValueError: the name is unknown, the network has no classifier or no pooling, the width of ``classifier``
                is wrong, or the network's own classifier cannot be kept.
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
        """Wrap a custom network and cut it at the submodule that is its classifier.

        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 10))
        >>> FineTuneModel.from_module(net, net[3], example_input=torch.zeros(1, 3, 2, 2)).classifier is net[3]
        True

        ``net`` still works. It shares its parameters until the model is moved to another dtype or device.

        Args:
            module: the whole network.
            classifier: the submodule object of ``module`` to cut at.
            new_classifier: replaces ``classifier``.
            example_input: one input, or a tuple of several. If given, the cut is checked at construction in both modes.
            layer_groups, norm_eval: as for ``FineTuneModel``.

        Raises ValueError if the network does not contain the classifier exactly once, and in any forward if the network
        processes the output of its classifier.
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
        """Compute features and classify them: images ``(B, 3, H, W)`` to logits ``(B, num_classes)``.

        All arguments are passed to the backbone. Raises ValueError if the classifier cannot take the features.
        """
        self._guards.look_at_forward(self)
        return classify(self.classifier, detach_from_storage(self.backbone(*inputs, **kwargs)))

    def to_module(self) -> nn.Module:
        """Return the original architecture with the trained classifier attached. Parameters are shared.

        >>> network = FineTuneModel.from_timm("resnet18", num_classes=10).to_module()
        >>> type(network).__name__, network.fc
        ('ResNet', Linear(in_features=512, out_features=10, bias=True))

        For ``FineTuneModel(backbone, classifier)`` this is an ``nn.Sequential``. Dropout from ``drop_rate`` is left
        out. If the network's classifier is a 1x1 convolution, its weight is a new Parameter on the same memory: build a
        new optimizer to train it. Raises ValueError if the architecture cannot contain the classifier.
        """
        release(self.modules())
        return self._reassembly.reassemble(self.backbone, self.classifier)

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The backbone's parameters, partitioned into stages or blocks, from input to output.

        >>> FineTuneModel(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)).layer_groups
        (LayerGroup(name='0', parameter_names=('0.weight', '0.bias')),)
        """
        return self._layer_groups

    @property
    def trainable_groups(self) -> int | None:
        """The number of last layer groups that train; None if the trainable parameters are not the last groups.

        >>> FineTuneModel.from_timm("resnet18", num_classes=10).freeze_backbone(trainable_groups=2).trainable_groups
        2
        """
        return trainable_parts.count_trainable_groups(self.backbone, self._layer_groups, self._left_off)

    def freeze_backbone(
        self, *, trainable_groups: int = 0, trainable: Sequence[LayerGroup | nn.Module] | None = None
    ) -> FineTuneModel:
        """Freeze the backbone except its last ``trainable_groups`` layer groups, which are unfrozen.

        >>> model = FineTuneModel.from_timm("resnet18", num_classes=10).freeze_backbone(trainable_groups=1)
        >>> model = model.freeze_backbone(trainable=[model.backbone.layer1])  # surgical fine-tuning, Lee et al. 2023
        >>> model.backbone.layer1.training, model.backbone.layer4.training
        (True, False)

        Sets ``requires_grad`` and modes, drops stale gradients, and returns the model. Adapters are frozen too.

        Args:
            trainable_groups: number of last layer groups that train, 0 to ``len(layer_groups)``.
            trainable: submodules of the backbone or LayerGroups that train, in place of ``trainable_groups``.

        Raises:
            ValueError: the count is out of range, both arguments are given, a part is not in the backbone, or a frozen
                parameter would share memory with a trainable one.
        """
        reshard(self)
        chosen = trainable_parts.choose_parameters(self.backbone, self._layer_groups, trainable_groups, trainable)
        with self._guards.change(self, self._frozen_modules):
            trainable_parts.set_trainable(self.backbone, chosen, self._left_off)
        return self.train(self.training)

    def unfreeze_backbone(self) -> FineTuneModel:
        """Unfreeze the backbone, except parameters that its author had fixed when it was wrapped.

        >>> FineTuneModel(nn.Linear(2, 2), nn.Linear(2, 2)).freeze_backbone().unfreeze_backbone().trainable_groups
        1

        Fixed parameters are those that were frozen next to trainable ones (a position table, the weights under
        adapters), and those that timm's ``reset_classifier`` leaves unused. Layer groups that were frozen as a whole
        are unfrozen. Quantised weights stay frozen, because they cannot train.
        """
        trainable_parts.warn_of_fixed(self.backbone, self._left_off)
        return self.freeze_backbone(trainable_groups=len(self._layer_groups))

    def regroup(self, *, layer_groups: Sequence[LayerGroup | nn.Module] | None = None) -> FineTuneModel:
        """Find the layer groups again, or set them, after adapters or parametrizations were added to the backbone.

        >>> model = FineTuneModel(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
        >>> _ = model.backbone.append(nn.Linear(2, 2))
        >>> [group.name for group in model.regroup().layer_groups]  # requires_grad does not change
        ['0', '1']
        """
        self._layer_groups = as_layer_groups(self.backbone, layer_groups)
        return self.train(self.training)

    def train(self, mode: bool = True) -> FineTuneModel:
        """Set the mode, keep frozen modules in eval mode, and drop gradients left on frozen parameters.

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
        """Return optimizer groups of the trainable parameters, each parameter once.

        >>> model = FineTuneModel.from_timm("resnet18", num_classes=10).freeze_backbone()
        >>> optimizer = torch.optim.AdamW(model.param_groups(lr=1e-3, weight_decay=0.05))
        >>> [(group["name"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [('classifier', 0.001, 0.05), ('classifier.no_decay', 0.001, 0.0)]

        Biases, 1-d weights and the parameters in the backbone's ``no_weight_decay()`` get no weight decay.

        Args:
            lr: learning rate of the classifier, and of the backbone if ``backbone_lr`` is not given.
            backbone_lr: learning rate of the backbone.
            weight_decay: weight decay of all other parameters.
            layer_decay: factor on the learning rate for each layer towards the input, as in
                ``timm.optim.param_groups_layer_decay`` (BEiT); per layer group if timm has no ``group_matcher``.
            include_frozen: include frozen parameters, so that one optimizer works through every unfreezing.

        Raises ValueError if no parameter trains, a rate is negative, or the backbone gained or lost parameters.
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
