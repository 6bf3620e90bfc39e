"""The arguments of each command, with their help."""

import argparse
from functools import partial
from pathlib import Path
from typing import get_args

from ..data.augmentation import AUGMENTATIONS
from ..models.classifiers import Head
from ..models.readouts import Readout
from ..training.phases import Phase
from .export import EXPORTERS
from .setup import TrainSettings


def add_train(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``train``."""
    settings = TrainSettings()
    parser.description = (
        "Train a classifier on images, on a frozen backbone. Without arguments: on the packaged clipart (ten "
        "classes), with EfficientNet-Lite0 and its packaged ImageNet weights; nothing is downloaded. To resume a "
        "stopped run, give the same command again."
    )
    # No defaults here: only options that were given conflict with --phases and --run.
    add, switch = parser.add_argument, partial(parser.add_argument, action="store_true", default=None)
    add(
        "images",
        nargs="?",
        type=Path,
        metavar="DATA",
        help="a folder with a sub-folder of images per class, or with train, val and test of such folders; a table "
        "with the columns path, label (or labels, as cat;dog) and, optionally, split and group (.csv, .tsv, .parquet); "
        ".tar files with class folders or samples of webdataset, a folder of them or 'train-{0000..0003}.tar'; or a "
        "dataset of Hugging Face on disk",
    )
    add(
        "--validation",
        type=Path,
        metavar="DATA",
        help="images to choose on (default: DATA's val); without test images and --monitor, they are tested on",
    )
    add(
        "--test",
        type=Path,
        metavar="DATA",
        help="images to test on, once (default: DATA's test, else its val if nothing is chosen on it, else a share)",
    )
    add(
        "--monitor",
        choices=("accuracy", "balanced-accuracy", "loss", "off"),
        help="keep the epoch that is best on the validation images (default: accuracy where there are validation and "
        "test images, else off; without validation images, a fifth of the training images is held out)",
    )
    add("--patience", type=int, metavar="N", help="end a phase after N epochs that are no better")
    add("--folds", type=int, metavar="K", help="cross-validate on the training images in K folds too")
    add(
        "--model",
        dest="architecture",
        metavar="NAME",
        help="an architecture of timm, local-dir:FOLDER or hf-hub:OWNER/NAME (default: tf_efficientnet_lite0, packaged "
        "weights)",
    )
    weights = parser.add_mutually_exclusive_group()
    text = "timm's pretrained weights from the hub, or those of the folder"
    weights.add_argument("--pretrained", action="store_true", default=None, help=text)
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights from a file")
    add_base(parser)
    add(
        "--readout",
        choices=get_args(Readout),
        help="the features of a transformer: class token, mean of patch tokens, both, or class tokens of the last 4 "
        "blocks, also with the mean (default: as the network pools)",
    )
    add("--head", choices=get_args(Head), help="the classifier (default: linear)")
    add(
        "--input-size",
        type=read_size,
        metavar="SIDE|HxW",
        help="size of the images that the network takes: 96, or 96x128, height x width (default: its own size)",
    )
    add(
        "--in-chans",
        type=int,
        metavar="C",
        help="channels of the images: 1 for grey of 8 or 16 bits, 3, or the number of bands in .npy and TIFF files "
        "(default: 3); pretrained weights of the first layer are adapted",
    )
    add("--phases", type=Path, metavar="FILE", help="a TOML file with a [[phases]] table for each phase")
    switch(
        "--tune",
        help="train the head, then the last layer groups too, then everything; the number of images sets the epochs",
    )
    one_phase = parser.add_argument_group("one phase (for several, use --phases)")
    add_numbers(
        one_phase,
        Phase(),
        ("epochs", "N", ""),
        ("trainable_groups", "N", "number of last layer groups of the backbone that train; "),
        ("lr", "RATE", "of the classifier; chosen among 8 where it trains on features; "),
        ("backbone_lr", "RATE", ""),
        ("layer_decay", "FACTOR", "factor on the rate for each layer towards the input; "),
        ("weight_decay", "W", ""),
        ("warmup_epochs", "N", "epochs, or a fraction of one, in which the rates rise from 0; "),
    )
    one_phase.add_argument(
        "--standardize",
        action="store_true",
        default=None,
        help="train the classifier on features of mean 0 and standard deviation 1, folded into it afterwards",
    )
    one_phase.add_argument("--cosine", action="store_true", default=None, help="let the rates fall to 0 at the end")
    one_phase.add_argument(
        "--norm-eval",
        action=argparse.BooleanOptionalAction,
        help="keep running statistics fixed even if weights train (default: yes; no for random weights)",
    )
    one_phase.add_argument(
        "--augment",
        choices=sorted(AUGMENTATIONS),
        help="draw new training images in each epoch: light is a random crop and mirror, strong adds RandAugment and "
        "random erasing; nothing is cached then, unless --views is given (default: none)",
    )
    add_numbers(
        one_phase,
        Phase(),
        ("mixup", "ALPHA", "mix images and targets in pairs (try 0.2); nothing is cached then; "),
        ("cutmix", "ALPHA", "paste a part of one image of a pair into the other (try 1); "),
    )
    add("--run", type=Path, metavar="FILE", help="a run.json: repeat that run, into another folder")
    add_numbers(
        parser,
        settings,
        ("seed", "S", ""),
        ("batch_size", "N", "images per step, in all processes together; "),
        ("accumulation", "N", "split each batch into N parts, to save memory; "),
        ("checkpoint_steps", "N", "write a checkpoint every N steps, and after each epoch; "),
    )
    add(
        "--class-weights",
        choices=("balanced",),
        help="weight the loss of each image by N / (K * images of its class), for N images in K classes",
    )
    add_numbers(parser, settings, ("label_smoothing", "SHARE", "share of each target spread over all classes; "))
    add(
        "--regression",
        type=lambda text: tuple(name.strip() for name in text.split(",")),
        metavar="COLUMN[,COLUMN]",
        help="columns of a table whose numbers are predicted, instead of a class or labels",
    )
    add(
        "--group",
        metavar="COLUMN",
        help="a column of a table, such as patient: images of one group are never on two sides of a split (default: "
        "group, if the table has it)",
    )
    add("--workers", type=int, metavar="N", help="processes that load images (default: by cores and images)")
    add(
        "--cache",
        choices=("auto", "memory", "disk", "off"),
        help="where to cache the frozen features; off runs the whole model in every step (default: auto)",
    )
    add("--views", type=int, metavar="K", help="cache K augmented views of each training image (default: 1, not)")
    add(
        "--compile",
        choices=("inductor", "openvino"),
        help="compile the frozen backbone; openvino (an extra) is faster on a CPU from about 5,000 images",
    )
    add("--output", type=Path, metavar="DIR", help=f"default: {settings.output}")
    add(
        "--device",
        metavar="NAME",
        help=f"auto, cpu, cuda, cuda:1, mps (default: {settings.device}: CUDA, else MPS, else cpu)",
    )
    add(
        "--mixed-precision",
        choices=("no", "fp16", "bf16"),
        help="of steps on images; default: the launcher's, else bf16 on a CUDA device that has it, else no. Unless no "
        "is given, features are in bf16 where that is faster",
    )
    switch("--trainable-only", help="write only the tensors that training changed; loading needs the base weights")
    switch("--baselines", help="also train on a random backbone and on raw pixels, to compare (always for the clipart)")
    switch("--check-labels", help="list training images whose class looks wrong, by cleanlab (an extra), in 5 folds")
    text = "log settings and epochs to a tracker, an extra of that name (tensorboard: in the output folder)"
    add("--log-with", choices=("tensorboard", "wandb", "mlflow"), help=text)
    switch("--overwrite", help="replace a finished model, or another run, in the output folder")


def read_size(text: str) -> int | tuple[int, int]:
    """Read the size of an image.

    >>> read_size("96"), read_size("96x128")
    (96, (96, 128))
    """
    sides = [int(side) for side in text.split("x")]
    if len(sides) > 2:
        raise ValueError
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def add_numbers(parser: argparse._ActionsContainer, settings: object, *options: tuple[str, str, str]) -> None:
    """Add numeric options ``(name, metavar, help)``, with the types and defaults of ``settings``."""
    for name, metavar, text in options:
        default = getattr(settings, name)
        read, shown = (float, "none") if default is None else (type(default), default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=read, metavar=metavar, help=f"{text}default: {shown}")


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
    add_base(parser)


def add_base(parser: argparse._ActionsContainer) -> None:
    """Add the option that names the base weights of a file of changes."""
    parser.add_argument(
        "--base",
        type=Path,
        metavar="FILE",
        help="the base weights of a model of --trainable-only, if they are not found automatically",
    )


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
