"""Read a model that was exported to ONNX, and run it with onnxruntime on the CPU."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..extras import import_extra
from ..text import one_line
from .metadata import parse_metadata
from .named import NamedModel


class OnnxNetwork(nn.Module):
    """Runs a session of onnxruntime on ``(B, C, H, W)`` and returns logits."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session
        (self.input,) = session.get_inputs()
        self.preprocesses = self.input.type == "tensor(uint8)"

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits; a graph with preprocessing takes images as ``(B, H, W, C)``."""
        images = images.movedim(1, -1) if self.preprocesses else images
        (logits,) = self.session.run(None, {self.input.name: images.contiguous().numpy()})
        return torch.from_numpy(logits)


def load_onnx_model(path: Path) -> NamedModel:
    """Read a file that ``export_onnx`` wrote; class names and preprocessing are in its metadata.

    Args:
        path: The ``.onnx`` file.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: onnxruntime is not installed.
        ValueError: it is not an ONNX file, or has no class names.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    onnxruntime = import_extra("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only; it warns about its own optimizations
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class
        raise ValueError(f"{path}: not a readable ONNX file ({one_line(error, most=300)})") from error
    try:
        description = parse_metadata(session.get_modelmeta().custom_metadata_map)
        network = OnnxNetwork(session).eval()
    except ValueError as error:
        raise ValueError(f"{path}: not a file of `backbone-finetune export --to onnx`; {error}") from error
    names, config = description.class_names, description.data_config.model_dump()
    return NamedModel(network, names, config, network.preprocesses, description.make_objective())
