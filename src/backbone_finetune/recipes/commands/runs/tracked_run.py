"""``train --log-with``: the tracker of a run, which a resumed run continues."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator

from backbone_finetune.files import replacing

from ...text import one_line
from ...training.tracking import PROJECT, flatten
from ..settings import TrainSettings
from .run_folder import UNFINISHED

TRACKED_FILE = "tracked.json"
MLFLOW_URI = "MLFLOW_TRACKING_URI"


@contextmanager
def local_tracking(settings: TrainSettings) -> Iterator[None]:
    """Let mlflow write into the output folder, unless it was told where to: its default is the current folder."""
    if settings.log_with != "mlflow" or MLFLOW_URI in os.environ:
        yield
        return
    os.environ[MLFLOW_URI] = f"sqlite:///{settings.output.absolute().as_posix()}/mlflow.db"
    try:
        yield
    finally:
        del os.environ[MLFLOW_URI]


def start_tracker(settings: TrainSettings, accelerator: Accelerator, arguments: Mapping[str, Any]) -> None:
    """Start the tracker of a run, or go on with it if the run resumes. It is on the main process alone.

    Raises:
        ValueError: the tracker does not start, e.g. because its server does not answer.
    """
    if settings.log_with is None:
        return
    file, kind = settings.output / UNFINISHED / TRACKED_FILE, settings.log_with
    known = json.loads(file.read_text()).get(kind) if file.exists() else None
    name = known or time.strftime("%Y%m%d-%H%M%S")
    options: dict[str, str] = {
        "tensorboard": {},
        "wandb": {"name": settings.output.name, "dir": str(settings.output)},
        "mlflow": {"run_name": settings.output.name},
    }[kind]
    if known is not None:
        options |= {"wandb": {"id": known, "resume": "allow"}, "mlflow": {"run_id": known}}.get(kind, {})
    # TensorBoard has a folder for each run, so that a run that replaces another does not go on with its curves.
    project = f"tensorboard/{name}" if kind == "tensorboard" else PROJECT
    try:
        accelerator.init_trackers(project, flatten(arguments) if known is None else None, {kind: options})
    except Exception as error:
        raise ValueError(
            f"--log-with {kind}: {type(error).__name__}: {one_line(error, most=300)}; leave it out, or correct this"
        ) from error
    run: Any = accelerator.get_tracker(kind, unwrap=True)
    if kind != "tensorboard":
        name = run.id if kind == "wandb" else run.info.run_id
    with replacing(file) as temporary:
        temporary.write_text(json.dumps({kind: name}))
