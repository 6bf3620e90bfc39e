"""What the command line runs: pictures in, a fine-tuned model and the record of its training out.

The recipes stand on the core and may use more than torch and timm; the core knows nothing of them.
"""

from .features import FeatureCache, extract_features, feature_batches
from .fingerprints import data_fingerprint, is_deterministic
from .heads import HeadResult, fit_heads
from .inspection import inspect
from .lbfgs import LbfgsResult, fit_lbfgs
from .phases import Phase, read_phases
from .prediction import predict
from .processes import make_accelerator
from .run import TrainSettings, train
from .training import Loop, fine_tune

__all__ = [
    "FeatureCache",
    "HeadResult",
    "LbfgsResult",
    "Loop",
    "Phase",
    "TrainSettings",
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
