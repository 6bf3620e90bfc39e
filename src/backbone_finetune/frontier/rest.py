"""The frontier of a network: the tensors that are kept for each image, and the rest of the network."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from ..verification import digest
from .layouts import BatchLayout
from .twin import Answer, Call, Twin
from .undisturbed import undisturbed


@dataclass(frozen=True)
class NoFrontier:
    """The reason why nothing of a network can be cached.

    >>> NoFrontier("every parameter trains").reason
    'every parameter trains'
    """

    reason: str


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that is kept for each image, and the module call that returns it.

    >>> print(KeptTensor("layer2", 0, None, (128, 28, 28), torch.float32, 401_408))
    layer2: 128 x 28 x 28 float32, 401.4 kB per image
    >>> print(KeptTensor("patch_embed", 1, 2, (49, 96), torch.bfloat16, 9_408))
    patch_embed (call 2)[2]: 49 x 96 bfloat16, 9.4 kB per image
    """

    path: str  # the module's name in named_modules()
    call: int  # index of the call among those of the module in a forward, from 0
    index: int | None  # index among the leaves of the output, as torch.utils._pytree lists them; None for one tensor
    shape: tuple[int, ...]  # without the batch dimension
    dtype: torch.dtype
    bytes_per_image: int

    @property
    def place(self) -> str:
        """The module, the call if it is not the first, and the index, as text."""
        return str(Call(self.path, self.call)) + ("" if self.index is None else f"[{self.index}]")

    def __str__(self) -> str:
        shape, dtype = " x ".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        return f"{self.place}: {shape} {dtype}, {self.bytes_per_image / 1000:.1f} kB per image"


class Returned(NamedTuple):
    """The output of a call: layouts for tensors of the batch, and values for everything else."""

    leaves: tuple[Any, ...]
    structure: TreeSpec

    def build(self, fill: Callable[[int, BatchLayout], torch.Tensor]) -> Any:
        """Build the output, with tensors of the batch from ``fill(index, layout)``."""
        leaves = [
            fill(index, leaf) if isinstance(leaf, BatchLayout) else copy_leaf(leaf)
            for index, leaf in enumerate(self.leaves)
        ]
        return tree_unflatten(leaves, self.structure)


def copy_leaf(leaf: Any) -> Any:
    """Copy a tensor, because a forward may modify it; return any other object unchanged."""
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


Place = tuple[Call, int]  # a call, and the index of a tensor in its output
StandIn = Callable[[BatchLayout, int], torch.Tensor]  # returns a replacement tensor for a number of images


class Plan(NamedTuple):
    """The inputs of a forward, the outputs of its calls, and which of these are kept."""

    inputs: Returned
    returned: Mapping[Call, Returned]  # outputs of the calls that can be cached
    computed: Container[Call]  # calls that cannot be cached
    kept: Sequence[Place] = ()
    draws: bool = False  # whether the forward draws random numbers before the last kept tensor


def uninitialised(layout: BatchLayout, images: int) -> torch.Tensor:
    """Return a replacement for a tensor that is not read; integers are 0, which is a valid index."""
    tensor = layout.empty(images)
    return tensor if tensor.is_floating_point() else tensor.zero_()


def answer_from(plan: Plan, rows: Mapping[Place, torch.Tensor], images: int, stand_in: StandIn) -> Answer:
    """Return a function that answers calls from rows or ``stand_in``, and computes calls that cannot be cached."""

    def answer(call: Call, compute: Callable[[], Any]) -> Any:
        def fill(index: int, layout: BatchLayout) -> torch.Tensor:
            place = call, index
            return layout.from_rows(rows[place]) if place in rows else stand_in(layout, images)

        if call in plan.returned:
            return plan.returned[call].build(fill)
        if call in plan.computed:
            return compute()
        raise RuntimeError(
            f"frontier: the forward called {call}, which it did not call on the first batch; run the whole network."
        )

    return answer


class Rest(nn.Module):
    """The network after the frontier. It takes the kept tensors, each (B, *shape), and returns the network's output.

    It shares parameters and modes with the network. It can be passed to DistributedDataParallel or ``torch.compile``.
    """

    def __init__(self, twin: Twin, plan: Plan) -> None:
        super().__init__()
        self.twin = twin
        self._plan = plan
        self._conditions = Conditions(twin, {call.path for call in plan.returned})
        twin.answered = {call.path for call in plan.returned}

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Run what is not cached: maps kept tensors to the output of the network."""
        return self.run(tensors, uninitialised)

    def run(self, tensors: Sequence[torch.Tensor], stand_in: StandIn) -> Any:
        """Run with ``stand_in`` in place of the input and of every output that is neither kept nor computed."""
        images = self._check(tensors)
        rows = dict(zip(self._plan.kept, tensors, strict=True))
        inputs, keywords = self._plan.inputs.build(lambda _, layout: stand_in(layout, images))
        return self.twin.answering(answer_from(self._plan, rows, images, stand_in), *inputs, **keywords)

    def record(self, *inputs: Any, **keywords: Any) -> tuple[torch.Tensor, ...]:
        """Run the forward up to the last kept tensor, and return the kept tensors."""
        self._conditions.check()
        wanted = {call for call, _ in self._plan.kept}
        values: dict[Call, Any] = {}

        def answer(call: Call, compute: Callable[[], Any]) -> Any:
            value = compute()
            if call in wanted:
                values[call] = [copy_leaf(leaf) for leaf in tree_leaves(value)]
                if len(values) == len(wanted):
                    raise _AllRecorded
            return value

        # Scripted modules cannot be copied, and in train mode they update the network's own running statistics.
        scripted = any(m.training and isinstance(m, torch.jit.ScriptModule) for m in self.twin.original.modules())
        restored = undisturbed(self.twin.original) if self._plan.draws or scripted else nullcontext()
        with restored, torch.no_grad(), suppress(_AllRecorded):
            self.twin.answering_apart(answer, *inputs, **keywords)
        if missing := wanted - values.keys():
            raise RuntimeError(
                f"record: the forward did not call {min(missing)}, which it called on the first batch; run the whole "
                "network."
            )
        return tuple(self._rows(place, values[place[0]][place[1]]) for place in self._plan.kept)

    def kept_tensors(self) -> tuple[KeptTensor, ...]:
        """Describe the kept tensors."""
        described = []
        for call, index in self._plan.kept:
            leaves = self._plan.returned[call].leaves
            layout, of_several = leaves[index], index if len(leaves) > 1 else None
            described.append(KeptTensor(*call, of_several, layout.row_shape, layout.dtype, layout.row_bytes))
        return tuple(described)

    def train(self, mode: bool = True) -> Rest:
        """Set the mode of the whole network."""
        self._conditions.network.train(mode)
        self.training = mode
        return self

    def _rows(self, place: Place, tensor: torch.Tensor) -> torch.Tensor:
        layout: BatchLayout = self._plan.returned[place[0]].leaves[place[1]]
        if tensor.ndim == 0 or not layout.fits(tensor):
            raise ValueError(
                f"record: {place[0]} returns a tensor of shape {tuple(tensor.shape)}, {tensor.dtype}, and the frontier "
                f"keeps {layout.row_shape}, {layout.dtype} for each image; call find_frontier for this size and "
                "precision."
            )
        return layout.to_rows(tensor)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _check(self, tensors: Sequence[torch.Tensor]) -> int:
        self._conditions.check()
        shapes = [self._plan.returned[call].leaves[position].row_shape for call, position in self._plan.kept]
        given = [tuple(tensor.shape[1:]) for tensor in tensors]
        if given != shapes or len({len(tensor) for tensor in tensors}) != 1:
            raise ValueError(
                f"replay: got tensors of shape {', '.join(str(tuple(tensor.shape)) for tensor in tensors) or '()'}; "
                f"pass what record() returned, {', '.join(str(('B', *shape)) for shape in shapes)} for B images."
            )
        return len(tensors[0])


class _AllRecorded(Exception):  # noqa: N818  # not a BaseException: hooks with always_call=True must run
    """Ends a forward when all kept tensors are recorded."""


class StaleError(RuntimeError):
    """The state that cached tensors depend on is another one."""

    def __init__(self, what: str) -> None:
        super().__init__(f"frontier: {what}; call find_frontier and record again.")
        self.what = what


class Conditions:
    """The state that cached tensors depend on: frozen values, precision and modes."""

    def __init__(self, twin: Twin, paths: Iterable[str]) -> None:
        self.network = twin.original
        self.proved_modes = {self.network.training, False}
        self._precision = _precision(self.network)
        self._modules = [
            (f"{path}.{name}".rstrip("."), module, list(module._modules.values()))
            for path in sorted(paths)
            for name, module in twin.intercepted[path].named_modules()
        ]
        self._tensors = [
            _Seen(path, module, name, tensor, _version(tensor), digest(tensor))
            for path, module, _ in self._modules
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        ]

    def check(self) -> None:
        """Raise RuntimeError if the state has changed, so that cached tensors are stale."""
        if self.network.training not in self.proved_modes:
            self._refuse("the network is in train mode, and was in eval mode when the frontier was found")
        if (precision := _precision(self.network)) != self._precision:
            self._refuse(f"autocast is {precision}, and was {self._precision} when the frontier was found")
        for path, module, children in self._modules:
            if module.training:
                self._refuse(f"{path} is in train mode, and was frozen in eval mode")
            if list(module._modules.values()) != children:
                self._refuse(f"a submodule of {path} was replaced")
        for seen in self._tensors:
            tensor = getattr(seen.module, seen.name, None)
            if tensor is None:
                self._refuse(f"{seen.path}.{seen.name} was removed")
            if tensor.requires_grad:
                self._refuse(f"{seen.path}.{seen.name} trains, and was frozen")
            # DistributedDataParallel writes equal values, and load_state_dict(assign=True) replaces tensors.
            if tensor is not seen.tensor or _version(tensor) != seen.version:
                if digest(tensor) != seen.digest:
                    self._refuse(f"{seen.path}.{seen.name} has changed")
                seen.tensor, seen.version = tensor, _version(tensor)

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise StaleError(what)


def _version(tensor: torch.Tensor) -> tuple[int, int]:
    """Return a value that changes when a tensor is written to or moved to another device or dtype."""
    return (0 if tensor.is_inference() else tensor._version), tensor.data_ptr()


@dataclass
class _Seen:
    """A frozen tensor when it was last looked at."""

    path: str
    module: nn.Module
    name: str
    tensor: torch.Tensor  # a reference, so that no other tensor gets its address
    version: tuple[int, int]
    digest: str


def _precision(network: nn.Module) -> str:
    device = next(network.parameters()).device.type
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"


class Frontier:
    """The tensors of a partly frozen network that are computed once for each image, and the rest of the network.

    >>> from backbone_finetune import FineTuneModel
    >>> from backbone_finetune.frontier import find_frontier
    >>> model = FineTuneModel.from_timm("test_resnet", num_classes=5).freeze_backbone(trainable_groups=1).train()
    >>> frontier = find_frontier(model, torch.randn(4, 3, 32, 32))
    >>> print(frontier)
    backbone.layer3: 192 x 2 x 2 float32, 3.1 kB per image
    >>> tensors = frontier.record(torch.randn(4, 3, 32, 32))
    >>> frontier.replay(tensors).shape
    torch.Size([4, 5])

    It is valid as long as frozen modules stay frozen, unchanged and in eval mode; each call checks this and raises
    RuntimeError otherwise. For the batches that were recorded, logits and gradients are those of the whole network, bit
    for bit; for other compositions of the images, up to rounding, as in the whole network. Hooks of cached modules run
    in ``record`` only. All images have one size.
    """

    def __init__(self, rest: Rest) -> None:
        self.rest = rest
        self.kept = rest.kept_tensors()

    @property
    def bytes_per_image(self) -> int:
        """The size of the kept tensors of one image in bytes."""
        return sum(kept.bytes_per_image for kept in self.kept)

    def record(self, *inputs: Any, **keywords: Any) -> tuple[torch.Tensor, ...]:
        """Compute the kept tensors of a batch.

        Args:
            *inputs: the inputs of the network.
            **keywords: the keyword arguments of the network.

        Returns:
            One tensor (B, *shape) for each of ``kept``.

        Several threads may record at the same time, each with its own autocast context. Recording a network that draws
        random numbers before the last kept tensor runs in one thread at a time.
        """
        return self.rest.record(*inputs, **keywords)

    def replay(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Return the network's output for kept tensors.

        Args:
            tensors: tensors from ``record``, or any rows of them. Other dtypes and devices are converted.

        Raises:
            ValueError: a shape is wrong.
            RuntimeError: the tensors are stale, because frozen state has changed.
        """
        return self.rest(*tensors)

    def __str__(self) -> str:
        return "\n".join(map(str, self.kept))
