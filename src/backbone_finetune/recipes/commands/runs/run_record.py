"""``run.json``: the record of a run, with which the run can be repeated."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError, field_validator

from ...features.cache import backbone_fingerprint
from ...features.frozen_pass import autocast_dtype
from ...files import check_file
from ...models.metadata import installed_versions
from ...text import describe_fault
from ...training.config import TrainerConfig
from ..settings import TrainSettings
from ..setup import Task
from .run_folder import find_differences

# Settings without effect on the model; the folder may be moved.
NOT_RECORDED = {"output", "overwrite", "baselines", "check_labels", "log_with", "workers", "cache"}

FOLDER = "local-dir:"


class _RunFile(BaseModel):
    arguments: TrainSettings

    @field_validator("arguments", mode="before")
    @classmethod
    def _check_recorded(cls, arguments: Any) -> Any:
        if isinstance(arguments, Mapping) and NOT_RECORDED & arguments.keys():
            raise ValueError(f"{', '.join(sorted(NOT_RECORDED))} are not part of a record")
        return arguments


def record_run(
    settings: TrainSettings, task: Task, config: TrainerConfig, fingerprints: Mapping[str, str]
) -> dict[str, Any]:
    """Describe a run: its effective settings, versions, images and backbone.

    Paths are absolute, so that the run can be repeated from any folder, and precisions are those in use.
    """
    accelerator = config.accelerator
    arguments = {
        name: str(value.absolute()) if isinstance(value, Path) else value
        for name, value in asdict(settings).items()
        if name not in NOT_RECORDED
    }
    if (name := settings.architecture or "").startswith(FOLDER):
        arguments["architecture"] = f"{FOLDER}{Path(name.removeprefix(FOLDER)).absolute()}"
    arguments["mixed_precision"] = accelerator.mixed_precision
    arguments["autocast_features"] = (
        config.autocast_features and autocast_dtype(task.model.backbone, accelerator.device) is not None
    )
    return {
        "arguments": arguments,
        "versions": installed_versions(),
        **{f"{name}_images": {"count": len(data), "digest": fingerprints[name]} for name, data in task.parts.items()},
        "backbone_digest": backbone_fingerprint(task.model.backbone),
    }


def compare_runs(recorded: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """List the differences of a repeated run: versions, images, backbone, or a precision."""

    def compared(run: Mapping[str, Any]) -> dict[str, Any]:
        precisions = {name: run["arguments"].get(name) for name in ("mixed_precision", "autocast_features")}
        return {**run, "arguments": precisions}

    return find_differences(compared(recorded), compared(record))


def read_run(path: Path) -> tuple[TrainSettings, dict[str, Any]]:
    """Read a ``run.json``: the settings, with the default output folder, and the whole record."""
    wanted = "pass the run.json that a training run wrote"
    check_file(path, wanted)
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
        return _RunFile.model_validate(record).arguments, record
    except ValidationError as error:
        raise ValueError(f"{path}: {describe_fault(error)}; {wanted}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); {wanted}") from error
