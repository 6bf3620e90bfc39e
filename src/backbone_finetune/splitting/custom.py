"""A custom network to (backbone, classifier) and back, cut at the very submodule that is its classifier."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import nn

from .copies import check_classifier_fits, eval_copy, isolated

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Reassembly(Protocol):
    """How a split network becomes the plain one again."""

    def reassemble(self, backbone: nn.Module, classifier: nn.Module) -> nn.Module:
        """Build the plain network; it shares the parameters of both parts."""
        ...

    def original_name(self, name: str) -> str:
        """Translate a parameter name of the FineTuneModel into that of the plain network."""
        ...


class Split(NamedTuple):
    """A network in two parts, and the way back."""

    backbone: nn.Module
    classifier: nn.Module
    reassembly: Reassembly
    proof: CutProof | None = None
    unused_parameters: frozenset[str] = frozenset()
    own_classes: int | None = None


class SequentialReassembly:
    """The way back for two modules that never were one network.

    >>> SequentialReassembly().reassemble(nn.Flatten(), nn.Linear(4, 2))[1]
    Linear(in_features=4, out_features=2, bias=True)
    """

    def reassemble(self, backbone: nn.Module, classifier: nn.Module) -> nn.Module:
        """Chain both parts."""
        return nn.Sequential(backbone, classifier)

    def original_name(self, name: str) -> str:
        """Keep the name, which says more than the index in the chain."""
        return name


class SubmoduleReassembly(NamedTuple):
    """The way back for a network whose classifier stood at `path`.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> SubmoduleReassembly("1").reassemble(replace_submodule(net, "1", nn.Identity()), net[1])[1]
    Linear(in_features=4, out_features=2, bias=True)
    """

    path: str

    def reassemble(self, backbone: nn.Module, classifier: nn.Module) -> nn.Module:
        """Put the classifier where it stood."""
        return replace_submodule(backbone, self.path, classifier)

    def original_name(self, name: str) -> str:
        """Drop `backbone.`, and name the classifier by its path."""
        part, _, rest = name.partition(".")
        return f"{self.path}.{rest}" if part == "classifier" else rest


class CutProof:
    """The proof, once per mode, that a network returns the very tensor that reaches its cut.

    >>> proof = CutProof("fc")
    >>> proof.start()
    >>> features = torch.zeros(1, 2)
    >>> proof.reach(features)
    >>> proof.finish(features.softmax(dim=1), training=False)
    Traceback (most recent call last):
    ...
    ValueError: from_module: the network computes on after its classifier 'fc' ...
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.unproved = {True, False}
        self.watching = False
        self.reached: list[Any] = []
        self.before: int | torch.Tensor | None = None

    def start(self) -> None:
        """Watch what reaches the cut in the next forward."""
        self.reached.clear()
        self.watching = True

    def reach(self, features: Any) -> None:
        """Remember what reached the cut, and what it was, as the network may go on in place."""
        self.reached.append(features)
        if torch.compiler.is_compiling() or not isinstance(features, torch.Tensor):
            self.before = None
        else:  # tensors of the inference mode have no version
            self.before = features.clone() if features.is_inference() else features._version

    def finish(self, output: object, *, training: bool) -> None:
        """Compare what the network returned; raise ValueError when that is not what reached the cut."""
        reached = list(self.reached)
        self.reached.clear()
        self.watching = False
        mode = "train" if training else "eval"
        if len(reached) != 1:
            raise ValueError(
                f"from_module: in {mode} mode the network calls its classifier {self.path!r} {len(reached)} times "
                "in a forward, so there is no one place to cut; write the backbone as a module of its own and use "
                "FineTuneModel(backbone, classifier)."
            )
        before, self.before = self.before, None
        if output is not reached[0] or not _is_as_it_was(output, before):
            raise ValueError(
                f"from_module: the network computes on after its classifier {self.path!r} in {mode} mode (a softmax, "
                "a reshape, a second output, something in place), which the cut would lose; move that into the "
                "classifier, or write the "
                "backbone as a module of its own and use FineTuneModel(backbone, classifier)."
            )
        if not torch.compiler.is_compiling():  # what a compiler has proved holds for its own graph
            self.unproved.discard(training)


def _is_as_it_was(features: Any, before: int | torch.Tensor | None) -> bool:
    if isinstance(before, torch.Tensor):
        return torch.allclose(features, before, rtol=0, atol=0, equal_nan=True)
    return before is None or bool(features._version == before)


class Cut(nn.Module):
    """Stands where the classifier stood and hands on what reaches it.

    >>> Cut(CutProof("fc"))(torch.zeros(1, 2)).shape
    torch.Size([1, 2])
    """

    def __init__(self, proof: CutProof) -> None:
        super().__init__()
        self.proof = proof

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """Hand on the features: any shape -> the same tensor."""
        if len(inputs) != 1 or keywords:
            raise ValueError(
                f"from_module: the network calls its classifier {self.proof.path!r} with {len(inputs)} positional and "
                f"{len(keywords)} keyword arguments, and only one positional can be cut; write the backbone as a "
                "module of its own and use FineTuneModel(backbone, classifier)."
            )
        if self.proof.watching:
            self.proof.reach(inputs[0])
        return inputs[0]

    def __getattr__(self, name: str) -> Any:
        """Say what is wrong when the network reads an attribute of the classifier that is no longer there."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"from_module: the network reads {name!r} of its classifier, which has been cut off; write the "
                "backbone as a module of its own and use FineTuneModel(backbone, classifier)."
            ) from None


def split_module(
    module: nn.Module,
    classifier: nn.Module,
    *,
    new_classifier: nn.Module | None = None,
    example_input: torch.Tensor | tuple[Any, ...] | None = None,
) -> Split:
    """Cut a custom network at the very submodule that is its classifier.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> split = split_module(net, net[1], example_input=torch.zeros(1, 4))
    >>> split.backbone[1], split.classifier is net[1]
    (Cut(), True)

    Raises ValueError when the classifier is not in the network exactly once, or, given an `example_input`, when the
    network computes on after it or `new_classifier` cannot take the features.
    """
    path = _path_of(module, classifier)
    proof = CutProof(path)
    backbone = replace_submodule(module, path, Cut(proof))
    kept = classifier if new_classifier is None else new_classifier
    if example_input is not None:
        twin = eval_copy(backbone)
        its_cut = twin.get_submodule(path)
        assert isinstance(its_cut, Cut)
        inputs = example_input if isinstance(example_input, tuple) else (example_input,)
        with isolated(backbone):
            its_cut.proof.start()
            features = twin(*inputs)
            its_cut.proof.finish(features, training=False)
        proof.unproved.discard(False)
        check_classifier_fits(kept, features, "from_module")
    return Split(backbone, kept, SubmoduleReassembly(path), proof)


def replace_submodule(network: ModuleT, path: str, replacement: nn.Module) -> ModuleT:
    """Copy a network with another module at `path`; everything else is shared with the original, which still runs.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> twin = replace_submodule(net, "1", nn.Identity())
    >>> twin[0] is net[0], twin[1], net[1]
    (True, Identity(), Linear(in_features=4, out_features=2, bias=True))
    """
    twin = copy_along(network, path)
    twin.set_submodule(path, replacement, strict=True)
    return twin


def copy_along(network: ModuleT, path: str) -> ModuleT:
    """Copy a network and the modules that stand along `path`, shallowly: what is set there leaves the original alone.

    >>> net = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2))
    >>> twin = copy_along(net, "0")
    >>> twin[0] is net[0], twin[0][0] is net[0][0], twin[1] is net[1]
    (False, True, True)
    """
    twin = _shallow_copy(network)
    child, _, rest = path.partition(".")
    inside = twin._modules.get(child)
    if inside is not None:
        twin._modules[child] = copy_along(inside, rest)
    return twin


def _shallow_copy(module: ModuleT) -> ModuleT:
    twin = copy.copy(module)
    # Parameters and buffers stay in step, children and hooks become the copy's own.
    for name, value in vars(module).items():
        if name == "_modules" or (name.startswith("_") and "_hooks" in name and isinstance(value, dict)):
            twin.__dict__[name] = value.copy()
    return twin


def _path_of(module: nn.Module, classifier: nn.Module) -> str:
    paths = [path for path, inside in module.named_modules(remove_duplicate=False) if inside is classifier]
    kind, owner = type(classifier).__name__, type(module).__name__
    if not paths:
        raise ValueError(
            f"from_module: the classifier ({kind}) is not a submodule of the network ({owner}); pass the very object, "
            f"e.g. FineTuneModel.from_module(net, net.fc), and a replacement for it as new_classifier=..."
        )
    if paths[0] == "":
        raise ValueError(
            f"from_module: the classifier is the network itself ({owner}); pass one of its submodules, e.g. net.fc."
        )
    if len(paths) > 1:
        raise ValueError(
            f"from_module: the classifier ({kind}) occurs {len(paths)} times in the network ({', '.join(paths)}), so "
            "there is no one place to cut; give each place a module of its own, or write the backbone as a module "
            "and use FineTuneModel(backbone, classifier)."
        )
    return str(paths[0])
