"""Export to OpenVINO, for CPUs and other Intel devices."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..extras import import_extra
from ..models.file import TrainedModel, describe_use
from .checks import Comparison, Exported, converting, staging

# On a CPU with bf16, OpenVINO uses it by default, and logits differ by a percent.
PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}


def export_openvino(trained: TrainedModel, path: Path, *, images: Sequence[Path] = ()) -> Exported:
    """Write an ``.xml`` and a ``.bin`` file in float32, with a batch of any size, and check them as OpenVINO runs them.

    The class names are the model's ``labels``, where OpenVINO's Model API looks for them, in ``model_info``. They are
    also in ``backbone_finetune``, beside the preprocessing and the objective, in JSON. It takes the extra ``openvino``.

    Args:
        trained: The model.
        path: A file that does not exist yet and ends in ``.xml``; the weights are written beside it.
        images: Image files to compare the logits on; without any, noise is.

    Raises:
        FileExistsError: the file exists already.
        ModuleNotFoundError: OpenVINO is not installed.
        ValueError: it cannot be converted, or the file has different logits.
    """
    openvino = import_extra("openvino", "openvino")
    comparison = Comparison(trained, images)
    shape = tuple(comparison.inputs.shape[1:])
    with staging(path, ".xml") as temporary:
        with converting("OpenVINO"):
            model = openvino.convert_model(comparison.network, example_input=torch.zeros(2, *shape), input=[-1, *shape])
        labels = " ".join(name.replace(" ", "_") for name in trained.class_names)
        model.set_rt_info(labels.encode(errors="backslashreplace").decode(), ["model_info", "labels"])
        for name, text in describe_use(trained).items():
            model.set_rt_info(text, ["backbone_finetune", name])
        openvino.save_model(model, temporary, compress_to_fp16=False)
        compiled = openvino.compile_model(temporary, "CPU", PRECISION)

        def run(batch: Tensor) -> Tensor:
            return torch.from_numpy(compiled(batch.numpy())[0])

        return comparison.prove(run, path, use=f"openvino.compile_model({str(path)!r}, 'CPU', {PRECISION})")
