"""The same network frozen by each library: what a step costs, and whether what was frozen stayed the same.

python benchmarks/peers.py --models resnet18 tf_efficientnet_lite0
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from command_line import add_models_option, add_shared_options, repeats_on, settle_device
from environment import Fact, describe_command, describe_environment, installed_version
from measure import (
    StepTimes,
    TrainingStep,
    clock_for,
    no_garbage_collection,
    paired_ratio,
    take_turns,
    time_step,
    warm_up,
)
from memory import count_saved_bytes
from networks import NUM_CLASSES, check_names, picture_size
from peer_methods import METHODS, Blueprint, Method, make_blueprint
from results import Sampled, describe, mebibytes, spread, table, write_text
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from variants import own_storage, training_step

DEFAULT_MODELS = ("resnet18", "tf_efficientnet_lite0", "vit_small_patch16_224")
LIMIT = "limit: no_grad backbone, bare head"


@dataclass
class PeerRow(Sampled):
    """One method on one network; an `error` in place of numbers where it cannot do the case."""

    model: str
    method: str
    version: str | None
    note: str = ""
    error: str | None = None
    trainable_parameters: int | None = None
    saved_bytes: int | None = None
    moved: dict[str, list[str]] = field(default_factory=dict)  # "parameters", "buffers", "gone": names in the backbone
    forward_ms: list[float] = field(default_factory=list)
    backward_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)


@dataclass
class PeerReport:
    """All that one command measured."""

    environment: dict[str, Fact]
    command: str
    settings: dict[str, Fact]
    rows: list[PeerRow] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """The pictures and labels that all methods see."""

    images: Tensor  # (B, 3, H, W)
    labels: Tensor  # (B,)

    def loss(self, module: nn.Module) -> Tensor:
        """Forward and loss, ()."""
        return functional.cross_entropy(module(self.images), self.labels)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every method on every model; Ctrl-C keeps what was measured."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_options(parser, output="runs/peers")
    add_models_option(parser, DEFAULT_MODELS)
    options = parser.parse_args(given)
    try:
        check_names(options.models)
        device = settle_device(options)
    except ValueError as error:
        parser.error(str(error))
    repeats = repeats_on(device, options)
    batch_size = options.batch_size or 8
    settings: dict[str, Fact] = {"batch_size": batch_size, "image_size": options.image_size, "repeats": repeats}
    report = PeerReport(describe_environment(device), describe_command("peers.py", given), settings)
    interrupted = False
    for name in options.models:
        size, arguments_of_size = picture_size(name, options.image_size)
        blueprint = make_blueprint(name, NUM_CLASSES, size[-1], arguments_of_size)
        batch = Batch(
            torch.randn(batch_size, *size, device=device), torch.randint(NUM_CLASSES, (batch_size,), device=device)
        )
        rows: list[PeerRow] = []
        try:
            compare_methods(blueprint, batch, METHODS, repeats, rows)
        except KeyboardInterrupt:
            interrupted = True
        report.rows += rows
        write_text(options.output / "peers.json", json.dumps(asdict(report), indent=1) + "\n")
        write_text(options.output / "peers.md", as_markdown(report))
        print(f"\n{name}\n{model_table(rows)}\n", flush=True)
        if interrupted:
            print(f"interrupted: what was measured until then is in {options.output}", file=sys.stderr)
            return 130
    print(f"written to {options.output}: peers.json, peers.md")
    return 0


def compare_methods(
    blueprint: Blueprint, batch: Batch, methods: Sequence[Method], repeats: int, rows: list[PeerRow]
) -> None:
    """Fill `rows`: one for each method, and one for the limit; a method that fails keeps its row, with its reason."""
    steps: list[TrainingStep] = []
    timed: list[PeerRow] = []
    for method in methods:
        row = PeerRow(blueprint.name, method.label, installed_version(method.package), method.note)
        rows.append(row)
        try:
            steps.append(prepare(blueprint, batch, method, row))
        except Exception as error:  # whatever a library cannot do is a result: it goes into its row
            row.error = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        timed.append(row)
    limit = PeerRow(blueprint.name, LIMIT, installed_version("torch"))
    rows.append(limit)
    timed.append(limit)
    steps.append(prepare_limit(blueprint, batch, limit))
    clock = clock_for(batch.images.device)
    with (
        no_garbage_collection(),
        tqdm(total=repeats * len(steps), desc=blueprint.name, leave=False, disable=None) as bar,
    ):
        for step in steps:
            warm_up(step.run, clock)

        def visit(step: TrainingStep) -> StepTimes:
            bar.update()
            return time_step(step, clock)

        for turn in take_turns([partial(visit, step) for step in steps], repeats):
            for row, times in zip(timed, turn, strict=True):
                row.add(times)


def prepare(blueprint: Blueprint, batch: Batch, method: Method, row: PeerRow) -> TrainingStep:
    """Freeze a fresh copy, see what three real steps move, and make the step to time."""
    before = {
        name: tensor.clone()
        for name, tensor in blueprint.network.state_dict().items()
        if not name.startswith(f"{blueprint.classifier}.")
    }
    module = freeze_copy(blueprint, batch, method)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        batch.loss(module).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    row.moved = what_moved(before, blueprint.network, module.state_dict(), method.prefix)
    # Timed from the first weights on, as the others are.
    module = freeze_copy(blueprint, batch, method)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    row.trainable_parameters = sum(parameter.numel() for parameter in parameters)
    row.saved_bytes = count_saved_bytes(partial(batch.loss, module), module.parameters())
    return training_step(partial(batch.loss, module), parameters, batch.images.device)


def freeze_copy(blueprint: Blueprint, batch: Batch, method: Method) -> nn.Module:
    """Freeze a copy of the network by a method, and put it in train mode, as trainers do before an epoch."""
    module = method.freeze(blueprint, copy.deepcopy(blueprint.network))
    module.to(batch.images.device).train()
    return module


def prepare_limit(blueprint: Blueprint, batch: Batch, row: PeerRow) -> TrainingStep:
    """Make the step that no way of freezing can beat: eval backbone under `no_grad`, and the bare classifier on it."""
    backbone, classifier = blueprint.split(copy.deepcopy(blueprint.network)).to(batch.images.device)
    backbone.eval()

    def loss() -> Tensor:
        with torch.no_grad():
            features = own_storage(backbone(batch.images))
        return functional.cross_entropy(classifier(features), batch.labels)

    row.trainable_parameters = sum(parameter.numel() for parameter in classifier.parameters())
    row.saved_bytes = count_saved_bytes(loss, classifier.parameters())
    return training_step(loss, list(classifier.parameters()), batch.images.device)


def what_moved(
    before: dict[str, Tensor], network: nn.Module, after: dict[str, Tensor], prefix: str
) -> dict[str, list[str]]:
    """Name the backbone's parameters and buffers that are no longer bit for bit what they were, or no longer there."""
    parameters = {name for name, _ in network.named_parameters()}
    moved: dict[str, list[str]] = {"parameters": [], "buffers": [], "gone": []}
    for name, tensor in before.items():
        now = after.get(prefix + name)
        if now is None:
            moved["gone"].append(name)
        elif not torch.equal(now.cpu(), tensor):
            moved["parameters" if name in parameters else "buffers"].append(name)
    return moved


def as_markdown(report: PeerReport) -> str:
    """Give the report as a page to read."""
    by_model: dict[str, list[PeerRow]] = {}
    for row in report.rows:
        by_model.setdefault(row.model, []).append(row)
    tables = [f"## {model}\n\n{model_table(rows)}\n" for model, rows in by_model.items()]
    return "\n".join(["# The same network, frozen by each library\n", describe(report), *tables, _HOW_TO_READ])


_HOW_TO_READ = """\
Milliseconds are median ± interquartile range, taken in turns on the same pictures. `step / ours` is the median of the
ratios within a pass, with its 95 % bootstrap interval. The last column compares all of the backbone with what it was,
bit for bit, after three steps of AdamW in train mode: a library that leaves normalisation layers trainable by default
moves them because it means to.
"""


def model_table(rows: Sequence[PeerRow]) -> str:
    """Lay out the rows of one model."""
    own = next((row for row in rows if row.method == "ours" and row.step_ms), None)
    header = ["", "version", "forward ms", "backward ms", "step ms", "step / ours", "saved MiB", "trainable"]
    header.append("backbone after 3 steps")
    return table(header, [_line(row, own) for row in rows])


def _line(row: PeerRow, own: PeerRow | None) -> list[str]:
    line = [row.method, row.version or ("this checkout" if row.method == "ours" else "not installed")]
    if not row.step_ms:
        return [*line, *[""] * 6, row.error or "not timed"]
    line += [spread(row.forward_ms), spread(row.backward_ms), spread(row.step_ms)]
    line.append(str(paired_ratio(row.step_ms, own.step_ms)) if own is not None and own is not row else "")
    line += [mebibytes(row.saved_bytes), f"{row.trainable_parameters:,}", _verdict(row)]
    return line


def _verdict(row: PeerRow) -> str:
    if row.method == LIMIT:
        return ""  # not a way to freeze, and not tried for three steps
    moved = [f"{len(names)} {what} moved" for what, names in row.moved.items() if names and what != "gone"]
    moved += [f"{len(row.moved['gone'])} buffers gone"] if row.moved.get("gone") else []
    verdict = ", ".join(moved) or "the same, bit for bit"
    return f"{verdict} ({row.note})" if row.note else verdict


if __name__ == "__main__":
    sys.exit(main())
