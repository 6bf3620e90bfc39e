"""A folder in timm's format for the Hugging Face hub; nothing is uploaded."""

import json
from collections.abc import Sequence
from pathlib import Path

import timm
from timm.models._hub import save_config_for_hf  # save_for_hf refuses tied tensors

from ..models.file import TrainedModel
from ..objectives.kinds import SingleLabel
from .checks import Comparison, Exported, staging
from .timm_checkpoint import make_timm_network, save_weights


def export_hub_folder(trained: TrainedModel, path: Path, *, images: Sequence[Path] = ()) -> Exported:
    """Write a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads, and check its logits.

    ``AutoModelForImageClassification.from_pretrained`` of transformers also loads it.

    ``config.json`` holds the architecture, the preprocessing and the class names, ``model.safetensors`` the weights.

    >>> from tempfile import TemporaryDirectory
    >>> from backbone_finetune import FineTuneModel
    >>> model = FineTuneModel.from_timm("test_resnet", num_classes=2)
    >>> trained = TrainedModel(model, "test_resnet", ("cat", "dog"), timm.data.resolve_model_data_config(model))
    >>> with TemporaryDirectory() as folder:
    ...     exported = export_hub_folder(trained, Path(folder, "hub"))
    ...     network = timm.create_model(f"local-dir:{folder}/hub", pretrained=True)
    >>> network.pretrained_cfg["label_names"]
    ['cat', 'dog']

    Args:
        trained: The model.
        path: A folder that does not exist yet.
        images: Image files to compare the logits on; without any, noise is.

    Raises:
        FileExistsError: the folder exists already.
        ValueError: the model does not predict one class per image, or timm's network cannot contain the classifier.
    """
    if not isinstance(trained.objective, SingleLabel):
        kind = type(trained.objective).__name__
        raise ValueError(
            f"timm and transformers read the outputs of a hub folder as one class per image, and this model is {kind}; "
            "export --to onnx, which keeps the objective, or --to timm"
        )
    network = make_timm_network(trained)
    comparison = Comparison(trained, images)
    with staging(path) as folder:
        folder.mkdir()
        save_weights(network, folder / "model.safetensors")
        save_config_for_hf(
            network,
            str(folder / "config.json"),
            model_config={"label_names": list(trained.class_names)},
            model_args=dict(trained.arguments),
            data_config=dict(trained.data_config),
        )
        config = json.loads((folder / "config.json").read_text())
        del config["model_args"]["num_classes"]  # transformers raises an error for duplicate entries
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        return comparison.prove(loaded, path, use=f"timm.create_model({f'local-dir:{path}'!r}, pretrained=True)")
