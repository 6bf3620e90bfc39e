"""``backbone-finetune inspect``: layer groups, parameters and cost of a network, and what of it can be cached."""

from collections import defaultdict
from collections.abc import Callable, Container, Iterable
from pathlib import Path

import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backbone_finetune import FineTuneModel
from backbone_finetune.frontier import NoFrontier, find_frontier
from backbone_finetune.names import shortened
from backbone_finetune.report import describe_state

from ..models.file import load_outline
from ..models.weights import create_network
from ..rng import preserve_rng_state

IMAGES = 3  # the minimum of find_frontier


def inspect(architecture: str) -> str:
    """Describe the layer groups, parameters and cost of a timm architecture, and how to train each group.

    The network is built on the meta device: nothing is downloaded, and no memory is used.

    >>> print(inspect("test_resnet").splitlines()[-2])
    layer4              267,840   71.9%     0.01    6.5%  --trainable-groups 1

    Raises:
        ValueError: timm has no such architecture.
    """
    with torch.device("meta"):
        network = create_network(architecture)
        has_classifier = hasattr(network, "reset_classifier")  # a few pure encoders have none
        model = (
            FineTuneModel.from_timm(network, num_classes=1) if has_classifier else FineTuneModel(network, nn.Identity())
        )
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    count = len(model.layer_groups)
    last = {group.name: f"--trainable-groups {count - index}" for index, group in enumerate(model.layer_groups)}
    lines = _tabulate(model, architecture, config["input_size"], last, "trains, with all below, by")
    if has_classifier:
        lines[-1] += "  always; this many per class"
    else:
        lines[-1] = "no classifier: `train` cannot use it; in Python, FineTuneModel(backbone, classifier) can"
    return "\n".join(lines)


def inspect_file(path: Path) -> str:
    """Describe the model of a file: its classes, its layer groups and cost, and which parts are frozen.

    The model is built on the meta device, from metadata and the layouts of the tensors; no tensor is read.
    """
    description, model = load_outline(path)
    parameters = dict(model.backbone.named_parameters())
    named = {group.name: map(parameters.__getitem__, group.parameter_names) for group in model.layer_groups}
    states = {name: describe_state(own) for name, own in {**named, "classifier": model.classifier.parameters()}.items()}
    names, objective = description.class_names, description.objective
    kind = "classes" if objective is None else {"MultiLabel": "labels", "Regression": "values"}[objective.kind]
    return "\n".join(
        [
            f"{path}: {len(names):,} {kind} ({shortened(names, most=10)})",
            "written with " + ", ".join(f"{name} {version}" for name, version in description.versions.items()),
            *_tabulate(model, description.architecture, description.data_config.input_size, states, "state"),
        ]
    )


def count_operations(model: FineTuneModel, input_size: tuple[int, int, int]) -> dict[str, int]:
    """Count the floating-point operations of one image's forward pass, by layer group and of the classifier.

    A multiplication and an addition count as two, as in torch's ``FlopCounterMode``, which counts matrix products and
    convolutions. Operations of a module outside its children count for the last layer group in it. The model is
    on the meta device; afterwards it is in eval mode and none of its parameters requires a gradient.

    >>> with torch.device("meta"):
    ...     model = FineTuneModel(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten()), nn.Linear(8 * 16, 2))
    >>> sorted(count_operations(model, (3, 4, 4)).items())
    [('0', 768), ('classifier', 512)]
    """
    owners = {"": "classifier", "classifier": "classifier"}  # of modules by path; a later group replaces an earlier one
    for group in model.layer_groups:
        for path in (f"backbone.{name}" for name in group.parameter_names):
            while path := path.rpartition(".")[0]:
                owners[path] = group.name
    # Without gradients by requires_grad: under no_grad, the counter's hooks find no graph and fail.
    model.eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *input_size, device="meta"))
    # "FineTuneModel.backbone.conv1" -> "backbone.conv1"; the whole model is "Global" and "FineTuneModel".
    counted = {path.partition(".")[2]: sum(counts.values()) for path, counts in counter.get_flop_counts().items()}
    operations: dict[str, int] = defaultdict(int)
    for path, count in counted.items():  # a module's count includes its children's
        operations[owners[_nearest(path, owners)]] += count
        if path:
            operations[owners[_nearest(_nearest(path.rpartition(".")[0], counted), owners)]] -= count
    return operations


def _nearest(path: str, known: Container[str]) -> str:
    """Return the path of a module, or of its nearest known ancestor."""
    while path not in known:
        path = path.rpartition(".")[0]
    return path


def _tabulate(
    model: FineTuneModel, architecture: str, input_size: tuple[int, int, int], last: dict[str, str], title: str
) -> list[str]:
    """Return a table of a model by layer group; ``last`` has the entries of the last column, ``title``."""
    backbone = dict(model.backbone.named_parameters())
    total = sum(parameter.numel() for parameter in backbone.values())
    operations = count_operations(model, input_size)
    every_operation = max(sum(operations.values()), 1)
    groups = model.layer_groups
    width = max(len("layer group"), *(len(group.name) for group in groups))
    features = "tokens or maps" if isinstance(model.classifier, nn.Identity) else f"{model.num_features:,} features"

    def line(name: str, parameters: Iterable[nn.Parameter]) -> str:
        size, cost = sum(parameter.numel() for parameter in parameters), operations[name]
        share = "" if name == "classifier" else f"{size / total:.1%}"
        billions = f"{cost / 1e9:>7.2f}  {cost / every_operation:>6.1%}"
        return f"{name:{width}}  {size:>14,}  {share:>6}  {billions}  {last.get(name, '')}".rstrip()

    return [
        f"{architecture}: {total:,} parameters in {len(groups)} layer groups, input to output; "
        f"makes {features} of an image of {' x '.join(map(str, input_size))}",
        "",
        f"{'layer group':{width}}  {'parameters':>14}  {'share':>6}  {'GFLOPs':>7}  {'share':>6}  {title}",
        *(line(group.name, (backbone[name] for name in group.parameter_names)) for group in groups),
        line("classifier", model.classifier.parameters()),
    ]


def inspect_frontier(architecture: str, trainable_groups: int) -> str:
    """Describe what is cached for each image while the last layer groups train, or why nothing is.

    The network has random weights, and runs on the CPU on random images of its own size.

    >>> print(inspect_frontier("test_resnet", 1))
    --trainable-groups 1: computed once for each image, and cached:
      backbone.layer3: 192 x 10 x 10 float32, 76.8 kB per image
    each epoch then computes 6.5% of the forward and 4.3% of the backward operations of training all
    """
    with preserve_rng_state():
        model = FineTuneModel.from_timm(create_network(architecture), num_classes=1).train()
        model.freeze_backbone(trainable_groups=trainable_groups)
        config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        images = torch.randn(IMAGES, *config["input_size"])
        found = find_frontier(model, images)
        if isinstance(found, NoFrontier):
            return f"--trainable-groups {trainable_groups}: nothing can be cached: {found.reason}"
        tensors = found.record(images)
        cached = _count_passes(lambda: found.replay(tensors))
        model.unfreeze_backbone()
        whole = _count_passes(lambda: model(images))
    forward, back = (f"{part / max(of_all, 1):.1%}" for part, of_all in zip(cached, whole, strict=True))
    kept = [f"  {line}" for line in str(found).splitlines()]
    if len(kept) > 1:
        kept.append(f"  together {found.bytes_per_image / 1000:,.1f} kB per image")
    return "\n".join(
        [
            f"--trainable-groups {trainable_groups}: computed once for each image, and cached:",
            *kept,
            f"each epoch then computes {forward} of the forward and {back} of the backward operations of training all",
        ]
    )


def _count_passes(run: Callable[[], Tensor]) -> tuple[int, int]:
    """Count the floating-point operations of a forward pass and of its backward pass."""
    with FlopCounterMode(display=False) as forward:
        output = run()
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()  # type: ignore[no-untyped-call]
    return forward.get_total_flops(), backward.get_total_flops()
