"""Objects written down in full and in every process alike, so that what describes the same computes the same."""

import copyreg
import functools
import hashlib
import json
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import torch
from torch import Tensor, nn

from backbone_finetune.splitting.cut import _Calls
from backbone_finetune.verification import digest

__all__ = ["Describer", "UndescribableError"]

PLAIN = {type(None), bool, int, float, complex, str, type(...), type(NotImplemented)}
# Written down by their names: with torch's and Python's own, what they do changes with the version alone.
VERSIONED = {"torch", "torchvision", "numpy", *sys.stdlib_module_names}
# What every module has, beside what its own class gives it: parts, which are written down by their names, and hooks.
OF_EVERY_MODULE = {*vars(nn.Module()), "_compiled_call_impl"}
# timm's configurations hold where weights come from, too; where they are now, the weights themselves tell.
CONFIGURATIONS = {"pretrained_cfg", "default_cfg"}
ORIGINS = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"}
# Python's own about a class: what it was asked for, and which flags have been put together.
BOOKKEEPING = {"_abc_impl", "_value2member_map_"}
WRITTEN_IN_C = (GetSetDescriptorType, MemberDescriptorType, MethodDescriptorType, WrapperDescriptorType)


class UndescribableError(ValueError):
    """An object holds something of which nothing can be said that would be the same in another process.

    >>> raise UndescribableError("lock is a lock")
    Traceback (most recent call last):
    ...
    backbone_finetune.recipes.features.object_description.UndescribableError: lock is a lock
    """


class Describer:
    """Write objects down as what JSON can hold; one that was written down already, by its number.

    >>> describe = Describer().describe
    >>> describe(0.1), describe((2, "avg")), describe({3, 1, 2})
    (['float', '0.1'], ['tuple', [['int', '2'], ['str', 'avg']]], ['set', [['int', '1'], ['int', '2'], ['int', '3']]])
    >>> describe(slice(1, None)) == describe(slice(2, None)), describe(lambda x=1: x) == describe(lambda x=2: x)
    (False, False)
    """

    def __init__(self) -> None:
        # By identity. What was seen is kept, since the identity of what is gone may be that of something new.
        self.seen: dict[int, tuple[object, Any]] = {}
        self.numbers = 0  # given out so far, each once
        self.depth = 0  # of containers within containers
        self.path: list[str] = []

    def describe(self, value: Any) -> Any:
        """Write down a value, with all that it holds.

        Raises:
            UndescribableError: it, or something that it holds, is of no known kind and can't be pickled.
        """
        kind = type(value)
        if kind in PLAIN:
            return [kind.__name__, value if kind is str else repr(value)]
        if id(value) in self.seen:
            return self.seen[id(value)][1]
        if kind in BY_CONTENT:
            return BY_CONTENT[kind](self, value)
        number = self.remember(value, ["seen", self.numbers])
        self.numbers += 1
        return [*number, self.describe_object(value)]

    def describe_object(self, value: Any) -> Any:
        """Write down what has an identity of its own, and is met for the first time."""
        if type(value) in BY_IDENTITY:
            return [type(value).__name__, BY_IDENTITY[type(value)](self, value)]
        for kind, described in BY_KIND.items():
            if isinstance(value, kind):
                return described(self, value)
        return self.describe_pickle(value)

    def remember(self, value: object, description: Any) -> Any:
        """Keep how a value is written down when it comes again."""
        self.seen[id(value)] = (value, description)
        return description

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Note where we are, for an error to say."""
        self.path.append(name)
        yield
        self.path.pop()

    def describe_all(self, values: Iterable[Any]) -> list[Any]:
        """Write down values, one after another."""
        return [self.describe(value) for value in values]

    def describe_names(self, named: Iterable[tuple[str, Any]]) -> list[Any]:
        """Write down named values in the order of their names; that in which they were set tells nothing."""
        return [self.describe_named(name, value) for name, value in sorted(named, key=lambda pair: pair[0])]

    def describe_named(self, name: str, value: Any) -> Any:
        """Write down a value with the name that what holds it gives it."""
        with self.within(name):
            return [name, self.describe(value)]

    def describe_container(self, value: Any) -> Any:
        """Write down a tuple, list or dict by its entries, in their order."""
        entries = [list(item) for item in value.items()] if isinstance(value, dict) else value
        if type(value) is tuple:  # it can't be within itself but by way of something else
            return ["tuple", self.describe_all(entries)]
        self.remember(value, ["within itself", self.depth])
        self.depth += 1
        described = [self.describe_all(entry) for entry in entries] if type(value) is dict else self.describe_all(value)
        self.depth -= 1
        del self.seen[id(value)]
        return [type(value).__name__, described]

    def describe_set(self, value: Any) -> Any:
        """Write down a set in an order that is the same in every process."""
        described = []
        for entry in value:
            apart = Describer()  # so that no number depends on the order in which entries came
            apart.seen, apart.path = dict(self.seen), self.path
            apart.numbers, apart.depth = self.numbers, self.depth
            described.append(apart.describe(entry))
        return [type(value).__name__, sorted(described, key=json.dumps)]

    def describe_function(self, function: FunctionType) -> Any:
        """Write down a function: its code, default arguments, what it closes over, and its attributes."""
        # What torch.compile made of a function computes what that did, and holds what only this process has.
        function = vars(function).get("_torchdynamo_orig_callable", function)
        with self.within(function.__qualname__):
            return [
                f"{function.__module__}.{function.__qualname__}",
                self.describe(function.__code__),
                self.describe(function.__defaults__),
                self.describe(function.__kwdefaults__),
                self.describe(function.__closure__),
                self.describe_names(vars(function).items()),
            ]

    def describe_class(self, class_: type) -> Any:
        """Write down a class with its own attributes and those it inherits, but what torch and Python bring along."""
        name = f"{class_.__module__}.{class_.__qualname__}"
        if is_versioned(class_) and not issubclass(class_, nn.Module):
            return [name]
        parents = [
            parent
            for parent in class_.__mro__
            if parent is not nn.Module and (issubclass(parent, nn.Module) or not is_versioned(parent))
        ]
        with self.within(class_.__qualname__):
            return [
                name,
                [
                    [f"{parent.__module__}.{parent.__qualname__}", self.describe_names(computing(parent))]
                    for parent in parents
                ],
            ]

    def describe_module(self, module: nn.Module) -> Any:
        """Write down a module: its class, its parts and its attributes, but no hooks, and not whether it trains."""
        own = {name: value for name, value in stated(module, vars(module)) if name not in OF_EVERY_MODULE}
        for name in CONFIGURATIONS & own.keys():
            if isinstance(own[name], dict):
                own[name] = {key: value for key, value in own[name].items() if key not in ORIGINS}
        parts = [*module._parameters.items(), *module._buffers.items(), *module._modules.items()]
        return [
            self.describe(type(module)),
            self.describe_names(own.items()),
            [self.describe_named(name, part) for name, part in parts],
        ]

    def describe_pickle(self, value: Any) -> Any:
        """Write down an object of another kind by its class and by what pickle would keep of it.

        Raises:
            UndescribableError: it can't be pickled.
        """
        reduce = copyreg.dispatch_table.get(type(value))
        try:
            reduced = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception as error:  # what a class says of itself can be anything
            raise UndescribableError(
                f"{'.'.join(self.path)} is a {type(value).__qualname__}, of which nothing can be said that holds in "
                f"another process ({error})"
            ) from error
        if isinstance(reduced, str):
            return [f"{type(value).__module__}.{type(value).__qualname__}", reduced]
        function, arguments, state, entries, items = (*reduced, None, None, None)[:5]
        if function is copyreg.__newobj__ and arguments:  # type: ignore[attr-defined]  # pickle's own, not in typeshed
            function, arguments = arguments[0], arguments[1:]
        described = [self.describe(type(value)), self.describe(function), self.describe(tuple(arguments))]
        if state is None or (isinstance(state, dict) and all(isinstance(name, str) for name in state)):
            described.append(self.describe_names(stated(value, state or {})))
        else:
            described.append(self.describe(state))
        described.append(self.describe(None if entries is None else list(entries)))
        described.append(self.describe(None if items is None else [tuple(item) for item in items]))
        return described


def is_versioned(class_: type) -> bool:
    """Say whether a class is one of torch's, NumPy's or Python's own.

    >>> is_versioned(dict), is_versioned(nn.Linear), is_versioned(Describer)
    (True, True, False)
    """
    return class_.__module__.partition(".")[0] in VERSIONED


def stated(value: object, attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Give the attributes of an object but for what it worked out from the others: its cached properties.

    >>> list(stated(Describer(), {"depth": 0}))
    [('depth', 0)]
    """
    for name, attribute in attributes.items():
        if not isinstance(getattr(type(value), name, None), functools.cached_property):
            yield name, attribute


def computing(class_: type) -> Iterator[tuple[str, Any]]:
    """Give the attributes of a class that can take part in a computation: not its documentation and bookkeeping.

    >>> sorted(name for name, _ in computing(UndescribableError))
    []
    """
    for name, value in vars(class_).items():
        is_special = name.startswith("__") and name.endswith("__")
        if name not in BOOKKEEPING and not (is_special and not callable(getattr(value, "__func__", value))):
            yield name, value


def describe_code(describer: Describer, code: CodeType) -> Any:
    """Write down what a function does, but not where it is written."""
    exceptions = getattr(code, "co_exceptiontable", b"")  # from Python 3.11 on
    return [
        (code.co_code + b" " + exceptions).hex(),
        code.co_flags,
        [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars],
        describer.describe_all(code.co_consts),
    ]


def describe_cell(describer: Describer, cell: CellType) -> Any:
    """Write down what a variable of an enclosing function holds."""
    try:
        content = cell.cell_contents
    except ValueError:
        return "empty"
    return describer.describe(content)


def describe_graph(describer: Describer, graph: torch.fx.Graph) -> Any:
    """Write down a traced graph by its source, and what that calls."""
    written = graph.python_code("self")
    return [written.src, describer.describe_names(written.globals.items())]


def describe_builtin(describer: Describer, function: Any) -> Any:
    """Write down a function of C by its name, and what it is bound to."""
    owner = function.__self__
    return [function.__qualname__, owner.__name__ if isinstance(owner, ModuleType) else describer.describe(owner)]


# Equal ones are written down alike wherever they come: they may be one object in one process, and two in another.
BY_CONTENT: dict[type, Callable[[Describer, Any], Any]] = {
    tuple: Describer.describe_container,
    list: Describer.describe_container,
    dict: Describer.describe_container,
    set: Describer.describe_set,
    frozenset: Describer.describe_set,
    bytes: lambda _, value: ["bytes", hashlib.sha256(value).hexdigest()],
    slice: lambda describer, value: ["slice", describer.describe_all((value.start, value.stop, value.step))],
    **dict.fromkeys(WRITTEN_IN_C, lambda _, value: ["written in C", value.__qualname__]),
}
BY_IDENTITY: dict[type, Callable[[Describer, Any], Any]] = {
    FunctionType: Describer.describe_function,
    BuiltinFunctionType: describe_builtin,
    CodeType: describe_code,
    CellType: describe_cell,
    torch.fx.Graph: describe_graph,
    torch._ops.OpOverload: lambda _, value: str(value),
    torch._ops.OpOverloadPacket: lambda _, value: str(value),
    MethodType: lambda describer, value: describer.describe_all((value.__func__, value.__self__)),
    property: lambda describer, value: describer.describe_all((value.fget, value.fset, value.fdel)),
    staticmethod: lambda describer, value: describer.describe(value.__func__),
    classmethod: lambda describer, value: describer.describe(value.__func__),
    weakref.ref: lambda describer, value: describer.describe(value()),
    functools.partial: lambda describer, value: describer.describe_all(
        (value.func, value.args, value.keywords, vars(value))
    ),
    functools.partialmethod: lambda describer, value: describer.describe_all((value.func, value.args, value.keywords)),
    functools.cached_property: lambda describer, value: describer.describe(value.func),
    functools._lru_cache_wrapper: lambda describer, value: describer.describe(value.__wrapped__),
}
BY_KIND: dict[type, Callable[[Describer, Any], Any]] = {
    Tensor: lambda _, value: ["tensor", digest(value)],
    _Calls: lambda _, value: ["calls of a cut"],  # and not what reached it so far
    type: Describer.describe_class,
    nn.Module: Describer.describe_module,
    ModuleType: lambda _, value: ["module", value.__name__],
}
