"""The frozen front of a model, and its pass over images in the fastest precision of the device."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from backbone_finetune import FineTuneModel
from backbone_finetune.eval_caches import preserve_modes
from backbone_finetune.frontier import Frontier, NoFrontier, find_frontier

from ..data.images import spread_rows
from ..data.loading import DeviceLoader, can_fork
from ..data.targets import describe_value, split_row
from ..precision import has_tensor_cores
from ..sending import send
from .compiled import Compile, Run, compile_checked
from .dataset import Features
from .running import Runner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Front:
    """The part of a model that computes the same for an image in every epoch."""

    backbone: nn.Module
    module: nn.Module  # in eval mode while ``run`` runs
    run: Callable[..., Any]  # from the inputs of a batch to the inputs of ``rest``
    rest: nn.Module  # trains, and returns the logits
    description: str = "the output of the backbone"  # the kept tensors of each image
    trained: frozenset[str] = frozenset()  # parameters and buffers of the backbone that training changes


def front_of_backbone(model: FineTuneModel) -> Front:
    """Return the front of a model with a frozen backbone: the backbone, and its classifier as the rest."""
    if has_trainable(model.backbone):
        raise ValueError("features of a backbone that trains change with every step; call freeze_backbone() first")
    return Front(model.backbone, model.backbone, model.backbone, model.classifier)


class UncacheableError(ValueError):
    """The outputs cannot be stored per image, or are too large, or there are none that stay the same."""


def find_front(model: FineTuneModel, inputs: Sequence[Tensor]) -> Front:
    """Find the front of a partly frozen model by `find_frontier` on a batch; raise UncacheableError if it has none."""
    if not len(inputs[0]) > 2:
        raise UncacheableError("it is proved on 3 images or more")
    with preserve_modes(model):
        model.train()
        found = find_frontier(model, *inputs)
    if isinstance(found, NoFrontier):
        raise UncacheableError(found.reason)
    names = {*dict(model.named_parameters()), *dict(model.named_buffers())} - model.frozen_names()
    trained = frozenset(name.removeprefix("backbone.") for name in names if name.startswith("backbone."))
    return Front(model.backbone, model, found.record, Replay(found), str(found), trained)


class Replay(nn.Module):
    """The rest of a model after its frontier, as a module of one argument: the recorded tensors."""

    def __init__(self, frontier: Frontier) -> None:
        super().__init__()
        self.rest = frontier.rest

    def forward(self, tensors: Sequence[Tensor]) -> Any:
        """Compute the logits."""
        return self.rest(*tensors)


def has_trainable(module: nn.Module) -> bool:
    """Return whether any parameter of a module trains."""
    return any(parameter.requires_grad for parameter in module.parameters())


@contextmanager
def in_eval(module: nn.Module) -> Iterator[None]:
    """Set a module to eval mode in the block, and restore the mode of each submodule after it."""
    with preserve_modes(module):
        module.eval()
        yield


def autocast_dtype(backbone: nn.Module, device: torch.device) -> torch.dtype | None:
    """Return bf16 if it is faster for a float32 backbone on a device, else None."""
    if any(parameter.is_floating_point() and parameter.dtype != torch.float32 for parameter in backbone.parameters()):
        return None
    # Without bf16 instructions, EfficientNet-Lite0 took 20 times as long on an AMD CPU.
    is_faster = torch.cpu._is_avx512_bf16_supported() if device.type == "cpu" else has_tensor_cores(device)
    return torch.bfloat16 if is_faster else None


@dataclass
class FrozenPass:
    """Runs the front of a model over batches, under autocast to ``dtype`` unless it is None.

    If a batch does not fit into the memory of the device, it and all later ones run in parts of half its size.
    """

    front: Front  # the caller sets its ``module`` to eval
    device: torch.device  # of the front
    dtype: torch.dtype | None
    widens: bool = True  # store results in ``dtype`` as float32
    compile: Compile | None = None  # see ``extract_features``
    runner: Runner = field(default_factory=partial(Runner, "the backbone"))

    def __post_init__(self) -> None:
        self._run: Run = self.front.run

    def over(self, loader: DataLoader[Any], title: str | None = None) -> Iterator[Features]:
        """Run over each batch of a loader; a ``title`` shows a progress bar.

        On a CPU, the worker that loaded a batch also runs the front on it. There, each batch runs on one core, whether
        there are workers or not: with other numbers of threads, the last bits of some networks differ.
        """
        show = partial(tqdm, desc=title, unit="batch", disable=title is None)
        if isinstance(loader, DeviceLoader) and self.device.type == "cpu" and self.compile is None and can_fork():
            yield from show(loader.over(loader.batches, compute=self._on_one_core))
        else:
            yield from self._each(show(loader))

    def sample(self, loader: DataLoader[Any]) -> Features:
        """Run on up to eight images, spread over all, without compiling."""
        return replace(self, compile=None)(load_sample(loader))

    def _on_one_core(self, batch: Any) -> Features:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self(batch)
        finally:
            torch.set_num_threads(threads)

    def __call__(self, batch: Any) -> Features:
        """Run on one batch, and return the results and the targets on the CPU, or raise UncacheableError."""
        (features,) = self._each([batch])
        return features

    def _each(self, batches: Iterable[Any]) -> Iterator[Features]:
        """Run on each batch; a CUDA device has the next one queued while the host waits for the results of one."""
        queued: list[tuple[Features, torch.cuda.Event]] = []
        for batch in batches:
            features = self._start(batch)
            if self.device.type != "cuda":
                yield features
                continue
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))  # which may not be torch's current device
            queued.append((features, event))
            if len(queued) > 1:
                yield _wait(*queued.pop(0))
        for features, event in queued:
            yield _wait(features, event)

    def _start(self, batch: Any) -> Features:
        """Run on one batch; on CUDA, the results are complete after what is queued by then."""
        inputs, targets = split_row(batch)
        module = self.front.module
        taken = signature(module.forward)
        try:
            taken.bind(*inputs)
        except TypeError:
            raise ValueError(
                f"the dataset's rows have {len(inputs)} inputs before the target, which {type(module).__name__}.forward"
                f"{taken} does not take"
            ) from None
        inputs = [send(tensor, self.device) for tensor in inputs]
        # Not inference_mode: its tensors, and tensors that modules cache in it, cannot be used in autograd later.
        with torch.no_grad(), torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            slots, structure = self.runner.run(self._compute, inputs, module)
        for slot in slots:
            if not isinstance(slot, Tensor) or slot.ndim == 0 or len(slot) != len(targets):
                raise UncacheableError(
                    f"the backbone gave {describe_value(slot)} for {len(targets)} images; it must give tensors with "
                    "one entry per image, alone or in a tuple, list or dict"
                )
        widened = (slot.float() if self.widens and slot.dtype == self.dtype else slot for slot in slots)
        # From CUDA this queues copies into pinned memory.
        on_cuda = self.device.type == "cuda"
        return Features([each.to("cpu", non_blocking=on_cuda) for each in (*widened, targets)], structure)

    def _compute(self, *inputs: Tensor) -> Any:
        if self.compile is not None:
            tolerance = 5e-2 if self.dtype is not None else 1e-3
            self._run = compile_checked(self.compile, self.front.backbone, inputs, tolerance=tolerance)
            self.compile = None
        return self._run(*inputs)


def _wait(features: Features, event: torch.cuda.Event) -> Features:
    event.synchronize()
    return features


def load_sample(loader: DataLoader[Any]) -> Any:
    """Load up to eight images, spread over all, as one batch of a loader."""
    rows = spread_rows(len(loader.dataset))  # type: ignore[arg-type]  # torch's Dataset declares no length
    if isinstance(loader, DeviceLoader):
        return next(iter(loader.over([rows], workers=0)))
    chosen = Subset(loader.dataset, rows)
    # With a separate generator, a loader draws nothing from torch's.
    return next(iter(DataLoader(chosen, len(rows), collate_fn=loader.collate_fn, generator=torch.Generator())))
