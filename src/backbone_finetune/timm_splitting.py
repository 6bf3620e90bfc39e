"""A timm network to (backbone, classifier) and back, by timm's own `reset_classifier`."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models import get_model_input_config
from torch import nn

from .architectures import check_architecture
from .probing import assert_same, meta_shadow, quiet, refuse_misfit, shadow
from .splitting import Split, copy_along

_WRITE_IT = "wrap it yourself: FineTuneModel(backbone, classifier), with pooling at the end of the backbone"


class DistilledClassifier(nn.Module):
    """Two heads on one embedding, as in timm's levit, swiftformer, efficientformer and efficientformer_v2.

    >>> DistilledClassifier(nn.Linear(4, 2), nn.Linear(4, 2))(torch.zeros(8, 4)).shape
    torch.Size([8, 2])

    Their mean, or both as a tuple when training after `set_distilled_training()`: (B, C) -> (B, num_classes).
    """

    def __init__(self, head: nn.Module, head_dist: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.head_dist = head_dist
        self.distilled_training = False

    def set_distilled_training(self, enable: bool = True) -> None:
        """Return both heads' logits in train mode."""
        self.distilled_training = enable

    def forward(self, features: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Classify features."""
        logits, distilled = self.head(features), self.head_dist(features)
        if self.distilled_training and self.training:
            return logits, distilled
        return cast(torch.Tensor, (logits + distilled) / 2)


class DropoutClassifier(nn.Module):
    """A classifier behind dropout, which lives on above a frozen backbone.

    >>> DropoutClassifier(0.2, nn.Linear(4, 2))(torch.zeros(8, 4)).shape
    torch.Size([8, 2])
    """

    def __init__(self, drop_rate: float, classifier: nn.Module) -> None:
        super().__init__()
        self.dropout = nn.Dropout(drop_rate)
        self.classifier = classifier

    def forward(self, features: torch.Tensor) -> Any:
        """Drop features, then classify them."""
        return self.classifier(self.dropout(features))


class TimmWayBack(NamedTuple):
    """The way back for a timm network whose classifier stood at `paths`: two where it has two heads.

    `own_names` are the parameters that `reset_classifier` takes away. Where they are one layer, the network applies
    that layer to the features and returns the outcome, so that any module can stand there; elsewhere only the
    network's own kind of classifier can.
    """

    paths: tuple[str, ...]
    own_names: frozenset[str]
    is_one_layer: bool
    has_dropout: bool = False

    def join(self, backbone: nn.Module, classifier: nn.Module) -> nn.Module:
        """Put the classifier into a copy of the network, in which timm has made the place for it."""
        plain_names = {self.plain_name(f"classifier.{name}") for name, _ in classifier.named_parameters()}
        if isinstance(classifier, DropoutClassifier):  # it acts in training alone, and is no part of a timm network
            classifier = classifier.classifier
        if not self.is_one_layer and plain_names != self.own_names:
            raise ValueError(
                f"to_module: {type(backbone).__name__} has more in its classifier than one linear layer "
                f"({', '.join(sorted(self.own_names))}) and cannot hold this {type(classifier).__name__}; keep the "
                "FineTuneModel, or start from the network's own classifier (num_classes and classifier left out)."
            )
        network: Any = backbone
        for path in self.paths:
            network = copy_along(network, path)
        with quiet(backbone):
            network.reset_classifier(0 if isinstance(classifier, nn.Identity) else count_classes(classifier) or 1)
        heads = [classifier]
        if isinstance(classifier, DistilledClassifier):
            heads = [classifier.head, classifier.head_dist]
            network.set_distilled_training(classifier.distilled_training)
        for path, head in zip(self.paths, heads, strict=True):
            place = network.get_submodule(path)
            network.set_submodule(path, _as_convolution(head, place) if isinstance(place, nn.Conv2d) else head)
        return cast(nn.Module, network)

    def plain_name(self, name: str) -> str:
        """Drop `backbone.`, and name the classifier by its path."""
        part, _, rest = name.partition(".")
        if part == "backbone":
            return rest
        if self.has_dropout:
            rest = rest.removeprefix("classifier.")
        return rest if len(self.paths) > 1 else f"{self.paths[0]}.{rest}"


def split_timm(
    model: str | nn.Module,
    num_classes: int | None,
    *,
    classifier: nn.Module | Callable[[int], nn.Module] | None,
    pretrained: bool,
    drop_rate: float | None,
    create_model_kwargs: dict[str, Any],
) -> Split:
    """Build or take over a timm network, take its classifier off, and choose the one that stands on it.

    >>> split = split_timm("resnet18", 10, classifier=None, pretrained=False, drop_rate=None, create_model_kwargs={})
    >>> split.classifier, split.backbone.fc
    (Linear(in_features=512, out_features=10, bias=True), Identity())

    Nothing of a network that is refused has been changed. Raises ValueError where it cannot be split.
    """
    if num_classes is not None and classifier is not None:
        raise ValueError("from_timm: num_classes and classifier were both given; pass one of them.")
    if num_classes is not None:
        if isinstance(num_classes, bool) or not hasattr(num_classes, "__index__") or num_classes < 1:
            raise ValueError(
                f"from_timm: num_classes={num_classes!r}; pass a whole number from 1, or leave it out to keep the own "
                "one."
            )
        num_classes = operator.index(num_classes)
    if isinstance(model, str):
        network = _create(model, num_classes, pretrained, drop_rate, create_model_kwargs)
    else:
        network = model
        _refuse_arguments_beside_module(pretrained, drop_rate, create_model_kwargs)
    _refuse_without_classifier(network)

    headless = meta_shadow(network)
    never_trained = _turned_off_by_reset(headless)
    width = _measure_width(network, headless)
    chosen: nn.Module
    if num_classes is None and classifier is None:
        chosen, way_back = _own_classifier(network, headless)
        own_classes = getattr(network, "num_classes", None)
    else:
        headed = meta_shadow(network)
        headed.reset_classifier(num_classes or 2)
        way_back = _find_way_back(headed, headless)
        own_classes = None
        if num_classes is not None:
            has_pretrained_one = pretrained and network.pretrained_cfg["num_classes"] == num_classes
            if has_pretrained_one or isinstance(model, nn.Module):
                network.reset_classifier(num_classes)
            chosen = _fresh_linear(network, way_back, width, num_classes)
        else:
            assert classifier is not None
            chosen = classifier if isinstance(classifier, nn.Module) else _call(classifier, width)
    example = next(network.parameters())
    refuse_misfit(chosen, torch.zeros(2, width, device=example.device, dtype=example.dtype), "from_timm")
    network.reset_classifier(0)
    if getattr(network, "distilled_training", False):  # else it gives its features twice; the classifier has the switch
        network.set_distilled_training(False)
    if drop_rate is not None:
        chosen = DropoutClassifier(drop_rate, chosen)
        way_back = way_back._replace(has_dropout=True)
    return Split(network, chosen, way_back, never_trained=never_trained, own_classes=own_classes)


def count_classes(classifier: nn.Module) -> int | None:
    """Read off how many classes a classifier tells apart, None where it does not say.

    >>> count_classes(nn.Sequential(nn.ReLU(), nn.Linear(4, 3))), count_classes(nn.ReLU())
    (3, None)
    """
    if isinstance(classifier, DropoutClassifier):
        return count_classes(classifier.classifier)
    if isinstance(classifier, DistilledClassifier):
        return count_classes(classifier.head)
    if isinstance(classifier, nn.Sequential) and len(classifier):
        return count_classes(classifier[-1])
    said = getattr(classifier, "num_classes", getattr(classifier, "out_features", None))
    return said if isinstance(said, int) else None


def _create(
    name: str, num_classes: int | None, pretrained: bool, drop_rate: float | None, create_model_kwargs: dict[str, Any]
) -> Any:
    if ":" not in name:  # else it is on the hub or in a folder, where timm looks for itself
        check_architecture(name)
    if create_model_kwargs.get("features_only"):
        raise ValueError(f"from_timm: features_only=True gives maps, not one vector per picture; {_WRITE_IT}.")
    if create_model_kwargs.get("global_pool") == "":
        raise ValueError(f"from_timm: global_pool='' leaves the features unpooled; leave it out, or {_WRITE_IT}.")
    if num_classes is not None:
        create_model_kwargs = {**create_model_kwargs, "num_classes": num_classes}
    if drop_rate is not None:
        create_model_kwargs = {**create_model_kwargs, "drop_rate": 0.0}
    return timm.create_model(name, pretrained=pretrained, **create_model_kwargs)


def _refuse_arguments_beside_module(
    pretrained: bool, drop_rate: float | None, create_model_kwargs: dict[str, Any]
) -> None:
    beside = [*create_model_kwargs, *["pretrained"] * pretrained, *["drop_rate"] * (drop_rate is not None)]
    if beside:
        raise ValueError(
            f"from_timm: {', '.join(beside)} beside a network that is built already; give these to "
            "timm.create_model, or pass the architecture's name (dropout: classifier=lambda width: "
            "nn.Sequential(nn.Dropout(0.2), nn.Linear(width, num_classes)))."
        )


def _refuse_without_classifier(network: nn.Module) -> None:
    if not (hasattr(network, "reset_classifier") and hasattr(network, "get_classifier")):
        raise ValueError(
            f"from_timm: {type(network).__name__} has no classifier to take off (no reset_classifier: an encoder, a "
            f"features_only model, or no timm network); use FineTuneModel.from_module(net, net.fc), or {_WRITE_IT}."
        )


def _measure_width(network: Any, headless: nn.Module) -> int:
    features: object
    try:
        features = headless(_probe(network, "meta"))
    except RuntimeError:  # some operator knows no shapes without values; its real error, if any, comes from here
        twin: Any = shadow(network)
        twin.reset_classifier(0)
        with quiet(network):
            features = twin(_probe(network, next(network.parameters()).device))
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        got = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise ValueError(
            f"from_timm: without its classifier {type(network).__name__} gives {got}, not (B, width): it does not pool "
            f"(global_pool=''); build it with pooling, or {_WRITE_IT}."
        )
    return features.shape[1]


def _probe(network: nn.Module, device: str | torch.device) -> torch.Tensor:
    """Two pictures of the size that the network is built for."""
    return torch.randn(2, *get_model_input_config(network)["input_size"], device=device, dtype=_dtype_of(network))


def _dtype_of(network: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())


def _turned_off_by_reset(twin: Any) -> frozenset[str]:
    """Take the classifier off, and see what that freezes, since nothing uses it any more (efficientvim's `weights`)."""
    able = {name for name, p in twin.named_parameters() if p.is_floating_point() or p.is_complex()}
    for name in able:
        twin.get_parameter(name).requires_grad_(True)
    twin.reset_classifier(0)
    return frozenset(name for name, p in twin.named_parameters() if name in able and not p.requires_grad)


def _find_way_back(headed: Any, headless: nn.Module) -> TimmWayBack:
    own_names = _parameter_names(headed) - _parameter_names(headless)
    path = _common_module(own_names)
    if path:
        place = headed.get_submodule(path)
        return TimmWayBack((path,), own_names, is_one_layer=_is_linear(place))
    heads = headed.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    paths = (next((path for path, inside in headed.named_modules() if inside is head), "") for head in heads)
    return TimmWayBack(tuple(paths), own_names, is_one_layer=not own_names)


def _own_classifier(network: Any, headless: nn.Module) -> tuple[nn.Module, TimmWayBack]:
    """Take a network's own classifier, proved on a probe to be the same function behind the headless network."""
    kind = type(network).__name__
    remedy = "pass num_classes=... for a fresh linear classifier, or classifier=... for one of your own"
    way_back = _find_way_back(network, headless)
    if not way_back.own_names:  # an encoder as timm ships it: its classifier is no layer at all
        return nn.Identity(), way_back
    if any(parameter.is_meta for parameter in network.parameters()):
        raise ValueError(
            f"from_timm: on the meta device no value can prove that {kind} keeps its classifier; {remedy}."
        )
    entered: list[torch.Tensor] = []
    with quiet(network):
        probe = _probe(network, next(network.parameters()).device)
        twin = shadow(network)
        for path in way_back.paths:
            twin.get_submodule(path).register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        logits = twin(probe)
        if len(entered) != len(way_back.paths):
            raise ValueError(f"from_timm: the classifier of {kind} is not one that takes one feature vector; {remedy}.")
        headless_twin = shadow(network)
        headless_twin.reset_classifier(0)
        features = headless_twin(probe)
        own = _take_classifier(network, way_back)
        try:
            for tensor in entered:
                assert_same(_one_token(tensor, features, logits), features)
            assert_same(shadow(own)(features), logits)
        except (AssertionError, IndexError, RuntimeError) as difference:  # IndexError: a head that wants a map
            raise ValueError(
                f"from_timm: behind {kind} without its classifier ({', '.join(way_back.paths)}) that classifier is not "
                f"the same function any more, because a norm or a second head goes with it or more tokens enter it "
                f"({str(difference).splitlines()[0]}); {remedy}."
            ) from difference
    return own, way_back


def _one_token(entered: torch.Tensor, features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """What enters a classifier, as one vector: CLIP's ResNets classify every token, and take one of the outcomes."""
    if entered.numel() == features.numel() or entered.ndim != 3 or entered.shape[2] != features.shape[1]:
        return entered.reshape_as(features)
    if (logits == logits[:, :1]).all():
        raise AssertionError("its logits are all the same, and do not tell which token counts")
    return min(entered.unbind(1), key=lambda token: (token - features).abs().max().item())


def _take_classifier(network: Any, way_back: TimmWayBack) -> nn.Module:
    own = [network.get_submodule(path) for path in way_back.paths]
    if way_back.is_one_layer:
        return _as_linear(own[0])
    # reset_classifier empties some of these in place, so the classifier gets modules of its own on the same tensors.
    tensors = [tensor for module in own for tensor in (*module.parameters(), *module.buffers())]
    own = copy.deepcopy(own, {id(tensor): tensor for tensor in tensors})
    if len(own) == 1:
        return cast(nn.Module, own[0])
    classifier = DistilledClassifier(*own)
    classifier.set_distilled_training(network.distilled_training)
    return classifier.train(network.training)


def _fresh_linear(network: nn.Module, way_back: TimmWayBack, width: int, num_classes: int) -> nn.Module:
    if way_back.is_one_layer:  # as timm has initialised it
        return _as_linear(network.get_submodule(way_back.paths[0]))
    return nn.Linear(width, num_classes, device=next(network.parameters()).device, dtype=_dtype_of(network))


def _call(build: Callable[[int], nn.Module], width: int) -> nn.Module:
    if not callable(build):
        raise TypeError(
            f"from_timm: classifier={build!r}; pass a module, or a function from the feature width to a module."
        )
    classifier = build(width)
    if not isinstance(classifier, nn.Module):
        raise TypeError(
            f"from_timm: classifier({width}) gave a {type(classifier).__name__}; pass a module, or a function from the "
            "feature width to a module."
        )
    return classifier


def _common_module(names: Collection[str]) -> str:
    """The smallest module that holds all of these parameters, an empty name where that is the root."""
    owners = [name.split(".")[:-1] for name in names]
    depth = 0
    while owners and all(len(owner) > depth for owner in owners) and len({owner[depth] for owner in owners}) == 1:
        depth += 1
    return ".".join(owners[0][:depth]) if owners else ""


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


def _as_linear(layer: nn.Module) -> nn.Module:
    """A 1x1 convolution as the linear layer that it is on a pooled picture, on the same memory."""
    if not isinstance(layer, nn.Conv2d):
        return layer
    linear = nn.Linear(layer.in_channels, layer.out_channels, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().flatten(1), requires_grad=layer.weight.requires_grad)
    linear.bias = cast(nn.Parameter, layer.bias)
    return linear.train(layer.training)


def _as_convolution(head: nn.Module, place: nn.Conv2d) -> nn.Module:
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"to_module: the network's classifier is a 1x1 convolution, and a {type(head).__name__} cannot stand "
            "there; keep the FineTuneModel."
        )
    place.weight = nn.Parameter(head.weight.detach()[:, :, None, None], requires_grad=head.weight.requires_grad)
    place.bias = head.bias
    return place.train(head.training)


def _parameter_names(module: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in module.named_parameters())
