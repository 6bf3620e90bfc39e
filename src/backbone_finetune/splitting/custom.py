"""Split a custom network at the submodule that is its classifier, and reassemble it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import nn

from .copies import eval_copy, isolated, rebind, shallow_copy
from .cut import Cut
from .measures import check_classifier_fits

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Reassembly(Protocol):
    """How a backbone and a classifier become the original network again."""

    @property
    def unused_parameters(self) -> frozenset[str]:
        """The parameters of the backbone that are unused without the network's own classifier."""
        ...

    def reassemble(self, backbone: nn.Module, classifier: nn.Module) -> nn.Module:
        """Build the original network; it shares the parameters of both parts."""
        ...

    def original_name(self, name: str) -> str:
        """Convert a parameter name of the FineTuneModel to that of the original network."""
        ...


class Split(NamedTuple):
    """A network in two parts, and its reassembly."""

    backbone: nn.Module
    classifier: nn.Module
    reassembly: Reassembly


class SequentialReassembly:
    """Reassembly of two modules that were not one network.

    >>> SequentialReassembly().reassemble(nn.Flatten(), nn.Linear(4, 2))[1]
    Linear(in_features=4, out_features=2, bias=True)
    """

    unused_parameters: frozenset[str] = frozenset()

    def reassemble(self, backbone: nn.Module, classifier: nn.Module) -> nn.Module:
        """Return an ``nn.Sequential`` of both parts."""
        return nn.Sequential(backbone, classifier)

    def original_name(self, name: str) -> str:
        """Return the name unchanged: it is clearer than an index in the ``nn.Sequential``."""
        return name


class SubmoduleReassembly(NamedTuple):
    """Reassembly of a network whose classifier was at ``path``.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> SubmoduleReassembly("1").reassemble(replace_submodule(net, "1", nn.Identity()), net[1])[1]
    Linear(in_features=4, out_features=2, bias=True)
    """

    path: str
    unused_parameters: frozenset[str] = frozenset()

    def reassemble(self, backbone: nn.Module, classifier: nn.Module) -> nn.Module:
        """Put the classifier back at its path."""
        network = replace_submodule(backbone, self.path, classifier)
        if isinstance(cut := backbone.get_submodule(self.path), Cut):
            cut.unwatch(network)
        return network

    def original_name(self, name: str) -> str:
        """Remove ``backbone.``, and replace ``classifier`` by its path."""
        part, _, rest = name.partition(".")
        return f"{self.path}.{rest}" if part == "classifier" else rest


def split_module(
    module: nn.Module,
    classifier: nn.Module,
    *,
    new_classifier: nn.Module | None = None,
    example_input: torch.Tensor | tuple[Any, ...] | None = None,
) -> Split:
    """Split a custom network at the submodule that is its classifier.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> split = split_module(net, net[1], example_input=torch.zeros(1, 4))
    >>> split.backbone[1], split.classifier is net[1]
    (Cut(), True)

    Each forward of the backbone checks the cut. With an ``example_input``, copies of the backbone run at once, in eval
    and in train mode.

    Args: see ``FineTuneModel.from_module``.

    Raises:
        ValueError: the classifier is not in the network exactly once. With an ``example_input``, also if the network
            processes the output of its classifier, or if ``new_classifier`` cannot take the features.
    """
    path = _path_of(module, classifier)
    cut = Cut(path)
    backbone = replace_submodule(module, path, cut)
    cut.watch(backbone)
    kept = classifier if new_classifier is None else new_classifier
    if example_input is not None:
        inputs = example_input if isinstance(example_input, tuple) else (example_input,)
        with isolated(backbone):
            features = eval_copy(backbone)(*inputs)
            twin = eval_copy(backbone).train()
            for norm in twin.modules():  # in train mode, a norm raises an error for a batch of one
                norm.train(norm.training and not isinstance(norm, nn.modules.batchnorm._NormBase))
            twin(*inputs)
        check_classifier_fits(kept, features, "from_module")
    return Split(backbone, kept, SubmoduleReassembly(path))


def replace_submodule(network: ModuleT, path: str, replacement: nn.Module) -> ModuleT:
    """Return a copy of a network with another module at ``path``. It shares everything else with the original.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> twin = replace_submodule(net, "1", nn.Identity())
    >>> twin[0] is net[0], twin[1], net[1]
    (True, Identity(), Linear(in_features=4, out_features=2, bias=True))
    """
    twin = copy_along(network, path)
    twin.set_submodule(path, replacement, strict=True)
    return twin


def copy_along(network: ModuleT, path: str) -> ModuleT:
    """Return a shallow copy of a network and of the modules along ``path``, which can be set without side effects.

    >>> net = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2))
    >>> twin = copy_along(net, "0")
    >>> twin[0] is net[0], twin[0][0] is net[0][0], twin[1] is net[1]
    (False, True, True)
    """
    twin = shallow_copy(network)
    copies: dict[int, Any] = {id(network): twin}
    owner: nn.Module = twin
    for child in path.split("."):
        if (inside := owner._modules.get(child)) is None:
            break
        owner._modules[child] = copies[id(inside)] = shallow_copy(inside)
        owner = copies[id(inside)]
    for copied in copies.values():  # after `self.forward = self.implementation`, the copy would run the original
        copied.__dict__.update({name: rebind(value, copies) for name, value in vars(copied).items()})
    return twin


def _path_of(module: nn.Module, classifier: nn.Module) -> str:
    paths = [path for path, inside in module.named_modules(remove_duplicate=False) if inside is classifier]
    kind, owner = type(classifier).__name__, type(module).__name__
    if not paths:
        raise ValueError(
            f"from_module: the classifier ({kind}) is not a submodule of the network ({owner}); pass the submodule "
            "object, e.g. FineTuneModel.from_module(net, net.fc), and a replacement for it as new_classifier=..."
        )
    if paths[0] == "":
        raise ValueError(
            f"from_module: the classifier is the network itself ({owner}); pass one of its submodules, e.g. net.fc."
        )
    if len(paths) > 1:
        raise ValueError(
            f"from_module: the classifier ({kind}) occurs {len(paths)} times in the network ({', '.join(paths)}), so "
            "there is no single place to cut; use a separate module in each place, or write the backbone as a module "
            "and use FineTuneModel(backbone, classifier)."
        )
    return str(paths[0])
