"""Export with ``torch.export``: the network as a graph, which needs neither timm nor this library."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..models.file import TrainedModel, describe_use
from .checks import Comparison, Exported, converting, staging


def export_torch(trained: TrainedModel, path: Path, *, images: Sequence[Path] = ()) -> Exported:
    """Write a ``.pt2`` file with ``torch.export``, for any batch size, and check it after loading.

    ``torch.export.load(path, extra_files=files)`` fills in ``class_names.json``, ``data_config.json`` and
    ``objective.json`` (null for one class per image), if ``files`` has these keys.

    >>> import timm
    >>> from tempfile import TemporaryDirectory
    >>> from backbone_finetune import FineTuneModel
    >>> model = FineTuneModel.from_timm("test_resnet", num_classes=2)
    >>> trained = TrainedModel(model, "test_resnet", ("cat", "dog"), timm.data.resolve_model_data_config(model))
    >>> with TemporaryDirectory() as folder:
    ...     exported = export_torch(trained, Path(folder, "model.pt2"))
    ...     network = torch.export.load(exported.path).module()
    >>> network(torch.randn(5, 3, 160, 160)).shape
    torch.Size([5, 2])

    Args:
        trained: The model.
        path: A file that does not exist yet and ends in ``.pt2``.
        images: Image files to compare the logits on; without any, noise is.

    Raises:
        FileExistsError: the file exists already.
        ValueError: it cannot be converted, or the file has different logits.
    """
    comparison = Comparison(trained, images)
    example = torch.zeros(2, *comparison.inputs.shape[1:])
    batch = {0: torch.export.Dim.DYNAMIC}
    files = {f"{name}.json": text for name, text in {"objective": "null", **describe_use(trained)}.items()}
    with staging(path, ".pt2") as temporary:
        with converting("torch.export"):
            program = torch.export.export(comparison.network, (example,), dynamic_shapes=(batch,))
            torch.export.save(program, temporary, extra_files=files)
            loaded = torch.export.load(temporary).module()
        return comparison.prove(loaded, path, use=f"torch.export.load({str(path)!r}).module()")
