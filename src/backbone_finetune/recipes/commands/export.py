"""``backbone-finetune export``: write a trained model in another format."""

from collections.abc import Callable

from ..export.checks import Exported
from ..export.hub_folder import export_hub_folder
from ..export.onnx_model import export_onnx
from ..export.openvino_model import export_openvino
from ..export.timm_checkpoint import export_timm
from ..export.torch_program import export_torch

# by the names of the command line
EXPORTERS: dict[str, Callable[..., Exported]] = {
    "timm": export_timm,
    "onnx": export_onnx,
    "torch-export": export_torch,
    "hub-folder": export_hub_folder,
    "openvino": export_openvino,
}


def describe_export(exported: Exported) -> str:
    """Describe what was written, its difference from the model, and how to load it."""
    images = exported.images
    on = f"{images} of your images" if images else "noise (pass --images to compare on your own images)"
    return (
        f"wrote {exported.path}\n"
        f"largest difference from the PyTorch logits: {exported.difference:.2g} "
        f"(largest logit {exported.largest:.2g}), on {on}\n"
        f"load it with {exported.use}"
    )
