"""What the command line runs: pictures in, a fine-tuned model and the record of its training out.

The recipes stand on the core and may use more than torch and timm; the core knows nothing of them.
"""

from .inspection import inspect
from .prediction import predict
from .run import TrainSettings, train

__all__ = ["TrainSettings", "inspect", "predict", "train"]
