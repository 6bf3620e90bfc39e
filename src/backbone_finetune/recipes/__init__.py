"""What the command line runs: images in, a fine-tuned model and the record of its training out.

The recipes stand on the core and may use more than torch and timm; the core knows nothing of them.
"""

from .commands.inspect import inspect
from .commands.predict import predict
from .commands.train import TrainSettings, train
from .data.fingerprint import data_fingerprint, is_deterministic
from .features.extract import FeatureCache, extract_features, feature_batches
from .heads.grid import HeadResult, fit_heads
from .heads.lbfgs import LbfgsResult, fit_lbfgs
from .training.loop import TrainerConfig, fine_tune
from .training.phases import Phase, read_phases
from .training.processes import make_accelerator

__all__ = [
    "FeatureCache",
    "HeadResult",
    "LbfgsResult",
    "Phase",
    "TrainSettings",
    "TrainerConfig",
    "data_fingerprint",
    "extract_features",
    "feature_batches",
    "fine_tune",
    "fit_heads",
    "fit_lbfgs",
    "inspect",
    "is_deterministic",
    "make_accelerator",
    "predict",
    "read_phases",
    "train",
]
