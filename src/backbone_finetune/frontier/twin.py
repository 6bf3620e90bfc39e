"""A copy of a network in which the calls of frozen modules can be recorded and answered."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Container
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from ..splitting.cut import Cut


class Call(NamedTuple):
    """One call of a frozen module in a forward: its path, and the number of its earlier calls."""

    path: str
    earlier: int

    def __str__(self) -> str:
        return f"{self.path} (call {self.earlier + 1})" if self.earlier else self.path


Answer = Callable[[Call, Callable[[], Any]], Any]  # returns the output of a call; the second argument computes it
_OPAQUE = (Cut, torch.jit.ScriptModule)


class Twin(nn.Module):
    """A copy of a network that shares all parameters, buffers, hooks and attributes, and intercepts frozen modules.

    >>> network = nn.Sequential(nn.Linear(2, 2).requires_grad_(False).eval(), nn.Linear(2, 2))
    >>> twin = Twin(network)
    >>> twin.answering(lambda call, compute: print(call) or compute(), torch.ones(1, 2)).shape
    0
    torch.Size([1, 2])

    A module is frozen here if it is in eval mode and neither it nor its submodules have trainable parameters. Modules
    without frozen ones inside are shared with the network; modules that contain frozen ones are copied, and updated
    before each run. If a frozen module calls another one, only the outer call is intercepted.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.intercepted: dict[str, nn.Module] = {}
        self.answered: set[str] = set()  # paths that a forward outside `answering` must not compute
        self._local = threading.local()
        self._original = (network,)  # in a tuple, so that it is not registered as a submodule
        self._stand_ins: dict[int, nn.Module] = {}  # for frozen modules
        self._above: dict[int, tuple[nn.Module, list[nn.Module | None]]] = {}  # modules that contain frozen ones
        self._find_frozen(network, "", set())
        self._copies = dict(self._stand_ins)
        self.network = self._copy(network, self._copies, self._above)

    @property
    def original(self) -> nn.Module:
        """The network that was copied."""
        return self._original[0]

    def answering(self, answer: Answer, *inputs: Any, **keywords: Any) -> Any:
        """Run the network; ``answer`` returns the output of each call of a frozen module."""
        self._check_above()
        pairs = [(module, self._copies[id(module)]) for module, _ in self._above.values()]
        for module, copy in pairs:
            _take_over(module, copy)
        output = self._run(self.network, answer, inputs, keywords)
        for module, copy in pairs:  # copy attributes that the forward has set back to the network
            vars(module).update(
                {k: v for k, v in vars(copy).items() if k != "_modules" and not isinstance(v, MethodType)}
            )
        return output

    def answering_apart(self, answer: Answer, *inputs: Any, **keywords: Any) -> Any:
        """Run like ``answering``, on copies made for this run: attributes that it sets have no effect elsewhere.

        The copies share all tensors except the buffers of modules in train mode.
        """
        self._check_above()
        network = self._copy(self.original, dict(self._stand_ins), None)
        return self._run(network, answer, inputs, keywords)

    def _run(self, network: nn.Module, answer: Answer, inputs: Any, keywords: Any) -> Any:
        self._local.answer, self._local.counts = answer, {}
        try:
            return network(*inputs, **keywords)
        finally:
            self._local.answer = None

    def _find_frozen(self, module: nn.Module, path: str, seen: set[int]) -> bool:
        """Create stand-ins for the frozen modules in a module; return whether there are any."""
        if id(module) in seen or isinstance(module, _OPAQUE):
            return id(module) in self._stand_ins or id(module) in self._above
        seen.add(id(module))
        trains = [parameter.requires_grad for parameter in module.parameters()]
        if trains and all(trains):
            return False
        children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
        above = [self._find_frozen(child, child_path, seen) for child_path, child in children]
        if not any(trains) and not any(part.training for part in module.modules()):
            self.intercepted[path] = module
            self._stand_ins[id(module)] = self._intercepting(path, module)
            return True
        if any(above):
            self._above[id(module)] = module, list(module._modules.values())
        return id(module) in self._above

    def _intercepting(self, path: str, module: nn.Module) -> nn.Module:
        stand_in = type(module).__new__(type(module))
        # The original module runs its hooks, so their effect is part of the recorded output.
        hooks: dict[str, Any] = {
            name: {} for name, value in vars(module).items() if "_hooks" in name and isinstance(value, dict)
        }
        forward = functools.partial(self._intercept, path, module)
        # A container such as nn.ModuleList is never called itself, only its modules.
        children = {name: self._stand_ins.get(id(child), child) for name, child in module._modules.items()}
        vars(stand_in).update(vars(module), **hooks, _modules=children, forward=forward)
        return stand_in

    def _copy(self, module: nn.Module, copies: dict[int, nn.Module], chosen: Container[int] | None) -> nn.Module:
        """Copy the chosen modules, or all of them; entries of ``copies`` already replace their modules."""
        if id(module) in copies:
            return copies[id(module)]
        if isinstance(module, _OPAQUE) or (chosen is not None and id(module) not in chosen):
            return module
        copy = copies[id(module)] = type(module).__new__(type(module))
        _take_over(module, copy)
        vars(copy)["_modules"] = {
            name: child if child is None else self._copy(child, copies, chosen)
            for name, child in module._modules.items()
        }
        if chosen is None and module.training:
            vars(copy)["_buffers"] = {
                name: buffer if buffer is None else buffer.clone() for name, buffer in module._buffers.items()
            }
        return copy

    def _intercept(self, path: str, module: nn.Module, *inputs: Any, **keywords: Any) -> Any:
        answer = getattr(self._local, "answer", None)
        if answer is None:  # gradient checkpointing recomputes in backward
            if path in self.answered:
                raise RuntimeError(
                    f"frontier: backward recomputes {path}, which is cached; call find_frontier again after turning "
                    "on gradient checkpointing."
                )
            return module(*inputs, **keywords)
        counts: dict[str, int] = self._local.counts
        call = Call(path, counts.get(path, 0))
        counts[path] = call.earlier + 1
        return answer(call, functools.partial(module, *inputs, **keywords))

    def _check_above(self) -> None:
        for module, children in self._above.values():
            if list(module._modules.values()) != children:
                raise RuntimeError(
                    f"frontier: a submodule of {type(module).__name__} was replaced after the frontier was found; call "
                    "find_frontier again."
                )


def _take_over(module: nn.Module, copy: nn.Module) -> None:
    """Set all attributes of a copy except its submodules. Bound methods of the module are bound to the copy."""
    own = vars(copy)
    for name, value in vars(module).items():
        if name != "_modules":
            is_own_method = isinstance(value, MethodType) and value.__self__ is module
            own[name] = MethodType(value.__func__, copy) if is_own_method else value
