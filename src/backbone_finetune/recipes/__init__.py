"""Recipes: from images to a fine-tuned model, its evaluation, and the record of its training.

They need the extra ``recipes``; the core never imports them.
"""

from .commands.evaluate import evaluate_images
from .commands.inspect import inspect
from .commands.predict import Prediction, predict
from .commands.reporting.scores import ClassScore, Evaluation, TableEvaluation
from .commands.runs.metrics import Metrics
from .commands.runs.run_record import read_run
from .commands.settings import TrainSettings
from .commands.train import train
from .data.augmentation import Augmentation
from .data.fingerprint import data_fingerprint, is_deterministic
from .data.images import ImageDataset, LabelledFolder
from .data.sources.finding import find_images, find_splits
from .export.checks import Exported
from .export.hub_folder import export_hub_folder
from .export.onnx_model import export_onnx
from .export.openvino_model import export_openvino
from .export.timm_checkpoint import export_timm
from .export.torch_program import export_torch
from .features.cache import FeatureCache
from .features.compiled import compile_inductor, compile_openvino
from .features.dataset import Features, feature_batches
from .features.extract import extract_features
from .heads.grid import HeadResult, fit_heads
from .heads.lbfgs import LbfgsResult, fit_lbfgs
from .heads.neighbors import predict_neighbors
from .memory import keep_freed_memory
from .models.file import TrainedModel, load_trained_model, save_trained_model
from .models.named import NamedModel, load_timm_model
from .models.onnx_file import load_onnx_model
from .objectives.kinds import MultiLabel, Regression, SingleLabel, SoftLabels
from .training.config import TrainerConfig
from .training.epoch import DivergedError
from .training.folds import cross_predict, cross_validate
from .training.loop import fine_tune
from .training.phases import Phase, read_phases, tuning_phases
from .training.processes import make_accelerator
from .training.progress import EpochResult
from .training.scoring import Score, evaluate

__all__ = [
    "Augmentation",
    "ClassScore",
    "DivergedError",
    "EpochResult",
    "Evaluation",
    "Exported",
    "FeatureCache",
    "Features",
    "HeadResult",
    "ImageDataset",
    "LabelledFolder",
    "LbfgsResult",
    "Metrics",
    "MultiLabel",
    "NamedModel",
    "Phase",
    "Prediction",
    "Regression",
    "Score",
    "SingleLabel",
    "SoftLabels",
    "TableEvaluation",
    "TrainSettings",
    "TrainedModel",
    "TrainerConfig",
    "compile_inductor",
    "compile_openvino",
    "cross_predict",
    "cross_validate",
    "data_fingerprint",
    "evaluate",
    "evaluate_images",
    "export_hub_folder",
    "export_onnx",
    "export_openvino",
    "export_timm",
    "export_torch",
    "extract_features",
    "feature_batches",
    "find_images",
    "find_splits",
    "fine_tune",
    "fit_heads",
    "fit_lbfgs",
    "inspect",
    "is_deterministic",
    "keep_freed_memory",
    "load_onnx_model",
    "load_timm_model",
    "load_trained_model",
    "make_accelerator",
    "predict",
    "predict_neighbors",
    "read_phases",
    "read_run",
    "save_trained_model",
    "train",
    "tuning_phases",
]
