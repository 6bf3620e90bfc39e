"""What the command line runs: pictures in, a fine-tuned model and the record of its training out.

The recipes stand on the core and may use more than torch and timm; the core knows nothing of them.
"""

from .features import FeatureCache, extract_features, feature_batches
from .fingerprints import data_fingerprint, is_deterministic
from .heads import HeadResult, fit_heads
from .inspection import inspect
from .lbfgs import LbfgsResult, fit_lbfgs
from .prediction import predict
from .run import TrainSettings, train

__all__ = [
    "FeatureCache",
    "HeadResult",
    "LbfgsResult",
    "TrainSettings",
    "data_fingerprint",
    "extract_features",
    "feature_batches",
    "fit_heads",
    "fit_lbfgs",
    "inspect",
    "is_deterministic",
    "predict",
    "train",
]
