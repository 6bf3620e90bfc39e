"""Compare libraries that freeze the same network: the cost of a step, and whether frozen tensors change.

python benchmarks/peers.py --models resnet18 tf_efficientnet_lite0
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial

import torch
from harness.cuda import Fact
from harness.environment import (
    describe_command,
    describe_environment,
    describe_precision,
    installed_version,
    note_end,
)
from harness.memory import at_largest_batch, count_saved_bytes, is_out_of_memory
from harness.options import (
    add_models_option,
    add_precision_options,
    add_shared_options,
    batch_size_on,
    repeats_on,
    settle_device,
)
from harness.results import reason_of, write_text
from harness.timing import (
    StepTimes,
    TrainingStep,
    clock_for,
    least_warm_up,
    loop_steps_on,
    no_garbage_collection,
    take_turns,
    time_step,
    warm_up,
)
from subjects.equality import compare
from subjects.networks import NUM_CLASSES, check_names, input_size_of
from subjects.peer_methods import METHODS, Blueprint, Method, make_blueprint
from subjects.peer_report import EVERY_METHOD, LIMIT, OURS, PeerReport, PeerRow, as_markdown, model_table
from subjects.variants import Precision, autocast, fused_on, optimizer_name, own_storage, training_step
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

DEFAULT_MODELS = ("resnet18", "tf_efficientnet_lite0", "vit_small_patch16_224")


@dataclass(frozen=True)
class Batch:
    """The images and labels of all methods, and the memory format of images and weights."""

    images: Tensor  # (B, 3, H, W)
    labels: Tensor  # (B,)
    precision: Precision = "off"
    memory_format: torch.memory_format = torch.contiguous_format

    def loss(self, module: nn.Module) -> Tensor:
        """Forward and loss, () in float32."""
        with autocast(self.images.device, self.precision):
            logits = module(self.images)
        return functional.cross_entropy(logits.float(), self.labels)

    def settle(self, module: nn.Module) -> nn.Module:
        """Move a module to the device and memory format of the images."""
        moved: nn.Module = module.to(device=self.images.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        return moved

    def step_of(self, loss: Callable[[], Tensor], parameters: list[nn.Parameter]) -> TrainingStep:
        """Make the step that is timed."""
        return training_step(loss, parameters, self.images.device, scaled=self.precision == "fp16")


@dataclass(frozen=True)
class Conditions:
    """The settings of a measurement, the same for all methods."""

    device: torch.device
    batch_size: int
    image_size: int | None
    repeats: int
    precision: Precision = "off"
    channels_last: bool = False

    def batch(self, count: int, size: tuple[int, int, int]) -> Batch:
        """Draw random images and labels."""
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        images = torch.randn(count, *size, device=self.device).contiguous(memory_format=memory_format)
        labels = torch.randint(NUM_CLASSES, (count,), device=self.device)
        return Batch(images, labels, self.precision, memory_format)


def main(arguments: Sequence[str] | None = None, *, methods: Sequence[Method] = METHODS) -> int:
    """Measure every method on every model; return 0, or 1 if a network, ours or the limit failed, or 130 after Ctrl-C.

    An error of another library is a result, recorded in its row.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_options(parser, output="runs/peers", batch_size_on_cuda=128)
    add_models_option(parser, DEFAULT_MODELS)
    add_precision_options(parser)
    options = parser.parse_args(given)
    try:
        check_names(options.models)
        device = settle_device(options)
    except ValueError as error:
        parser.error(str(error))
    conditions = Conditions(
        device=device,
        batch_size=batch_size_on(device, options),
        image_size=options.image_size,
        repeats=repeats_on(device, options),
        precision=options.amp,
        channels_last=options.channels_last,
    )
    settings: dict[str, Fact] = {"batch_size": conditions.batch_size, "image_size": conditions.image_size}
    settings |= {"repeats": conditions.repeats, "precision": describe_precision(conditions.precision, device)}
    settings |= {"channels_last": conditions.channels_last, "optimizer": optimizer_name(device)}
    report = PeerReport(describe_environment(device), describe_command("peers.py", given), settings)
    interrupted = False
    for name in options.models:
        rows: list[PeerRow] = []
        try:
            measure_network(name, conditions, rows, methods)
        except KeyboardInterrupt:
            interrupted = True
        except Exception as error:  # the error of one network is recorded, and the others are measured
            rows = [PeerRow(name, EVERY_METHOD, installed_version("timm"), error=reason_of(error))]
        report.rows += rows
        note_end(report.environment, device)
        write_text(options.output / "peers.json", json.dumps(asdict(report), indent=1) + "\n")
        write_text(options.output / "peers.md", as_markdown(report))
        if rows:
            print(f"\n{name}\n{model_table(rows)}\n", flush=True)
        if interrupted:
            print(f"interrupted: what was measured until then is in {options.output}", file=sys.stderr)
            return 130
    print(f"written to {options.output}: peers.json, peers.md")
    return 1 if any(row.error for row in report.rows if row.method in (EVERY_METHOD, OURS, LIMIT)) else 0


def measure_network(name: str, conditions: Conditions, rows: list[PeerRow], methods: Sequence[Method]) -> None:
    """Fill `rows` with every method on one network, at the largest batch that fits with all of them in memory."""
    size, arguments = input_size_of(name, conditions.image_size)
    blueprint = make_blueprint(name, NUM_CLASSES, size[-1], arguments)

    def attempt(count: int) -> None:
        rows.clear()
        compare_methods(blueprint, conditions.batch(count, size), methods, conditions.repeats, rows)

    at_largest_batch(attempt, conditions.batch_size, lambda text: tqdm.write(f"{name}: {text}"))


def compare_methods(
    blueprint: Blueprint, batch: Batch, methods: Sequence[Method], repeats: int, rows: list[PeerRow]
) -> None:
    """Fill `rows`: one for each method and one for the limit; the row of a method that fails has the reason.

    Out-of-memory errors are raised: memory holds all methods, so the error is not one method's failure.
    """
    network = batch.settle(copy.deepcopy(blueprint.network))
    expected = logits_in_eval(network, batch)
    del network
    contenders: list[Contender] = []
    for method in methods:
        row = PeerRow(blueprint.name, method.label, installed_version(method.package), method.note)
        rows.append(row)
        enter_contest(row, partial(prepare, blueprint, batch, method, row, expected), contenders)
    limit = PeerRow(blueprint.name, LIMIT, installed_version("torch"))
    rows.append(limit)
    enter_contest(limit, partial(prepare_limit, blueprint, batch, limit, expected), contenders)
    for row in rows:
        row.batch_size = len(batch.images)
    with no_garbage_collection():
        while contenders and not time_in_turns(contenders, repeats, batch.images.device, title=blueprint.name):
            # The passes include turns of the failed method, so they start again without it.
            contenders = [contender for contender in contenders if contender.row.error is None]
            for row in rows:
                row.clear()


@dataclass(frozen=True)
class Contender:
    """A method that takes turns, and the row that it fills."""

    row: PeerRow
    step: TrainingStep


class MethodFailedError(Exception):
    """A method failed; its row has the reason."""


@contextmanager
def failures_go_into(row: PeerRow) -> Iterator[None]:
    """Record an error of a library in its row, and raise MethodFailedError."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        row.error = reason_of(error)
        raise MethodFailedError(row.method) from error


def enter_contest(row: PeerRow, make_step: Callable[[], TrainingStep], contenders: list[Contender]) -> None:
    """Add a method to those that take turns, unless it fails."""
    with suppress(MethodFailedError), failures_go_into(row):
        contenders.append(Contender(row, make_step()))


def time_in_turns(contenders: Sequence[Contender], repeats: int, device: torch.device, *, title: str) -> bool:
    """Warm all up, then fill their rows in turns; return False if one fails, whose row has the reason."""
    clock = clock_for(device)
    with (
        suppress(MethodFailedError),
        tqdm(total=repeats * len(contenders), desc=title, leave=False, disable=None) as bar,
    ):
        loop_steps = loop_steps_on(device)
        for contender in contenders:
            with failures_go_into(contender.row):
                warm_up(contender.step.run, clock, at_least_ms=least_warm_up(device))

        def visit(contender: Contender) -> StepTimes:
            bar.update()
            with failures_go_into(contender.row):
                return time_step(contender.step, clock, loop_steps)

        for turn in take_turns([partial(visit, contender) for contender in contenders], repeats):
            for contender, times in zip(contenders, turn, strict=True):
                contender.row.add(times)
        return True
    return False


def logits_in_eval(module: nn.Module, batch: Batch) -> Tensor:
    """Return logits in eval mode, in which all methods must agree; in train mode some differ by design."""
    module.eval()
    with torch.no_grad(), autocast(batch.images.device, batch.precision):
        return module(batch.images)  # type: ignore[no-any-return]


def prepare(blueprint: Blueprint, batch: Batch, method: Method, row: PeerRow, expected: Tensor) -> TrainingStep:
    """Freeze a copy, check its logits, list what three steps change, and return the step to time."""
    before = {
        name: tensor.clone()
        for name, tensor in blueprint.network.state_dict().items()
        if not name.startswith(f"{blueprint.classifier}.")
    }
    module = freeze_copy(blueprint, batch, method)
    compare("logits in eval mode", logits_in_eval(module, batch), expected, batch.precision)
    module.train()
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, fused=fused_on(batch.images.device))
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        batch.loss(module).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    row.moved = what_moved(before, blueprint.network, module.state_dict(), method.prefix)
    # Timed from the initial weights, like the others.
    module = freeze_copy(blueprint, batch, method)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    row.trainable_parameters = sum(parameter.numel() for parameter in parameters)
    row.saved_bytes = count_saved_bytes(partial(batch.loss, module), module.parameters())
    return batch.step_of(partial(batch.loss, module), parameters)


def freeze_copy(blueprint: Blueprint, batch: Batch, method: Method) -> nn.Module:
    """Freeze a copy of the network with a method, and put it in train mode, like a trainer before an epoch."""
    module = method.freeze(blueprint, copy.deepcopy(blueprint.network))
    return batch.settle(module).train()


def prepare_limit(blueprint: Blueprint, batch: Batch, row: PeerRow, expected: Tensor) -> TrainingStep:
    """Return the step of the limit: the backbone in eval mode under `no_grad`, and the bare classifier."""
    module = batch.settle(blueprint.split(copy.deepcopy(blueprint.network)))
    compare("logits in eval mode", logits_in_eval(module, batch), expected, batch.precision)
    assert isinstance(module, nn.Sequential)
    backbone, classifier = module
    classifier.train()

    def loss() -> Tensor:
        with autocast(batch.images.device, batch.precision):
            with torch.no_grad():
                features = own_storage(backbone(batch.images))
            logits = classifier(features)
        return functional.cross_entropy(logits.float(), batch.labels)

    row.trainable_parameters = sum(parameter.numel() for parameter in classifier.parameters())
    row.saved_bytes = count_saved_bytes(loss, classifier.parameters())
    return batch.step_of(loss, list(classifier.parameters()))


def what_moved(
    before: dict[str, Tensor], network: nn.Module, after: dict[str, Tensor], prefix: str
) -> dict[str, list[str]]:
    """List the backbone's parameters and buffers that changed or are missing."""
    parameters = {name for name, _ in network.named_parameters()}
    moved: dict[str, list[str]] = {"parameters": [], "buffers": [], "gone": []}
    for name, tensor in before.items():
        now = after.get(prefix + name)
        if now is None:
            moved["gone"].append(name)
        elif not torch.equal(now.cpu(), tensor):
            moved["parameters" if name in parameters else "buffers"].append(name)
    return moved


if __name__ == "__main__":
    sys.exit(main())
