"""The frontier of a network: the tensors that are kept for each image, and the rest that runs on them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from ..verification import digest
from .layouts import BatchLayout
from .twin import Answer, Call, Twin
from .undisturbed import undisturbed


@dataclass(frozen=True)
class NoFrontier:
    """Why a network has to run whole.

    >>> NoFrontier("every parameter trains").reason
    'every parameter trains'
    """

    reason: str


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that is kept for each image, and the call of a module that returns it.

    >>> print(KeptTensor("layer2", 0, None, (128, 28, 28), torch.float32, 401_408))
    layer2: 128 x 28 x 28 float32, 401.4 kB per image
    >>> print(KeptTensor("patch_embed", 1, 2, (49, 96), torch.bfloat16, 9_408))
    patch_embed (call 2)[2]: 49 x 96 bfloat16, 9.4 kB per image
    """

    path: str  # of the module, as named_modules() gives it
    call: int  # which call of the module in a forward, from 0
    index: int | None  # of the leaves that the call returns, as torch.utils._pytree lists them; None: one tensor alone
    shape: tuple[int, ...]  # without the batch
    dtype: torch.dtype
    bytes_per_image: int

    @property
    def place(self) -> str:
        """Name the module, the call where it is not the first, and the index."""
        return str(Call(self.path, self.call)) + ("" if self.index is None else f"[{self.index}]")

    def __str__(self) -> str:
        shape, dtype = " x ".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        return f"{self.place}: {shape} {dtype}, {self.bytes_per_image / 1000:.1f} kB per image"


class Returned(NamedTuple):
    """What a call returns: tensors of the batch by their layout, all else by the value that it has for every batch."""

    leaves: tuple[Any, ...]
    structure: TreeSpec

    def build(self, fill: Callable[[int, BatchLayout], torch.Tensor]) -> Any:
        """Give it with tensors of the batch from `fill`, which takes their position and layout."""
        leaves = [
            fill(index, leaf) if isinstance(leaf, BatchLayout) else copy_leaf(leaf)
            for index, leaf in enumerate(self.leaves)
        ]
        return tree_unflatten(leaves, self.structure)


def copy_leaf(leaf: Any) -> Any:
    """Copy a tensor, as a forward may write into it; give anything else as it is."""
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


Place = tuple[Call, int]  # a tensor among those that a call returns
StandIn = Callable[[BatchLayout, int], torch.Tensor]  # a tensor for so many images


class Plan(NamedTuple):
    """What a forward is made of: what it takes, what its calls return, and which of that is kept."""

    inputs: Returned
    returned: Mapping[Call, Returned]  # of the calls that can be cached
    computed: Container[Call]  # the calls that cannot
    kept: Sequence[Place] = ()
    draws: bool = False  # whether it draws random numbers before all that is kept is computed


def uninitialised(layout: BatchLayout, images: int) -> torch.Tensor:
    """Stand for a tensor that nothing reads; integers might be read as indices."""
    tensor = layout.empty(images)
    return tensor if tensor.is_floating_point() else tensor.zero_()


def answer_from(plan: Plan, rows: Mapping[Place, torch.Tensor], images: int, stand_in: StandIn) -> Answer:
    """Answer calls from rows, with `stand_in` where there are none, and compute the calls that cannot be cached."""

    def answer(call: Call, compute: Callable[[], Any]) -> Any:
        def fill(index: int, layout: BatchLayout) -> torch.Tensor:
            place = call, index
            return layout.from_rows(rows[place]) if place in rows else stand_in(layout, images)

        if call in plan.returned:
            return plan.returned[call].build(fill)
        if call in plan.computed:
            return compute()
        raise RuntimeError(f"frontier: the forward called {call}, which it did not on the first batch; run it whole.")

    return answer


class Rest(nn.Module):
    """The network from the frontier on: kept tensors, each (B, *shape), to what the network returns.

    It shares all parameters with the network, and its modes. Hand it to DistributedDataParallel or `torch.compile`.
    """

    def __init__(self, twin: Twin, plan: Plan) -> None:
        super().__init__()
        self.twin = twin
        self._plan = plan
        self._conditions = Conditions(twin, {call.path for call in plan.returned})
        twin.answered = {call.path for call in plan.returned}

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Run what is not cached: kept tensors -> the output of the network."""
        return self.run(tensors, uninitialised)

    def run(self, tensors: Sequence[torch.Tensor], stand_in: StandIn) -> Any:
        """Run with `stand_in` in place of what is neither kept nor computed, the input among it."""
        images = self._check(tensors)
        rows = dict(zip(self._plan.kept, tensors, strict=True))
        inputs, keywords = self._plan.inputs.build(lambda _, layout: stand_in(layout, images))
        return self.twin.answering(answer_from(self._plan, rows, images, stand_in), *inputs, **keywords)

    def record(self, *inputs: Any, **keywords: Any) -> tuple[torch.Tensor, ...]:
        """Run the front alone and give the kept tensors."""
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

        undrawn = undisturbed(self.twin) if self._plan.draws else nullcontext()
        with undrawn, torch.no_grad(), suppress(_AllRecorded):
            self.twin.answering_apart(answer, *inputs, **keywords)
        if missing := wanted - values.keys():
            raise RuntimeError(f"record: the forward did not call {min(missing)}, which it called on the first batch.")
        return tuple(self._rows(place, values[place[0]][place[1]]) for place in self._plan.kept)

    def kept_tensors(self) -> tuple[KeptTensor, ...]:
        """Describe what is kept."""
        described = []
        for call, index in self._plan.kept:
            leaves = self._plan.returned[call].leaves
            layout, of_several = leaves[index], index if len(leaves) > 1 else None
            described.append(KeptTensor(*call, of_several, layout.row_shape, layout.dtype, layout.row_bytes))
        return tuple(described)

    def train(self, mode: bool = True) -> Rest:
        """Set the mode of the network, which is the mode of the rest."""
        self._conditions.network.train(mode)
        self.training = mode
        return self

    def _rows(self, place: Place, tensor: torch.Tensor) -> torch.Tensor:
        layout: BatchLayout = self._plan.returned[place[0]].leaves[place[1]]
        if tensor.ndim == 0 or not layout.fits(tensor):
            raise ValueError(
                f"record: {place[0]} returns a tensor of shape {tuple(tensor.shape)}, {tensor.dtype}, and the frontier "
                f"keeps {layout.row_shape}, {layout.dtype} for each image; find one for this size and precision."
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


class _AllRecorded(Exception):  # noqa: N818  # no BaseException: hooks that are always called are called
    """Ends a forward once all that is kept has been seen."""


class Conditions:
    """What cached tensors depend on: frozen values, the precision, and the modes that were proved."""

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
            [tensor, _version(tensor), digest(tensor), f"{path}.{name}"]
            for path, module, _ in self._modules
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        ]

    def check(self) -> None:
        """Raise RuntimeError when what is cached no longer is what the network computes."""
        if self.network.training not in self.proved_modes:
            self._refuse("the network is in train mode, and was in eval when the frontier was found")
        if (precision := _precision(self.network)) != self._precision:
            self._refuse(f"autocast is {precision}, and was {self._precision} when the frontier was found")
        for path, module, children in self._modules:
            if module.training:
                self._refuse(f"{path} is in train mode, and was frozen in eval")
            if list(module._modules.values()) != children:
                self._refuse(f"a submodule of {path} was replaced")
        for entry in self._tensors:
            tensor, version, before, path = entry
            if tensor.requires_grad:
                self._refuse(f"{path} trains, and was frozen")
            if _version(tensor) != version:  # written to, which DistributedDataParallel does with equal values
                if digest(tensor) != before:
                    self._refuse(f"{path} has changed")
                entry[1] = _version(tensor)

    @staticmethod
    def _refuse(what: str) -> None:
        raise RuntimeError(f"frontier: {what}; find the frontier anew, and record again.")


def _version(tensor: torch.Tensor) -> tuple[int, int]:
    """Tells cheaply that a tensor was written to, or moved to another device or dtype."""
    return (0 if tensor.is_inference() else tensor._version), tensor.data_ptr()


def _precision(network: nn.Module) -> str:
    device = next(network.parameters()).device.type
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"


class Frontier:
    """What of a partly frozen network can be computed once for each image, and the rest that runs in each epoch.

    >>> from backbone_finetune import FineTuneModel
    >>> from backbone_finetune.frontier import find_frontier
    >>> model = FineTuneModel.from_timm("test_resnet", num_classes=5).freeze_backbone(trainable_groups=1).train()
    >>> frontier = find_frontier(model, torch.randn(4, 3, 32, 32))
    >>> print(frontier)
    backbone.layer3: 192 x 2 x 2 float32, 3.1 kB per image
    >>> tensors = frontier.record(torch.randn(4, 3, 32, 32))
    >>> frontier.replay(tensors).shape
    torch.Size([4, 5])

    It holds as long as what is frozen stays frozen and as it is, in eval; each call looks, and raises RuntimeError
    otherwise. Equal batches give the logits and gradients of the whole network bit for bit; a batch that is put
    together anew gives them up to rounding, as the whole network itself does. Hooks of cached modules run in `record`
    alone. Images have one size.
    """

    def __init__(self, rest: Rest) -> None:
        self.rest = rest
        self.kept = rest.kept_tensors()

    @property
    def bytes_per_image(self) -> int:
        """How much is kept for each image."""
        return sum(kept.bytes_per_image for kept in self.kept)

    def record(self, *inputs: Any, **keywords: Any) -> tuple[torch.Tensor, ...]:
        """Compute what is kept for a batch, given as the network takes it: one (B, *shape) for each of `kept`.

        Several threads may record at once, each in its own autocast where there is one. They share all parameters. A
        front that draws random numbers, though what is kept does not depend on them, runs in one thread at a time.
        """
        return self.rest.record(*inputs, **keywords)

    def replay(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Give what the network returns for the batch whose tensors these are, or rows of which they are.

        Tensors of another dtype or device are converted. Raises ValueError for other shapes.
        """
        return self.rest(*tensors)

    def __str__(self) -> str:
        return "\n".join(map(str, self.kept))
