"""The place where a network was cut, and the proof, at each call, that the network returns what reached it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

# By the tensors that dynamo traces with: a graph knows no versions, so that nothing is checked when it runs.
_traced_versions: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class _Arrival(NamedTuple):
    """What the cut handed on in one call: each tensor, and the version that it had."""

    tensors: list[Any]
    versions: list[int | None]


class _Calls(threading.local):
    """The arrivals of the forward that runs in this thread; None where none runs."""

    def __init__(self) -> None:
        self.arrivals: list[_Arrival] | None = None

    def __reduce__(self) -> tuple[type[_Calls], tuple[()]]:
        return _Calls, ()


class Cut(nn.Module):
    """Stands where the classifier stood and hands on the features that reach it.

    >>> network = nn.Sequential(nn.Linear(4, 2), Cut("1"), nn.Softmax(dim=1))
    >>> network[1].watch(network)
    >>> network(torch.zeros(1, 4))
    Traceback (most recent call last):
    ...
    ValueError: from_module: the network computes on after its classifier '1' ...

    What is handed on is another tensor object than what arrived, on the same memory. A network that ``watch`` was
    called with has to return this very object, untouched, in each forward: one that applies a softmax to it, or
    returns the features themselves, is not a backbone followed by a classifier. Where the network's forward is compiled
    by itself (``torch.compile(model.backbone)``, not ``torch.compile(model)``), what it does in place is not seen.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.calls = _Calls()

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Hand on the features, past global hooks, which would count the classifier as called twice."""
        return self.forward(*inputs, **keywords)

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """Hand on the features: any shape -> the same values."""
        if len(inputs) != 1 or keywords:
            raise ValueError(
                f"from_module: the network calls its classifier {self.path!r} with {len(inputs)} positional and "
                f"{len(keywords)} keyword arguments, and only one positional can be cut; write the backbone as a "
                "module of its own and use FineTuneModel(backbone, classifier)."
            )
        features = _alias(inputs[0])
        if self.calls.arrivals is not None:
            tensors = _leaves(features)
            self.calls.arrivals.append(_Arrival(tensors, [_version(tensor) for tensor in tensors]))
        return features

    def watch(self, network: nn.Module) -> None:
        """Check each forward of the network; hooks that it has now act before the check, later ones after it."""
        network.register_forward_pre_hook(self.start)
        network.register_forward_hook(self.check)
        network.register_forward_hook(self.release, always_call=True)

    def unwatch(self, network: nn.Module) -> None:
        """Take the check off again."""
        for hooks in (network._forward_pre_hooks, network._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]

    def start(self, network: nn.Module, inputs: Any) -> None:
        """Begin to note what reaches the cut."""
        self.calls.arrivals = []

    def check(self, network: nn.Module, inputs: Any, output: Any) -> None:
        """Raise ValueError unless the network returns what the cut handed on."""
        arrivals = self.calls.arrivals or []
        mode = "train" if network.training else "eval"
        if len(arrivals) != 1:
            raise ValueError(
                f"from_module: in {mode} mode the network calls its classifier {self.path!r} {len(arrivals)} times "
                "in a forward, so there is no one place to cut; write the backbone as a module of its own and use "
                "FineTuneModel(backbone, classifier)."
            )
        returned = _leaves(output)
        handed_on = arrivals[0].tensors
        if len(returned) != len(handed_on) or not all(map(_is_same, returned, handed_on)):
            raise ValueError(self._refusal(mode, output))
        for tensor, version in zip(returned, arrivals[0].versions, strict=True):
            if torch.compiler.is_dynamo_compiling() and isinstance(tensor, torch.Tensor):
                _while_tracing(_compare_version, tensor)
            elif version is not None and tensor._version != version:
                raise ValueError(self._refusal(mode, output))

    def _refusal(self, mode: str, output: Any) -> str:
        """Say what a network that is no backbone followed by a classifier does, and what to do about it."""
        adapt = ""
        if not isinstance(output, torch.Tensor):
            adapt = (
                f"; it returns a {type(output).__name__}, so give from_module a module around it whose forward returns "
                "the classifier's outcome alone (of a transformers model: outputs.logits)"
            )
        return (
            f"from_module: the network computes on after its classifier {self.path!r} in {mode} mode (a softmax, a "
            "reshape, a second output, something in place), or does not return its outcome, which the cut would lose; "
            "move that into the classifier, turn it off (torchvision's auxiliary heads: net.aux_logits = False), or "
            f"write the backbone as a module of its own and use FineTuneModel(backbone, classifier){adapt}."
        )

    def release(self, network: nn.Module, inputs: Any, output: Any) -> None:
        """Hold nothing after a forward, one that failed included."""
        self.calls.arrivals = None

    def __getattr__(self, name: str) -> Any:
        """Say what is wrong when the network reads an attribute of the classifier that is no longer there."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"from_module: the network reads {name!r} of its classifier, which has been cut off; write the "
                "backbone as a module of its own and use FineTuneModel(backbone, classifier)."
            ) from None


def _alias(features: Any) -> Any:
    """Give another object with the same values, whose version counter tells of writes in place."""
    if type(features) in (list, tuple):
        return type(features)(_alias(entry) for entry in features)
    if type(features) is dict:
        return {key: _alias(entry) for key, entry in features.items()}
    if not isinstance(features, torch.Tensor):
        return features
    if torch.compiler.is_compiling():
        return features.view_as(features)
    if features.is_inference():  # these have no version
        with torch.inference_mode(mode=False):
            return features.clone()
    return features.view_as(features) if features.layout == torch.strided else features.clone()


def _leaves(features: Any) -> list[Any]:
    if type(features) is dict:
        features = list(features.values())
    if type(features) in (list, tuple):
        return [leaf for entry in features for leaf in _leaves(entry)]
    return [features]


def _version(leaf: Any) -> int | None:
    """Read how often a tensor was written to; where dynamo traces, note it beside the tensor that it traces with."""
    if not isinstance(leaf, torch.Tensor):
        return None
    if torch.compiler.is_dynamo_compiling():
        _while_tracing(_note_version, leaf)
        return None
    return leaf._version


def _while_tracing(look: Callable[[Any], None], leaf: torch.Tensor) -> None:
    from torch._dynamo.comptime import comptime  # noqa: PLC0415  it takes a second, and is there where dynamo traces

    comptime(look)


def _note_version(context: Any) -> None:
    traced = context.get_local("leaf").as_fake()
    if not traced.is_inference():
        _traced_versions[traced] = traced._version


def _compare_version(context: Any) -> None:
    traced = context.get_local("leaf").as_fake()
    if traced in _traced_versions and traced._version != _traced_versions[traced]:
        raise ValueError(
            "from_module: the network computes on in place after its classifier, which the cut would lose; move that "
            "into the classifier, or write the backbone as a module of its own and use FineTuneModel(backbone, "
            "classifier)."
        )


def _is_same(returned: Any, handed_on: Any) -> bool:
    """Say whether this is the tensor that was handed on, or its alias by a backward hook of a module around the cut."""
    if returned is handed_on:
        return True
    if not isinstance(returned, torch.Tensor) or not isinstance(handed_on, torch.Tensor):
        return False
    if torch.compiler.is_compiling():
        return False
    node, position = returned.grad_fn, returned.output_nr
    while node is not None and type(node).__name__ == "BackwardHookFunctionBackward":
        node, position = node.next_functions[position]
    return node is not None and node is handed_on.grad_fn and position == handed_on.output_nr
