"""Measure what it saves to run a frozen backbone once, the cost of the cache, and accuracy in the same time.

python benchmarks/feature_cache.py --threads 1
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from caching.heads import judge_epochs, judge_heads, make_head_task, time_epochs, time_heads
from caching.size import judge_memory, judge_size
from caching.training import PEERS, Samples, Task, judge_runs, make_task, time_runs
from caching.transfer import Outcome, Plan, compare_methods, describe_outcomes
from harness.cache_plots import draw_cache
from harness.environment import describe_command, describe_environment, describe_precision, note_end
from harness.options import add_shared_options, batch_size_on, positive, settle_device
from harness.ratios import Target, TargetReport, target_table
from harness.results import describe, median, table, write_text
from harness.timing import Clock, clock_for, no_garbage_collection
from subjects.networks import check_names
from torch.utils.data import DataLoader

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import FeatureCache, extract_features


@dataclass
class CacheReport(TargetReport):
    """All results of a run: samples by what was timed, and the accuracy of each method on each split."""

    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    interrupted: bool = False


def main(
    arguments: Sequence[str] | None = None,
    *,
    judge: Callable[[], Target] = judge_memory,
    clock: Clock | None = None,
) -> int:
    """Measure every target; return 0, or 1 if one was missed, or 130 after Ctrl-C, which keeps earlier measurements."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_options(parser, output="runs/feature_cache", batch_size=32)
    add = parser.add_argument
    defaults = ("tf_efficientnet_lite0 on a CPU, vit_large_patch16_224 on a GPU", "512 on a CPU, 4096 on a GPU")
    add("--model", metavar="NAME", help=f"default: {defaults[0]}")
    add("--pictures", type=positive, metavar="N", help=f"to train on (default: {defaults[1]})")
    add("--epochs", type=positive, default=20, metavar="N", help="of each run (default: %(default)s)")
    add("--features", type=positive, default=2048, metavar="N", help="for the heads' own times (default: %(default)s)")
    add("--seeds", type=int, default=3, metavar="N", help="splits of the clipart; 0 leaves accuracy out (default: 3)")
    add("--fine-tuning-epochs", type=positive, default=5, metavar="N", help="after the head's (default: %(default)s)")
    options = parser.parse_args(given)
    try:
        device = settle_device(options)
        # The defaults for a CPU are too small for a GPU, where the host would be the limit.
        model, pictures = ("vit_large_patch16_224", 4096) if device.type == "cuda" else ("tf_efficientnet_lite0", 512)
        options.model, options.pictures = options.model or model, options.pictures or pictures
        check_names([options.model])
        options.batch_size = batch_size_on(device, options)
        size = (options.batch_size, options.epochs, device)
        task = make_task(options.model, options.pictures, options.image_size, *size)
    except ValueError as error:
        parser.error(str(error))
    settings = {
        name: getattr(options, name)
        for name in ("model", "pictures", "image_size", "epochs", "features", "repeats", "seeds", "fine_tuning_epochs")
    }
    settings |= {"batch_size": options.batch_size, "precision": describe_precision("off", device)}
    report = CacheReport(describe_environment(device), describe_command("feature_cache.py", given), settings)
    try:
        with no_garbage_collection():
            for target in measure(report, task, options, clock or clock_for(device), judge):
                report.add(target)
        plan = Plan(options.batch_size, options.epochs, options.fine_tuning_epochs)
        for outcome in compare_methods(options.seeds, plan, device) if options.seeds else ():
            report.outcomes.append(outcome)
            print(f"{outcome.accuracy:16.3f}  {outcome.method}, split {outcome.seed}", flush=True)
    except KeyboardInterrupt:
        report.interrupted = True
        print("interrupted: writing what was measured until then", file=sys.stderr)
    finally:  # write earlier measurements in any case
        note_end(report.environment, device)
        write_cache_report(report, options.output / "feature_cache")
    print(f"written to {options.output}: feature_cache.json, .md and .png")
    if report.interrupted:
        return 130
    return 1 if report.missed else 0


def measure(
    report: CacheReport, task: Task, options: argparse.Namespace, clock: Clock, judge: Callable[[], Target]
) -> Iterator[Target]:
    """Measure, add each sample to the report at once, and yield the targets."""
    samples = Samples(report.milliseconds)
    time_runs(task, options.repeats or 6, clock, samples)
    yield from judge_runs(task, samples)

    model = FineTuneModel.from_timm(copy.deepcopy(task.blueprint.network)).freeze_backbone()
    with TemporaryDirectory() as folder:
        stored = Path(folder, "features")
        cache = FeatureCache(stored, "random")
        features = extract_features(model, DataLoader(task.train, task.batch_size), device=task.device, cache=cache)
        on_disk = sum(path.stat().st_size for path in stored.iterdir())
    vectors = features.tensors[0]
    yield judge_size(options.model, len(vectors), vectors.nbytes, on_disk)
    yield judge()

    head_task = make_head_task(
        options.model, options.features, vectors.shape[1], task.batch_size, task.epochs, task.device
    )
    time_epochs(head_task, options.repeats or 2 * options.epochs, clock, samples)
    yield from judge_epochs(head_task, samples)
    time_heads(head_task, options.repeats or 6, clock, samples)
    recipe = samples.milliseconds["the article's recipe"]
    yield from judge_heads(head_task, samples, options.epochs * median(recipe))


def write_cache_report(report: CacheReport, stem: Path) -> None:
    """Write `stem`.json with every sample, `stem`.md to read, and `stem`.png."""
    write_text(stem.with_suffix(".json"), json.dumps(asdict(report), indent=1) + "\n")
    write_text(stem.with_suffix(".md"), as_markdown(report))
    draw_cache(report.milliseconds, report.outcomes, report.settings, report.environment, stem.with_suffix(".png"))


def as_markdown(report: CacheReport) -> str:
    """Return the report as a page to read."""
    parts = ["# A frozen backbone runs once\n", describe(report)]
    if report.interrupted:
        parts.append("**Interrupted: this is what was measured until then.**\n")
    if "ours, float32" in report.milliseconds:
        parts += ["## Seconds\n", seconds_table(report), ""]
    parts += ["## Ratios\n", target_table(report.targets), _HOW_IT_WAS_TIMED]
    if report.outcomes:
        parts += ["## What is learnt\n", describe_outcomes(report.outcomes), _HOW_IT_WAS_LEARNT]
    return "\n".join(parts)


def seconds_table(report: CacheReport) -> str:
    """Format the seconds of whole runs; those of peers are computed from the timed epochs."""
    epochs = int(report.settings["epochs"] or 0)
    taken, lines = report.milliseconds, []
    for label in ("one pass, float32", "one pass, bf16", "ours, float32", "ours, bf16", *PEERS):
        if label in taken:
            count = epochs if label in PEERS else 1
            lines.append([label, f"{count * median(taken[label]) / 1e3:.3g}"])
    return table(["", f"seconds, {epochs} epochs of {report.settings['pictures']} pictures"], lines)


_HOW_IT_WAS_TIMED = """\
All train on the same random pictures in memory, by turns. Ours: features into a cache on disk, then all epochs, with a
test after each, as `backbone-finetune train` does it; in bf16 means as the device likes it by itself. A peer freezes as
its library does by default and trains in float32 in a plain loop, without what its trainer would add. Its turn is one
epoch of its run, and the ratio to its whole run is that to as many such epochs. Both loops over ready features use the
same fused AdamW.
"""

_HOW_IT_WAS_LEARNT = """\
The packaged clipart (ten classes) at 96 pixels and EfficientNet-Lite0 with its ImageNet weights; mean and standard
deviation over splits, each method on the same ones. The first pair trains for equal epochs, the second for equal time,
rounded up for plain fine-tuning. What chooses rates chooses them on validation pictures, taken from the training ones.
"""


if __name__ == "__main__":
    sys.exit(main())
