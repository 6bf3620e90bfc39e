"""Compile a frozen backbone for its pass; the result is used only if it returns the backbone's own features.

On one core of an AMD EPYC with bf16 instructions, EfficientNet-Lite0 at 224 pixels, torch 2.14.1 (the benchmark
``pictures_per_second.py``): OpenVINO takes 5.8 ms of CPU time per image and 11 s to compile; the bf16 pass takes 9.1 ms
with freed memory kept (``keep_freed_memory``), and 14.4 without. In the command line it pays from some 3,400 images on.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..extras import import_extra
from ..text import one_line

logger = logging.getLogger(__name__)

Run = Callable[..., Any]
Compile = Callable[[nn.Module], Run]


def compile_inductor(backbone: nn.Module) -> Run:
    """Compile with ``torch.compile`` and frozen weights. Takes a minute or more, and needs a C++ compiler on a CPU."""
    return torch.compile(backbone, dynamic=False, options={"freezing": True})


def compile_openvino(backbone: nn.Module) -> Run:
    """Compile with OpenVINO, for CPUs. Takes seconds, and needs the extra ``openvino``.

    Raises:
        ModuleNotFoundError: OpenVINO is not installed.
    """
    openvino = import_extra("openvino", "openvino")
    compiled: Any = None

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        nonlocal compiled
        inputs = tuple(each.contiguous() for each in inputs)
        if compiled is None:
            # OpenVINO traces in float32, chooses the precision itself, and emits torch's warnings about tracing.
            with torch.autocast("cpu", enabled=False), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                shapes = [tuple(each.shape) for each in inputs]
                converted = openvino.convert_model(backbone, example_input=inputs, input=shapes)
            settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
            settings["INFERENCE_PRECISION_HINT"] = "bf16" if torch.is_autocast_enabled("cpu") else "f32"
            compiled = openvino.compile_model(converted, "CPU", settings)
        outputs = compiled([each.numpy() for each in inputs], share_inputs=True)
        return tuple(torch.from_numpy(outputs[port].copy()) for port in compiled.outputs)

    return run


# by the names of the command line
COMPILERS: dict[str, Compile] = {"inductor": compile_inductor, "openvino": compile_openvino}


def compile_checked(compile: Compile, backbone: nn.Module, inputs: Sequence[Tensor], *, tolerance: float) -> Run:  # noqa: A002
    """Compile a backbone for batches of one size, or return the backbone if that fails or its features differ.

    Both compute the first batch, ``inputs``. For a smaller last batch, the backbone itself runs.
    ``tolerance`` is the largest allowed difference, relative to the largest feature.
    """
    expected, structure = tree_flatten(backbone(*inputs))
    count = len(inputs[0])

    def run(*batch: Tensor) -> Any:
        if len(batch[0]) != count:
            return backbone(*batch)
        return tree_unflatten(tree_flatten(compiled(*batch))[0], structure)

    try:
        compiled = compile(backbone)
        for found, slot in zip(tree_flatten(compiled(*inputs))[0], expected, strict=True):
            largest = float(slot.abs().max())
            assert_close(found.float(), slot.float(), rtol=0, atol=tolerance * largest)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # compilers may raise anything; without them the pass is slower, but correct
        logger.warning(
            "features: not compiled, the backbone itself runs (%s: %s)", type(error).__name__, one_line(error, most=200)
        )
        return backbone
    return run
