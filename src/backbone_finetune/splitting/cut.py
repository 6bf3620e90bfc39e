"""The module that replaces a classifier, and checks in each forward that the network returns its features."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

# Keyed by the tensors that dynamo traces with. A graph has no tensor versions, so the check runs while tracing only.
_traced_versions: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class _Arrival(NamedTuple):
    """The tensors that the cut returned in one call, and their versions."""

    tensors: list[Any]
    versions: list[int | None]


class _Calls(threading.local):
    """The arrivals of the forward that runs in this thread; None if none runs."""

    def __init__(self) -> None:
        self.arrivals: list[_Arrival] | None = None

    def __reduce__(self) -> tuple[type[_Calls], tuple[()]]:
        return _Calls, ()


class Cut(nn.Module):
    """Replaces the classifier of a network and returns the features that it is called with.

    >>> network = nn.Sequential(nn.Linear(4, 2), Cut("1"), nn.Softmax(dim=1))
    >>> network[1].watch(network)
    >>> network(torch.zeros(1, 4))
    Traceback (most recent call last):
    ...
    ValueError: from_module: the network processes the output of its classifier '1' ...

    It returns a new tensor object on the same memory. After ``watch(network)``, the network must return this object,
    unmodified, in each forward: a network that applies a softmax to it, or returns the features themselves, is not a
    backbone followed by a classifier. If the backbone alone is compiled (``torch.compile(model.backbone)``, not
    ``torch.compile(model)``), in-place operations after the cut are not detected.

    Args:
        path: the path of the classifier, for error messages.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.calls = _Calls()

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Return the features without global hooks, which would count two calls of the classifier."""
        return self.forward(*inputs, **keywords)

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """Return the features, of any shape, unchanged."""
        if len(inputs) != 1 or keywords:
            raise ValueError(
                f"from_module: the network calls its classifier {self.path!r} with {len(inputs)} positional and "
                f"{len(keywords)} keyword arguments, and only one positional argument is supported; write the backbone "
                "as a separate module and use FineTuneModel(backbone, classifier)."
            )
        features = _alias(inputs[0])
        if self.calls.arrivals is not None:
            tensors = _leaves(features)
            self.calls.arrivals.append(_Arrival(tensors, [_version(tensor) for tensor in tensors]))
        return features

    def watch(self, network: nn.Module) -> None:
        """Check each forward of the network. Its existing hooks run before the check, later ones after it."""
        network.register_forward_pre_hook(self.start)
        network.register_forward_hook(self.check)
        network.register_forward_hook(self.release, always_call=True)

    def unwatch(self, network: nn.Module) -> None:
        """Remove the check."""
        for hooks in (network._forward_pre_hooks, network._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]

    def start(self, network: nn.Module, inputs: Any) -> None:
        """Start recording calls of the cut."""
        self.calls.arrivals = []

    def check(self, network: nn.Module, inputs: Any, output: Any) -> None:
        """Raise ValueError unless the network returns exactly what the cut returned."""
        arrivals = self.calls.arrivals or []
        mode = "train" if network.training else "eval"
        if len(arrivals) != 1:
            raise ValueError(
                f"from_module: in {mode} mode the network calls its classifier {self.path!r} {len(arrivals)} times "
                "in a forward, so there is no single place to cut; write the backbone as a separate module and use "
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
        """Describe why the network is not a backbone followed by a classifier, and the remedies."""
        adapt = ""
        if not isinstance(output, torch.Tensor):
            adapt = (
                f"; it returns a {type(output).__name__}, so wrap it in a module whose forward returns the output of "
                "the classifier alone (of a transformers model: outputs.logits)"
            )
        return (
            f"from_module: the network processes the output of its classifier {self.path!r} in {mode} mode (a softmax, "
            "a reshape, a second output, an in-place operation), or does not return it, and the cut would lose that; "
            "move it into the classifier, turn it off (torchvision's auxiliary heads: net.aux_logits = False), or "
            f"write the backbone as a separate module and use FineTuneModel(backbone, classifier){adapt}."
        )

    def release(self, network: nn.Module, inputs: Any, output: Any) -> None:
        """Release the tensors after a forward, also if it failed."""
        self.calls.arrivals = None

    def __getattr__(self, name: str) -> Any:
        """Explain the error when the network reads an attribute of the removed classifier."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"from_module: the network reads {name!r} of its classifier, which was removed; write the "
                "backbone as a separate module and use FineTuneModel(backbone, classifier)."
            ) from None


def _alias(features: Any) -> Any:
    """Return a new object with the same values, whose version counter detects in-place writes."""
    if type(features) in (list, tuple):
        return type(features)(_alias(entry) for entry in features)
    if type(features) is dict:
        return {key: _alias(entry) for key, entry in features.items()}
    if not isinstance(features, torch.Tensor):
        return features
    if torch.compiler.is_compiling():
        return features.view_as(features)
    if features.is_inference():  # inference tensors have no version
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
    """Return the version of a tensor. While dynamo traces, store it by the traced tensor instead."""
    if not isinstance(leaf, torch.Tensor):
        return None
    if torch.compiler.is_dynamo_compiling():
        _while_tracing(_note_version, leaf)
        return None
    return leaf._version


def _while_tracing(look: Callable[[Any], None], leaf: torch.Tensor) -> None:
    from torch._dynamo.comptime import comptime  # noqa: PLC0415  a slow import, already done while dynamo traces

    comptime(look)


def _note_version(context: Any) -> None:
    traced = context.get_local("leaf").as_fake()
    if not traced.is_inference():
        _traced_versions[traced] = traced._version


def _compare_version(context: Any) -> None:
    traced = context.get_local("leaf").as_fake()
    if traced in _traced_versions and traced._version != _traced_versions[traced]:
        raise ValueError(
            "from_module: the network modifies the output of its classifier in place, and the cut would lose that; "
            "move it into the classifier, or write the backbone as a separate module and use FineTuneModel(backbone, "
            "classifier)."
        )


def _is_same(returned: Any, handed_on: Any) -> bool:
    """Return whether both are one tensor, or an alias created by a full backward hook of a module around the cut."""
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
