"""Export to a plain timm checkpoint for timm's scripts, with the class map that they need."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from backbone_finetune import FineTuneModel, TokenReadout
from backbone_finetune.checkpoint import write_safetensors

from ..models.file import TrainedModel
from .checks import Comparison, Exported, staging


def export_timm(trained: TrainedModel, path: Path, *, images: Sequence[Path] = ()) -> Exported:
    """Write a checkpoint that ``timm.create_model(..., checkpoint_path=path)`` loads strictly, and check its logits.

    It also writes ``model.classes.txt``, the class map of timm's scripts, which order class
    folders differently (1, 2, 10) than this library (1, 10, 2).

    >>> from tempfile import TemporaryDirectory
    >>> model = FineTuneModel.from_timm("test_resnet", num_classes=2)
    >>> trained = TrainedModel(model, "test_resnet", ("cat", "dog"), timm.data.resolve_model_data_config(model))
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "plain.safetensors")
    ...     exported = export_timm(trained, path)
    ...     network = timm.create_model("test_resnet", num_classes=2, checkpoint_path=path)
    ...     path.with_suffix(".classes.txt").read_text().split()
    ['cat', 'dog']

    Args:
        trained: The model.
        path: A file that does not exist yet and ends in ``.safetensors``.
        images: Image files to compare the logits on; without any, noise is.

    Raises:
        FileExistsError: the file exists already.
        ValueError: timm's network cannot contain the classifier.
    """
    network = make_timm_network(trained)
    comparison = Comparison(trained, images)
    arguments = {"num_classes": len(trained.class_names), **trained.arguments}
    given = "".join(f", {name}={value!r}" for name, value in arguments.items())
    use = f"timm.create_model({trained.architecture!r}{given}, checkpoint_path={str(path)!r})"
    with staging(path, ".safetensors") as temporary:
        save_weights(network, temporary)
        class_map = "".join(f"{name}\n" for name in trained.class_names)
        temporary.with_suffix(".classes.txt").write_bytes(class_map.encode(errors="surrogateescape"))
        loaded = timm.create_model(trained.architecture, checkpoint_path=temporary, **arguments).eval()
        return comparison.prove(loaded, path, use=use)


def make_timm_network(trained: TrainedModel) -> nn.Module:
    """Return timm's own network with the trained weights, on the CPU.

    Raises:
        ValueError: it cannot contain the classifier.
    """
    if obstacle := find_obstacle(trained.model, trained.architecture, **trained.arguments):
        raise ValueError(obstacle)
    network = timm.create_model(trained.architecture, num_classes=len(trained.class_names), **trained.arguments)
    network.load_state_dict(trained.model.to_module().state_dict())
    return network.eval()


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a state dict as safetensors, with tied tensors under each of their names, as timm expects."""
    state = network.state_dict()
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    write_safetensors(tensors, path, {"format": "pt"})


def find_obstacle(model: FineTuneModel, architecture: str, **arguments: Any) -> str | None:
    """Return why a model cannot be converted to timm's own network of its architecture and arguments, or None.

    >>> find_obstacle(FineTuneModel.from_timm("test_resnet", num_classes=3), "test_resnet")
    >>> find_obstacle(FineTuneModel.from_timm("levit_128s", num_classes=3), "levit_128s")
    "levit_128s: timm's own network has more in its classifier than one linear layer, so a trained ..."
    """
    if isinstance(model.backbone, TokenReadout):
        reason = "features of one token or their mean, and this model those of several"
    elif isinstance(model.classifier, nn.Sequential):
        reason = f"one linear layer as its classifier, and this model {len(model.classifier)} layers"
    else:
        with torch.device("meta"):
            plain = timm.create_model(architecture, num_classes=model.num_classes, **arguments)
        try:
            if _shapes(model.to_module()) == _shapes(plain):
                return None
            reason = "other tensors than the trained one"
        except ValueError:
            reason = "more in its classifier than one linear layer"
    return (
        f"{architecture}: timm's own network has {reason}, so a trained model cannot be exported to timm or "
        "hub-folder; export --to onnx, torch-export or openvino instead"
    )


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}
