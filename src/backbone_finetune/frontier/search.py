"""Find the frontier of a network on one batch, and check it by a replay."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map

from ..eval_caches import preserve_modes
from .changes import ChangeTrace, checkpoints
from .layouts import BatchLayout, find_layout
from .rest import Frontier, NoFrontier, Place, Plan, Rest, Returned, StaleError, StandIn, answer_from, copy_leaf
from .twin import Answer, Call, Twin
from .undisturbed import Buffers, restore_buffers, save_buffers, undisturbed
from .values import LARGE, POISONS, among, can_be_nan, is_close, same_bits, same_output

_PART = 2  # images in the smaller batch
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
Flat = tuple[list[Any], TreeSpec]


def find_frontier(network: nn.Module, *inputs: Any, **keywords: Any) -> Frontier | NoFrontier:
    """Find the tensors of a partly frozen network that can be cached for each image.

    >>> network = nn.Sequential(nn.Linear(4, 8).requires_grad_(False).eval(), nn.Linear(8, 2))
    >>> print(find_frontier(network, torch.randn(4, 4)))
    0: 8 float32, 0.0 kB per image
    >>> find_frontier(network.requires_grad_(True), torch.randn(4, 4)).reason
    'every parameter trains'

    A call of a frozen module can be cached if its output depends neither on trainable parameters nor on randomness.
    Which of these outputs are needed is found by replacing outputs with NaN and with large values, in train and in eval
    mode. The result is checked by a replay in which everything else, including the input, is replaced: its output must
    be that of the network, bit for bit. The network does not change, including random state and running statistics.

    Args:
        network: any network whose frozen modules are in eval mode, e.g. a ``FineTuneModel``, in its mode for training.
        inputs: one batch of 3 images or more, as the network takes it, e.g. images (B, 3, H, W).
        keywords: keyword arguments of the network's forward.

    Returns:
        The frontier, or a ``NoFrontier`` with the reason why there is none.

    Raises:
        ValueError: the batch has fewer than 3 images.
    """
    images = _count_images((inputs, keywords))
    if (reason := _why_not_to_look(network)) is not None:
        return NoFrontier(reason)
    before = save_buffers(network.modules())
    with torch.enable_grad():
        search = _Search(network, inputs, keywords, images)
        settled = save_buffers(network.modules())
        try:
            return search.find()
        finally:
            # Not those that the first forwards alone have filled, such as a table: a flag says that they are filled.
            restore_buffers({place: before[place] for place in _written_since(settled) if place in before})


class _Search:
    """The search: runs of one network on one batch and on the first images of the batch."""

    def __init__(self, network: nn.Module, inputs: Any, keywords: Any, images: int) -> None:
        self.network = network
        self.images = images
        self.whole = (inputs, keywords)
        self.part = self._of_batch(lambda leaf: leaf[:_PART])
        # Images at other positions, and one image among NaN: what is kept for an image must not depend on either.
        self.moved = self._of_batch(lambda leaf: leaf[[-1, 0]])
        self.lone = self._of_batch(functools.partial(among, torch.nan))
        self.modes = sorted({network.training, False}, reverse=True)
        for training in self.modes:
            with self._mode(training):
                # A module's state from its last forward, which the twin copies, is then of other images.
                self._run(network, self.moved)
        self.twin = Twin(network)
        self.returned: dict[Call, Returned] = {}  # outputs of the calls that can be cached
        self.computed: set[Call] = set()  # calls that cannot be cached
        self.after_drawing: set[Call] = set()  # calls after a random number was drawn
        self.rows: dict[Place, torch.Tensor] = {}  # cacheable outputs for the smaller batch

    def find(self) -> Frontier | NoFrontier:
        try:
            self._find_cacheable()
        except Exception as error:  # a forward that reads what a frozen module sets on itself may raise any error
            return NoFrontier(f"the network runs, and a copy that shares its tensors {_raises(error)}")
        if not any(next(self.twin.intercepted[call.path].parameters(), None) is not None for call in self.returned):
            return NoFrontier(self._why_nothing_is_cacheable())
        inputs = self._describe(tree_flatten(self.whole), tree_flatten(self.part))
        assert inputs is not None  # both contain the same objects, apart from tensors of the batch
        plan = Plan(inputs, self.returned, self.computed)
        kept: set[Place] = set()
        for training in self.modes:
            with self._mode(training):
                expected = self._run(self.network, self.part)
                if (reason := _why_it_tells_nothing(expected)) is not None:
                    return NoFrontier(reason)
                kept.update(self._needed(plan, [place for place in self.rows if place not in kept], expected))
        if not kept:
            return NoFrontier("the output does not depend on frozen modules")
        draws = any(call in self.after_drawing for call, _ in kept)
        rest = Rest(self.twin, plan._replace(kept=[place for place in self.rows if place in kept], draws=draws))
        for training in self.modes:
            with self._mode(training):
                try:
                    reason = self._why_unsound(rest)
                except StaleError as error:
                    reason = f"after a forward, {error.what}"
                if reason is not None:
                    return NoFrontier(reason)
        return Frontier(rest)

    def _of_batch(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return tree_map(lambda leaf: choose(leaf) if _is_batch(leaf, self.images) else leaf, self.whole)

    def _find_cacheable(self) -> None:
        trace = ChangeTrace(self.network)
        within: dict[Call, list[FrameType]] = {}
        for training in self.modes:
            with self._mode(training):
                part, whole = (self._trace(batch, trace, within) for batch in (self.part, self.whole))
            for call in [*whole, *(call for call in part if call not in whole)]:
                described = self._describe(whole.get(call), part.get(call))
                if described is None:
                    self.computed.add(call)
                    continue
                self.returned.setdefault(call, described)
                for position, layout in enumerate(described.leaves):
                    if isinstance(layout, BatchLayout):
                        self.rows.setdefault((call, position), layout.to_rows(part[call][0][position]))
        # Backward recomputes every module in a checkpoint that contains trainable parameters, after the replay.
        again = {call.path for call, frames in within.items() if not trace.recomputed.isdisjoint(frames)}
        self.computed |= {call for call in within if call.path in again}
        self.returned = {call: returned for call, returned in self.returned.items() if call not in self.computed}
        self.rows = {place: rows for place, rows in self.rows.items() if place[0] in self.returned}

    def _trace(self, batch: Any, trace: ChangeTrace, within: dict[Call, list[FrameType]]) -> dict[Call, Flat]:
        """Run a forward and return the outputs of its calls; calls that differ between epochs go to ``computed``."""
        results: dict[Call, Flat] = {}

        def answer(call: Call, compute: Callable[[], Any]) -> Any:
            value = compute()
            leaves, structure = tree_flatten(value)
            if any(trace.changes(leaf) for leaf in leaves):
                self.computed.add(call)
            if trace.drew:
                self.after_drawing.add(call)
            within.setdefault(call, []).extend(checkpoints())
            results[call] = [copy_leaf(leaf) for leaf in leaves], structure
            return value

        with trace:
            self._answering(answer, batch)
        return results

    def _describe(self, whole: Flat | None, part: Flat | None) -> Returned | None:
        """Describe an output for any batch size, from the outputs for two sizes; None if that is not possible."""
        if whole is None or part is None or whole[1] != part[1]:
            return None
        leaves: list[Any] = []
        for leaf, other in zip(whole[0], part[0], strict=True):
            if isinstance(leaf, torch.Tensor) and isinstance(other, torch.Tensor):
                if leaf.layout != torch.strided or leaf.is_nested:
                    return None
                layout = find_layout(leaf, other, self.images, _PART)
                if layout is None and not same_bits(leaf, other):
                    return None
                leaves.append(leaf if layout is None else layout)
            elif isinstance(leaf, _CONSTANTS) and type(leaf) is type(other) and leaf == other:
                leaves.append(leaf)
            else:
                return None
        return Returned(tuple(leaves), whole[1])

    def _needed(self, plan: Plan, places: list[Place], expected: Any) -> list[Place]:
        """Find by bisection the tensors that are needed: replacing them changes the output."""
        spare: set[Place] = set()

        def needed(group: list[Place]) -> list[Place]:
            left = {place: rows for place, rows in self.rows.items() if place not in spare and place not in group}

            def replay(poison: StandIn) -> Any:
                return self._answering(answer_from(plan, left, _PART, poison), self.part)

            if not group or self._difference(expected, replay) is None:
                spare.update(group)
                return []
            if len(group) == 1:
                return group
            middle = len(group) // 2
            return needed(group[:middle]) + needed(group[middle:])

        return needed(places)

    def _answering(self, answer: Answer, batch: Any) -> Any:
        return self._run(functools.partial(self.twin.answering, answer), batch)

    def _why_unsound(self, rest: Rest) -> str | None:
        """Check that a replay with all but the kept tensors replaced has the output of the network.

        The kept tensors must also be equal in a second pass over the batch, and in a pass over a part of it.
        """
        expected = self._run(self.network, self.whole)  # first: the network may count its forwards
        state = random.getstate()
        batches = (self.whole, self.moved, self.lone, self.whole)
        tensors, moved, lone, again = (self._run(rest.record, batch, seed) for seed, batch in enumerate(batches))
        if random.getstate() != state:
            return "frozen modules, or a function before them, draw from Python's random module"
        for position, (kept, *rows) in enumerate(zip(rest.kept_tensors(), tensors, moved, lone, again, strict=True)):
            first, of_moved, of_lone, second = rows
            if not same_bits(first, second):
                return f"{kept.place} returns other values in a second pass over the same images"
            is_alone = is_close(of_lone[1], first[1]) or self._is_same_among_large(rest, position, first[1])
            if not (is_alone and is_close(of_moved, first[[-1, 0]])):
                return f"the output of {kept.place} for an image depends on the other images of the batch"
        self._run(self.network, self.part)  # state that a forward leaves for the next one is now of other images
        difference = self._difference(expected, lambda poison: self._run(lambda: rest.run(tensors, poison), ((), {})))
        if difference is None:
            return None
        if not same_output(expected, self._run(self.network, self.whole)):
            return "the network returns another output for the same images and the same random numbers"
        return (
            "the trainable part needs more than the outputs of frozen modules (the input, the result of a function, or "
            f"state from a hook or an earlier call): without that {difference}"
        )

    def _is_same_among_large(self, rest: Rest, position: int, row: torch.Tensor) -> bool:
        """Return whether an image's row is the same, bit for bit, among large values of either sign.

        Kernels on the CPU that compute several images at once may let NaN pass from one to another (csatv2).
        """
        large = (self._of_batch(functools.partial(among, value)) for value in (-LARGE, LARGE))
        return all(same_bits(self._run(rest.record, batch)[position][1], row) for batch in large)

    def _difference(self, expected: Any, replay: Callable[[StandIn], Any]) -> str | None:
        for poison in POISONS:
            try:
                output = replay(poison)
            except Exception as error:  # a forward may raise any error for such values
                return f"it {_raises(error)}"
            if not same_output(expected, output):
                return "its output differs"
        return None

    def _run(self, call: Callable[..., Any], batch: Any, seed: int = 0) -> Any:
        inputs, keywords = tree_map(copy_leaf, batch)  # a forward may modify its inputs
        with undisturbed(self.network):
            torch.manual_seed(seed)
            torch.clear_autocast_cache()  # a trace does not know that a weight cast before it is trainable
            return call(*inputs, **keywords)

    @contextmanager
    def _mode(self, training: bool) -> Iterator[None]:
        if training == self.network.training:
            yield
            return
        with preserve_modes(self.network):
            for module in self.network.modules():
                module.training = training
            yield

    def _why_nothing_is_cacheable(self) -> str:
        for path, module in self.network.named_modules():
            own = list(module.parameters(recurse=False))
            if module.training and own and not any(parameter.requires_grad for parameter in own):
                return f"{path} is frozen and in train mode; call its eval()"
        return "no frozen module depends on the input alone, without trainable parameters and randomness before it"


def _why_not_to_look(network: nn.Module) -> str | None:
    trains = [parameter.requires_grad for parameter in network.parameters()]
    if any(hasattr(parameter, "to_local") for parameter in network.parameters()):
        return "the parameters are sharded over processes"
    if not any(trains):
        return "no parameter trains"
    return "every parameter trains" if all(trains) else None


def _count_images(batch: Any) -> int:
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.ndim]
    if not tensors or len(tensors[0]) <= _PART:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "none"
        raise ValueError(
            f"find_frontier: got tensors of shape {shapes}; pass a batch of {_PART + 1} or more images in the form "
            "that the network takes."
        )
    return len(tensors[0])


def _written_since(saved: Buffers) -> list[tuple[nn.Module, str]]:
    return [
        (module, name)
        for (module, name), (buffer, values) in saved.items()
        if getattr(module, name, None) is not buffer or not same_bits(buffer, values)
    ]


def _is_batch(leaf: object, images: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and len(leaf) == images


def _raises(error: Exception) -> str:
    return f"raises {type(error).__name__} ({str(error).partition(chr(10))[0][:200]})"


def _why_it_tells_nothing(output: Any) -> str | None:
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    if not any(tensor.requires_grad for tensor in tensors):
        return "the output does not require a gradient"
    if any(can_be_nan(tensor) and bool(tensor.isnan().any()) for tensor in tensors):
        return "the output for this batch contains NaN"
    return None
