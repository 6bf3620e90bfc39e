"""The classifier of a timm network: find it, remove it, and put it back."""

from __future__ import annotations

from collections.abc import Collection
from types import NoneType
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ..features import entry_width
from .copies import assert_same, eval_copy, isolated, meta_copy, sharing_copy
from .custom import copy_along
from .heads import DistilledClassifier, without_dropout
from .measures import count_classes, dtype_of, measure_features, probe


class TimmReassembly(NamedTuple):
    """Reassembly of a timm network.

    Args:
        paths: the paths of the classifier: one, or two for a network with two heads.
        own_names: the parameters that ``reset_classifier`` removes.
        is_one_layer: whether they are one layer that the network applies to the features last. Then any module can
            take its place, otherwise only the network's own kind of classifier.
        unused_parameters: see ``Reassembly``.
    """

    paths: tuple[str, ...]
    own_names: frozenset[str]
    is_one_layer: bool
    unused_parameters: frozenset[str] = frozenset()

    def reassemble(self, backbone: nn.Module, classifier: nn.Module) -> nn.Module:
        """Put the classifier into a copy of the network, after timm's ``reset_classifier`` made a place for it."""
        plain_names = {self.original_name(f"classifier.{name}") for name, _ in classifier.named_parameters()}
        classifier = without_dropout(classifier)  # it is not part of a timm network
        if not self.is_one_layer and plain_names != self.own_names:
            raise ValueError(
                f"to_module: {type(backbone).__name__} has more in its classifier than one linear layer "
                f"({', '.join(sorted(self.own_names))}), so this {type(classifier).__name__} cannot replace it; keep "
                "the FineTuneModel, or use the network's own classifier, where from_timm keeps it (without num_classes "
                "and classifier)."
            )
        network: Any = backbone
        for path in self.paths:
            network = copy_along(network, path)
        width = entry_width(classifier) or measure_features(backbone)
        num_classes = 0 if isinstance(classifier, nn.Identity) else count_classes(classifier, width)
        with isolated(backbone):
            network.reset_classifier(1 if num_classes is None else num_classes)
        network.num_classes = num_classes
        heads = [classifier]
        if isinstance(classifier, DistilledClassifier):
            heads = [classifier.head, classifier.head_dist]
            network.set_distilled_training(classifier.distilled_training)
        for path, head in zip(self.paths, heads, strict=True):
            place = network.get_submodule(path)
            network.set_submodule(path, _as_convolution(head, place) if isinstance(place, nn.Conv2d) else head)
        return cast(nn.Module, network)

    def original_name(self, name: str) -> str:
        """Remove ``backbone.``, and replace ``classifier`` by its path."""
        part, _, rest = name.partition(".")
        if part == "backbone":
            return rest
        return rest if len(self.paths) > 1 else f"{self.paths[0]}.{rest}"


def locate_head(headed: Any, headless: nn.Module) -> TimmReassembly:
    """Find the classifier of a network by comparing the network with the same one without classifier.

    >>> import timm
    >>> network = timm.create_model("test_resnet")
    >>> locate_head(network, timm.create_model("test_resnet", num_classes=0)).paths
    ('fc',)

    The classifier is a linear layer if the modules around it do nothing. Otherwise it is everything that
    ``reset_classifier`` replaces, including dropout and other modules without parameters.
    """
    own_names = _parameter_names(headed) - _parameter_names(headless)
    path = _common_module(own_names)
    if path:
        replaced = _replaced_module(path, headed, headless)
        if not _counts_alone(headed, path, replaced):
            path = replaced
        place = headed.get_submodule(path)
        return TimmReassembly((path,), own_names, is_one_layer=_is_linear(place))
    heads = headed.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    paths = (next((path for path, inside in headed.named_modules() if inside is head), "") for head in heads)
    return TimmReassembly(tuple(paths), own_names, is_one_layer=not own_names)


def fresh_classifier(network: nn.Module, reassembly: TimmReassembly, width: int, num_classes: int) -> nn.Module:
    """Return the linear classifier that timm has initialized, or a new one if timm's is more than a linear layer.

    >>> import timm
    >>> network = timm.create_model("test_resnet", num_classes=3)
    >>> headless = timm.create_model("test_resnet", num_classes=0)
    >>> fresh_classifier(network, locate_head(network, headless), 96, 3) is network.fc
    True
    """
    if reassembly.is_one_layer:
        return as_linear(network.get_submodule(reassembly.paths[0]))
    if _common_module(reassembly.own_names) not in ("", *reassembly.paths):  # a linear layer behind dropout
        return network.get_submodule(reassembly.paths[0])
    return nn.Linear(width, num_classes, device=next(network.parameters()).device, dtype=dtype_of(network))


def own_classifier(network: Any, headless: nn.Module) -> tuple[nn.Module, TimmReassembly]:
    """Return a network's own classifier, after checking that it gives the same outputs after the headless network.

    >>> import timm
    >>> network = timm.create_model("test_resnet")
    >>> own_classifier(network, timm.create_model("test_resnet", num_classes=0, device="meta"))[0] is network.fc
    True

    Raises:
        ValueError: its outputs differ, or the network is on the meta device.
    """
    kind = type(network).__name__
    remedy = "pass num_classes=... for a new linear classifier, or classifier=... for your own"
    reassembly = locate_head(network, headless)
    if not reassembly.own_names and isinstance(network.get_classifier(), (nn.Identity, NoneType)):  # timm's encoders
        return nn.Identity(), reassembly
    if any(parameter.is_meta for parameter in network.parameters()):
        raise ValueError(f"from_timm: {kind} is on the meta device, so its own classifier cannot be checked; {remedy}.")
    fresh: Any = meta_copy(network)
    fresh.reset_classifier(2)
    if len(reassembly.paths) == 1 and _holds_linear(fresh, reassembly.paths[0]):
        reassembly = reassembly._replace(is_one_layer=True)
    own = _take_classifier(network, reassembly)
    with isolated(network):
        images = probe(network, next(network.parameters()).device)
    training = False
    try:
        for training in (False, True):
            _assert_same_function(network, own, reassembly.paths, images, training=training)
    except _NotOneVectorError as error:
        raise ValueError(
            f"from_timm: the classifier of {kind} is not one that takes one feature vector; {remedy}."
        ) from error
    except (AssertionError, IndexError, RuntimeError) as difference:  # IndexError: a head that takes a feature map
        raise ValueError(
            f"from_timm: after {kind} without its classifier ({', '.join(reassembly.paths)}), that classifier is not "
            f"the same function any more in {'train' if training else 'eval'} mode, because reset_classifier also "
            "removes a norm, dropout or a second head, or because the classifier takes several tokens "
            f"({str(difference).splitlines()[0]}); {remedy}."
        ) from difference
    return own, reassembly


class _NotOneVectorError(Exception):
    """A classifier that is not called exactly once in a forward."""


def _assert_same_function(
    network: Any, own: nn.Module, paths: tuple[str, ...], images: torch.Tensor, *, training: bool
) -> None:
    headed, headless, head = (eval_copy(part).train(training) for part in (network, network, own))
    for part in (*headed.modules(), *headless.modules(), *head.modules()):
        if hasattr(part, "distilled_training"):  # otherwise they return two outputs in train mode
            part.distilled_training = False
    entered: list[torch.Tensor] = []
    for path in paths:
        headed.get_submodule(path).register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    with isolated(network):
        logits = headed(images)
    if len(entered) != len(paths):
        raise _NotOneVectorError
    headless.reset_classifier(0)  # type: ignore[operator]
    with isolated(network):  # the same random state, so that dropout masks are the same
        features = headless(images)
        output = head(features)
    for tensor in entered:
        assert_same(_one_token(tensor, features, logits), features)
    assert_same(output, logits)


def _one_token(entered: torch.Tensor, features: torch.Tensor, logits: Any) -> torch.Tensor:
    """Return a classifier's input as one vector: CLIP's ResNets classify every token and use one of the outputs."""
    if entered.numel() == features.numel() or entered.ndim != 3 or entered.shape[2] != features.shape[1]:
        return entered.reshape_as(features)
    if not isinstance(logits, torch.Tensor) or (logits == logits[:, :1]).all():
        raise AssertionError("its logits are all equal, so the token that is used cannot be identified")
    return min(entered.unbind(1), key=lambda token: (token - features).abs().max().item())


def _take_classifier(network: Any, reassembly: TimmReassembly) -> nn.Module:
    own: list[nn.Module] = [network.get_submodule(path) for path in reassembly.paths]
    if reassembly.is_one_layer:
        return as_linear(own[0])
    # reset_classifier changes some of these in place, so the classifier gets copies that share the tensors.
    own = [sharing_copy(module) for module in own]
    if len(own) == 1:
        return own[0]
    classifier = DistilledClassifier(*own)
    classifier.set_distilled_training(network.distilled_training)
    return classifier.train(network.training)


def _common_module(names: Collection[str]) -> str:
    """Return the path of the smallest module that contains all of these parameters; empty for the root."""
    owners = [name.split(".")[:-1] for name in names]
    depth = 0
    while owners and all(len(owner) > depth for owner in owners) and len({owner[depth] for owner in owners}) == 1:
        depth += 1
    return ".".join(owners[0][:depth]) if owners else ""


def _replaced_module(path: str, headed: nn.Module, headless: nn.Module) -> str:
    """Return the outermost module on a path that is missing or has another type in the headless network."""
    kinds = {name: type(module) for name, module in headless.named_modules()}
    parts = path.split(".")
    prefixes = (".".join(parts[: depth + 1]) for depth in range(len(parts)))
    return next((name for name in prefixes if kinds.get(name) is not type(headed.get_submodule(name))), path)


def _counts_alone(network: nn.Module, path: str, around: str) -> bool:
    """Return whether the module at ``path`` is the only one in the module around it that is not a no-op."""
    for name, module in network.get_submodule(around).named_modules(prefix=around):
        if name == path or name.startswith(f"{path}."):
            continue
        is_container = path.startswith(f"{name}.") and type(module).__module__.startswith(("timm.", "torch.nn."))
        is_off = isinstance(module, nn.Identity) or (isinstance(module, nn.modules.dropout._DropoutNd) and not module.p)
        if not is_container and not is_off:
            return False
    return True


def _holds_linear(network: nn.Module, path: str) -> bool:
    return any(name == path and _is_linear(module) for name, module in network.named_modules())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


def as_linear(layer: nn.Module) -> nn.Module:
    """Convert a 1x1 convolution to the equivalent linear layer on pooled features. It shares the memory.

    >>> as_linear(nn.Conv2d(4, 2, 1))
    Linear(in_features=4, out_features=2, bias=True)
    """
    if not isinstance(layer, nn.Conv2d):
        return layer
    linear = nn.Linear(layer.in_channels, layer.out_channels, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().flatten(1), requires_grad=layer.weight.requires_grad)
    linear.bias = cast(nn.Parameter, layer.bias)
    return linear.train(layer.training)


def _as_convolution(head: nn.Module, place: nn.Conv2d) -> nn.Module:
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"to_module: the network's classifier is a 1x1 convolution, and a {type(head).__name__} cannot replace "
            "it; keep the FineTuneModel."
        )
    place.weight = nn.Parameter(head.weight.detach()[:, :, None, None], requires_grad=head.weight.requires_grad)
    place.bias = head.bias
    return place.train(head.training)


def _parameter_names(module: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in module.named_parameters())
