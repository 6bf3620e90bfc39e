"""A twin of a network, in which the calls of frozen modules can be recorded and answered."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..splitting.cut import Cut


class Call(NamedTuple):
    """One call of a frozen module in a forward: its path, and how many calls of it came before."""

    path: str
    earlier: int

    def __str__(self) -> str:
        return f"{self.path} (call {self.earlier + 1})" if self.earlier else self.path


class Answer(Protocol):
    """What to do where a frozen module is called."""

    def __call__(self, call: Call, compute: Callable[[], Any]) -> Any:
        """Give what the call returns; `compute` lets the module compute it."""
        ...


class Twin(nn.Module):
    """A copy of a network that shares all parameters, buffers, hooks and attributes, and intercepts frozen modules.

    >>> network = nn.Sequential(nn.Linear(2, 2).requires_grad_(False).eval(), nn.Linear(2, 2))
    >>> twin = Twin(network)
    >>> twin.answering(lambda call, compute: print(call) or compute(), torch.ones(1, 2)).shape
    0
    torch.Size([1, 2])

    Frozen is a module in eval whose subtree has no parameter that trains. Modules with nothing frozen inside are the
    network's own; those above frozen ones are copies, brought up to date before each run. Where a frozen module is
    called by another one, only the outer call is intercepted.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.intercepted: dict[str, nn.Module] = {}
        self.answered: set[str] = set()  # paths that a forward outside `answering` must not compute
        self._local = threading.local()
        self._original = (network,)  # in a tuple, so that it is no submodule
        self._copies: list[tuple[nn.Module, nn.Module, list[nn.Module | None]]] = []
        self.network = self._copy(network, "", {})

    @property
    def original(self) -> nn.Module:
        """The network that this is a twin of."""
        return self._original[0]

    def answering(self, answer: Answer, *inputs: Any, **keywords: Any) -> Any:
        """Run the network with an answer to each call of a frozen module."""
        self._bring_up_to_date()
        self._local.answer, self._local.counts = answer, {}
        try:
            output = self.network(*inputs, **keywords)
        finally:
            self._local.answer = None
        self._hand_back()
        return output

    def _copy(self, module: nn.Module, path: str, copies: dict[int, nn.Module]) -> nn.Module:
        if id(module) in copies:
            return copies[id(module)]
        parameters = list(module.parameters())
        is_frozen = not any(p.requires_grad for p in parameters) and not any(m.training for m in module.modules())
        if isinstance(module, (Cut, torch.jit.ScriptModule)) or (
            parameters and all(p.requires_grad for p in parameters)
        ):
            return module
        copy = type(module).__new__(type(module))
        copies[id(module)] = copy
        vars(copy).update(vars(module))
        children = {
            name: child if child is None else self._copy(child, f"{path}.{name}" if path else name, copies)
            for name, child in module._modules.items()
        }
        vars(copy)["_modules"] = children
        if is_frozen:
            self.intercepted[path] = module
            # What hooks do is part of what the module returns, and is recorded with it.
            vars(copy).update({name: {} for name, value in vars(module).items() if _is_hooks(name, value)})
            vars(copy)["forward"] = functools.partial(self._intercept, path, module)
        elif all(children[name] is child for name, child in module._modules.items()):
            copies[id(module)] = module
            return module
        else:
            self._copies.append((module, copy, list(module._modules.values())))
        return copy

    def _intercept(self, path: str, module: nn.Module, *inputs: Any, **keywords: Any) -> Any:
        answer = getattr(self._local, "answer", None)
        if answer is None:  # a checkpoint computes again in backward
            if path in self.answered:
                raise RuntimeError(
                    f"frontier: backward computes {path} again, which is cached; find the frontier anew after gradient "
                    "checkpointing was turned on."
                )
            return module(*inputs, **keywords)
        counts: dict[str, int] = self._local.counts
        call = Call(path, counts.get(path, 0))
        counts[path] = call.earlier + 1
        return answer(call, functools.partial(module, *inputs, **keywords))

    def _bring_up_to_date(self) -> None:
        for module, copy, children in self._copies:
            if list(module._modules.values()) != children:
                raise RuntimeError(
                    f"frontier: a submodule of {type(module).__name__} was replaced after the frontier was found; find "
                    "it anew."
                )
            own = vars(copy)
            for name, value in vars(module).items():
                if name != "_modules":
                    own[name] = _rebind(value, module, copy)

    def _hand_back(self) -> None:
        """Give the network what its forward set on a copy."""
        for module, copy, _ in self._copies:
            own = vars(module)
            for name, value in vars(copy).items():
                if name != "_modules" and not isinstance(value, MethodType):
                    own[name] = value


def _is_hooks(name: str, value: object) -> bool:
    return "_hooks" in name and isinstance(value, dict)


def _rebind(value: object, old: nn.Module, new: nn.Module) -> object:
    """A method that an object holds of itself (``self.forward = self.forward_fused``) becomes the other object's."""
    return MethodType(value.__func__, new) if isinstance(value, MethodType) and value.__self__ is old else value
