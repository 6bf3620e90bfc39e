"""The arguments of each command, with their help."""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from ..data.augmentation import AUGMENTATIONS
from ..export.checks import Exported
from ..export.hub_folder import export_hub_folder
from ..export.onnx_model import export_onnx
from ..export.openvino_model import export_openvino
from ..export.timm_checkpoint import export_timm
from ..export.torch_program import export_torch
from ..training.phases import Phase
from .settings import TrainSettings

BASE = "the base weights of a model of --trainable-only, if they are not found automatically"

TRAIN = {
    "--validation DATA": "images to choose on (default: DATA's val); without test images and --monitor, they are "
    "tested on",
    "--test DATA": "images to test on, once (default: DATA's test, else its val if nothing is chosen on it, else a "
    "share)",
    "--monitor": "keep the epoch that is best on the validation images (default: accuracy where there are validation "
    "and test images, else off; without validation images, a fifth of the training images is held out)",
    "--patience N": "end a phase after N epochs that are no better",
    "--folds K": "cross-validate on the training images in K folds too",
    "--model NAME": "an architecture of timm, local-dir:FOLDER or hf-hub:OWNER/NAME (default: tf_efficientnet_lite0, "
    "packaged weights)",
    "--pretrained": "timm's pretrained weights from the hub, or those of the folder",
    "--checkpoint FILE": "weights from a file, in place of --pretrained",
    "--base FILE": BASE,
    "--readout": "the features of a transformer: class token, mean of patch tokens, both, or class tokens of the last "
    "4 blocks, also with the mean (default: as the network pools)",
    "--head": "the classifier (default: linear)",
    "--input-size SIDE|HxW": "size of the images that the network takes: 96, or 96x128, height x width (default: its "
    "own size)",
    "--in-chans C": "channels of the images: 1 for grey of 8 or 16 bits, 3, or the number of bands in .npy and TIFF "
    "files (default: 3); pretrained weights of the first layer are adapted",
    "--tune": "train the head, then the last layer groups too, then everything, on random crops and mirror images; the "
    "number of images sets the epochs",
    "--seed S": "of the split, the classifier and the order of images",
    "--batch-size N": "images per step, in all processes together",
    "--accumulation N": "split each batch into N parts, to save memory",
    "--checkpoint-steps N": "write a checkpoint every N steps, and after each epoch",
    "--class-weights": "weight the loss of each image by N / (K * images of its class), for N images in K classes",
    "--label-smoothing SHARE": "share of each target spread over all classes",
    "--regression COLUMN[,COLUMN]": "columns of a table whose numbers are predicted, instead of a class or labels",
    "--soft-labels COLUMN,COLUMN": "columns of a table, one for each class, with its probability; each row sums to 1",
    "--group COLUMN": "a column of a table, such as patient: images of one group are never on two sides of a split "
    "(default: group, if the table has it)",
    "--workers N": "processes that load images (default: by cores and images)",
    "--cache": "where to cache the frozen features; off runs the whole model in every step",
    "--views K": "cache K augmented views of each training image; 1 draws new ones in each epoch",
    "--compile": "compile the frozen backbone; openvino (an extra) is faster on a CPU from about 5,000 images",
    "--output DIR": "folder of the results",
    "--device NAME": "cpu, cuda, cuda:1, mps, xpu, or auto: the accelerator that torch finds, else cpu",
    "--mixed-precision": "of steps on images (default: the launcher's, else bf16 on a CUDA device that has it, else "
    "no). Unless no is given, features are in bf16 where that is faster",
    "--trainable-only": "write only the tensors that training changed; loading needs the base weights",
    "--baselines": "also train on a random backbone and on raw pixels, to compare (always for the clipart)",
    "--check-labels": "list training images whose label looks wrong, by cleanlab (an extra), in 5 folds",
    "--log-with": "log settings and epochs to a tracker, an extra of that name (its files are in the output folder)",
    "--overwrite": "replace a finished model, or another run, in the output folder",
}

PHASE = {
    "--epochs N": "how often each image is seen",
    "--trainable-groups N": "number of last layer groups of the backbone that train",
    "--lr RATE": "of the classifier (default: from weights of 0 at a rate that fits the features if the backbone is "
    "frozen, else 1e-3)",
    "--backbone-lr RATE": "of the layer groups that train",
    "--layer-decay FACTOR": "factor on the rate for each layer towards the input (default: none)",
    "--weight-decay W": "of AdamW (default: 0.01)",
    "--warmup-epochs N": "epochs, or a fraction of one, in which the rates rise from 0",
    "--standardize": "train the classifier on features of mean 0 and standard deviation 1, folded into it afterwards",
    "--cosine": "let the rates fall to 0 at the end",
    "--norm-eval": "keep running statistics fixed even if weights train (default: yes; no for random weights)",
    "--augment": "draw new training images in each epoch: light is a random crop and mirror, strong adds RandAugment "
    "and random erasing; nothing is cached then, unless --views is given (default: none)",
    "--mixup ALPHA": "mix images and targets in pairs (try 0.2); nothing is cached then",
    "--cutmix ALPHA": "paste a part of one image of a pair into the other (try 1); nothing is cached then",
}


def add_train(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``train``."""
    parser.description = (
        "Train a classifier on images, on a frozen backbone. Without arguments: on the packaged clipart (ten "
        "classes), with EfficientNet-Lite0 and its packaged ImageNet weights; nothing is downloaded. To resume a "
        "stopped run, give the same command again."
    )
    parser.add_argument(
        "images",
        nargs="?",
        type=Path,
        metavar="DATA",
        help="a folder with a sub-folder of images per class, or with train, val and test of such folders; a table "
        "with the columns path, label (or labels, as cat;dog) and, optionally, split and group (.csv, .tsv, .parquet); "
        ".tar files with class folders or samples of webdataset, a folder of them or 'train-{0000..0003}.tar'; or a "
        "dataset of Hugging Face on disk",
    )
    text = "a TOML file with a [[phases]] table for each phase"
    parser.add_argument("--phases", type=Path, metavar="FILE", help=text)
    parser.add_argument("--run", type=Path, metavar="FILE", help="a run.json: repeat that run, into another folder")
    add_settings(parser, TrainSettings, TRAIN)
    add_settings(parser.add_argument_group("one phase (for several, use --phases)"), Phase, PHASE)


def add_settings(parser: argparse._ActionsContainer, settings: type, texts: Mapping[str, str]) -> None:
    """Add options ``{"--name METAVAR": help}``, whose types, choices and shown defaults are those of a dataclass.

    An option that is not given is None: only those that were given conflict with --phases and --run.
    """
    types = get_type_hints(settings)
    for option, text in texts.items():
        flag, *metavar = option.split()
        name = NAMES.get(flag, flag.removeprefix("--").replace("-", "_"))
        default, known = getattr(settings, name), (types[name], *get_args(types[name]))
        add = partial(parser.add_argument, flag, dest=name)
        choices = next((get_args(kind) for kind in known if get_origin(kind) is Literal), CHOICES.get(name))
        shown = text if default is None or isinstance(default, bool) else f"{text} (default: {default})"
        if bool in known:
            add(action=argparse.BooleanOptionalAction if default else "store_true", default=None, help=shown)
        elif choices is not None:
            add(choices=choices, help=shown)
        else:
            read = READERS.get(name) or next(kind for kind in known if isinstance(kind, type))
            add(type=read, metavar=metavar[0], help=shown)


def read_size(text: str) -> int | tuple[int, int]:
    """Read the size of an image.

    >>> read_size("96"), read_size("96x128")
    (96, (96, 128))
    """
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; pass 96, or 96x128 for height x width")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def read_names(text: str) -> tuple[str, ...]:
    """Read names between commas.

    >>> read_names("age, height")
    ('age', 'height')
    """
    names = tuple(name.strip() for name in text.split(","))
    if "" in names:
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; pass columns between commas, such as age,height")
    return names


NAMES = {"--model": "architecture"}  # of options that are not called as their setting
READERS: Mapping[str, Callable[[str], object]] = {
    "input_size": read_size,
    "regression": read_names,
    "soft_labels": read_names,
}
# by the names of --to
EXPORTERS: dict[str, Callable[..., Exported]] = {
    "timm": export_timm,
    "onnx": export_onnx,
    "torch-export": export_torch,
    "hub-folder": export_hub_folder,
    "openvino": export_openvino,
}
CHOICES = {"augment": sorted(AUGMENTATIONS)}


def add_predict(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``predict``."""
    parser.description = (
        "Print the most likely classes of images, with a model that `train` or `export --to onnx` wrote. Images that "
        "cannot be read are listed and counted, and the exit status is then 2."
    )
    add_inference(parser)
    add = parser.add_argument
    text = (
        "an image, a folder of images at any depth, a pattern ('photos/**/*.jpg'), a .tar file or a dataset of Hugging "
        "Face as `train` takes them, or - for paths on stdin by line"
    )
    add("images", nargs="+", metavar="IMAGE", help=text)
    add("--top-k", type=int, default=3, metavar="K", help="classes for each image (default: %(default)s)")
    text = "write the predictions to a .csv, .jsonl (JSON lines) or .parquet file (an extra) instead of the terminal"
    add("--output", type=Path, metavar="FILE", help=text)


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``evaluate``."""
    parser.description = (
        "Measure a model that `train` wrote on images of known classes: accuracy, precision and recall by class, and "
        "a confusion matrix."
    )
    add_inference(parser)
    add = parser.add_argument
    add(
        "images",
        type=Path,
        metavar="DATA",
        help="what `train` takes: a folder with a sub-folder for each of the model's classes, a table, .tar files or a "
        "dataset; a test split in it is used alone",
    )
    add(
        "--neighbors",
        type=Path,
        metavar="TRAIN",
        help="the images that the model was trained on: also measure a vote of the 20 nearest, by their features",
    )
    add(
        "--output",
        type=Path,
        default=Path("evaluation"),
        metavar="DIR",
        help="folder for report.html, evaluation.json, predictions.csv and confusion.png (default: %(default)s)",
    )


def add_inference(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the model, the device and the batch size."""
    add = parser.add_argument
    add_model(parser, "model.safetensors of `train`, .onnx of `export`, local-dir:FOLDER or hf-hub:OWNER/NAME")
    add("--batch-size", type=int, default=32, metavar="N", help="images per batch (default: %(default)s)")
    add("--workers", type=int, metavar="N", help="processes that read images (default: by cores and images)")
    add("--tta", action="store_true", help="average over each image and its mirror image, at twice the cost")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, ... (default: %(default)s)")


def add_model(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the arguments that name a trained model."""
    parser.add_argument("model", type=Path, metavar="MODEL", help=text)
    parser.add_argument("--base", type=Path, metavar="FILE", help=BASE)


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``export``."""
    parser.description = (
        "Write a model that `train` wrote in another format: timm (a plain checkpoint, with a class map), hub-folder "
        "(for timm.create_model('local-dir:...')), onnx, torch-export or openvino. It is loaded again and gives the "
        "model's logits, or nothing is written."
    )
    add = parser.add_argument
    add_model(parser, "the model.safetensors that `train` wrote")
    add("output", type=Path, metavar="OUTPUT", help="the file or, for hub-folder, the folder to write; not there yet")
    add("--to", choices=sorted(EXPORTERS), required=True, help="the format")
    add("--images", nargs="+", metavar="IMAGE", help="what `predict` takes: images on which the logits are compared")
    text = "onnx: the graph itself resizes, crops and normalizes; its input is images in uint8, (B, height, width, 3)"
    add("--preprocessing", action="store_true", help=text)


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``inspect``."""
    parser.description = (
        "Print the layer groups, parameters and cost (floating-point operations of a forward pass of one image) of an "
        "architecture of timm, or of a trained model and which of its groups are frozen. Nothing is downloaded but the "
        "config.json of hf-hub:OWNER/NAME."
    )
    parser.add_argument("network", metavar="NAME|MODEL", help="an architecture, local-dir:FOLDER, or model.safetensors")
    parser.add_argument(
        "--trainable-groups",
        type=int,
        metavar="N",
        help="also print what can be cached while the last N layer groups of an architecture train; this runs it",
    )
