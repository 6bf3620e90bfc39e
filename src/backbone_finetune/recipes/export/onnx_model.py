"""Export to ONNX, with or without the preprocessing in the graph."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from ..extras import import_extra
from ..models.file import TrainedModel, describe_use
from ..models.onnx_file import load_onnx_model
from .checks import Comparison, Exported, converting, staging
from .onnx_preprocessing import build_preprocessing

# Relative to the largest logit, if a pixel may differ by 1 or 2 of 255.
PREPROCESSING_TOLERANCE = 0.05


def export_onnx(
    trained: TrainedModel, path: Path, *, images: Sequence[Path] = (), preprocessing: bool = False
) -> Exported:
    """Write an ``.onnx`` file in float32, with a batch of any size, and check it as onnxruntime runs it.

    Class names and preprocessing are in its metadata, as JSON, where ``predict`` finds them. It takes the extra
    ``onnx``.

    Args:
        trained: The model.
        path: A file that does not exist yet and ends in ``.onnx``.
        images: Image files on which the logits are compared. Without any, noise is used.
        preprocessing: Whether the graph itself resizes, crops and normalises. Its input is then ``image``, uint8
            ``(B, height, width, C)`` in RGB or grey, of any height and width; otherwise ``input``, float32
            ``(B, C, H, W)``.

    Raises:
        FileExistsError: the file exists already.
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: the file has different logits, or the preprocessing is not supported.
    """
    onnx, _ = import_extra("onnx", "onnx"), import_extra("onnxscript", "onnx")
    comparison = Comparison(trained, images)
    graph = build_preprocessing(trained.data_config) if preprocessing else None
    with staging(path, ".onnx") as temporary:
        model = _convert(comparison.network, comparison.inputs)
        if graph is not None:
            graph.ir_version = model.ir_version
            graph.opset_import[0].version = next(each.version for each in model.opset_import if not each.domain)
            model = onnx.compose.merge_models(graph, model, io_map=[("preprocessed", "input")])
            del model.opset_import[0]  # it would be there twice
        onnx.helper.set_model_props(model, {"architecture": trained.architecture, **describe_use(trained)})
        onnx.save_model(model, temporary)
        loaded = load_onnx_model(temporary).model

        def run(batch: Tensor) -> Tensor:
            pictures = comparison.pictures[: len(batch)]
            return torch.cat([loaded(pil_to_tensor(picture)[None]) for picture in pictures])

        return comparison.prove(
            run if preprocessing else loaded,
            path,
            use=f"onnxruntime.InferenceSession({str(path)!r})",
            **({"tolerance": PREPROCESSING_TOLERANCE} if preprocessing else {}),
        )


def _convert(network: nn.Module, inputs: Tensor) -> Any:
    """Convert a network to a model of ONNX in the opset that torch recommends."""
    with converting("torch.onnx"):
        program = torch.onnx.export(
            network,
            (torch.zeros(2, *inputs.shape[1:]),),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            input_names=["input"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None  # None only for the old exporter
    model = program.model_proto
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]  # stack traces with paths of this machine
    return model
