"""The first run on a GPU: the CUDA tests, each benchmark, and predictions compared with measurements.

python benchmarks/cuda_first_run.py

It takes at most 40 minutes. Each part's results are written at once; the same command again runs only what
is missing. With --device cpu it runs everything with small sizes, as a check.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from first_run.parts import Part, list_parts
from first_run.predictions import PREDICTED_FOR, list_predictions
from harness.cuda import Fact
from harness.environment import describe_command, describe_environment
from harness.options import make_writable
from harness.results import describe, table, write_text
from harness.timing import resolve_device

REPOSITORY = Path(__file__).resolve().parents[1]
SECONDS_TO_SAVE = 30


@dataclass
class Outcome:
    """The result of a part; `said` is its last line of output, which is the reason of a failure."""

    name: str
    command: str
    status: str  # done, failed, stopped or not run
    seconds: float = 0.0
    said: str = ""
    date: str = ""


@dataclass
class Comparison:
    """A prediction and its measurement, None if there is none."""

    part: str
    what: str
    low: float
    high: float
    measured: float | None


@dataclass
class FirstRun:
    """All results of a GPU."""

    environment: dict[str, Fact]
    command: str
    settings: dict[str, Fact] = field(default_factory=dict)
    parts: list[Outcome] = field(default_factory=list)
    predictions: list[Comparison] = field(default_factory=list)


Runner = Callable[[Sequence[str], Path, float], int | None]


def main(
    arguments: Sequence[str] | None = None, *, listed: Sequence[Part] | None = None, runner: Runner | None = None
) -> int:
    """Run all parts; return 0, or 1 if one did not finish, or 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--minutes", type=float, default=40.0, help="for all parts together (default: %(default)g)")
    where = "benchmarks/results/CARD; for a CPU, runs/cuda_first_run"
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"default: {where}")
    options = parser.parse_args(given)
    try:
        on_cuda = resolve_device(options.device).type == "cuda"
        environment = environment_of_card() if on_cuda else describe_environment(resolve_device("cpu"))
        folder: Path = (options.output or default_folder(environment)).resolve()
        make_writable(folder)
    except ValueError as error:
        parser.error(str(error))
    run = FirstRun(environment, describe_command(__file__, given), {"minutes": options.minutes})
    earlier = read_outcomes(folder / "first_run.json")
    parts = list_parts(on_cuda=on_cuda, folder=os.path.relpath(folder, REPOSITORY)) if listed is None else listed
    end = time.monotonic() + 60 * options.minutes
    try:
        for part in parts:
            outcome = earlier.get(part.name)
            if outcome is None or outcome.status != "done" or outcome.command != as_typed(part):
                outcome = run_part(part, folder, min(60 * part.minutes, end - time.monotonic()), runner or run_command)
            run.parts.append(outcome)
            write_first_run(run, folder)
            print(f"{outcome.status:>8}  {outcome.name}, {outcome.seconds:.0f} s: {outcome.said}", flush=True)
    except KeyboardInterrupt:
        print(f"interrupted: what was measured until then is in {folder}", file=sys.stderr)
        return 130
    print(f"written to {folder}: first_run.md, first_run.json, and a folder and a log for each part")
    return 0 if all(outcome.status == "done" for outcome in run.parts) else 1


def environment_of_card() -> dict[str, Fact]:
    """Describe the GPU in a separate process, so that this process uses no GPU memory while the parts run."""
    script = "import json, torch; from harness.environment import describe_environment as describe"
    script += "; print(json.dumps(describe(torch.device('cuda'))))"
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY / "benchmarks", capture_output=True, text=True, check=False
    )
    if answer.returncode != 0:
        raise ValueError(f"the card cannot be described: {last_line(answer.stderr)}")
    facts: dict[str, Fact] = json.loads(answer.stdout)
    return facts


def default_folder(environment: dict[str, Fact]) -> Path:
    """Return the output folder, named after the GPU."""
    card = environment.get("device_name")
    if card is None:
        return Path("runs/cuda_first_run")
    return REPOSITORY / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", str(card).lower()).strip("-")


def read_outcomes(path: Path) -> dict[str, Outcome]:
    """Read the results of an earlier run; empty if there was none."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {outcome["name"]: Outcome(**outcome) for outcome in content["parts"]}


def as_typed(part: Part) -> str:
    """Return a part's command as it can be typed at the top of the repository."""
    return " ".join(["python", *part.command])


def run_part(part: Part, folder: Path, seconds: float, runner: Runner) -> Outcome:
    """Run a part in a separate process, with its output in a log."""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    outcome = Outcome(part.name, as_typed(part), "not run", date=date)
    if seconds <= 0:
        outcome.said = "the time for all parts was over; the same command again goes on here"
        return outcome
    log = folder / f"{part.name}.log"
    print(f"{'running':>8}  {outcome.command}", flush=True)
    start = time.monotonic()
    code = runner(part.command, log, seconds)
    outcome.seconds = time.monotonic() - start
    said = log.read_text(encoding="utf-8", errors="replace")
    outcome.said = last_line(said)
    # Python also exits with 1 for an uncaught error; benchmarks do for a missed target.
    missed = code == 1 and part.result is not None and "\nTraceback (most recent call last):" not in f"\n{said}"
    if code is None:
        outcome.status, outcome.said = "stopped", f"not done after {seconds:.0f} s; its last line: {outcome.said}"
    else:
        outcome.status = "done" if code == 0 or missed else "failed"
    return outcome


def run_command(
    command: Sequence[str], log: Path, seconds: float, seconds_to_save: float = SECONDS_TO_SAVE
) -> int | None:
    """Run Python from the top of the repository, and return its exit status; None if it was stopped.

    It is stopped with SIGINT, and has time to write its measurements.
    """
    with log.open("w", encoding="utf-8") as file:
        # A process inherits that SIGINT is ignored, as it is under `nohup ... &`; a handler is not inherited.
        inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            [sys.executable, *command], cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        signal.signal(signal.SIGINT, inherited)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                try:
                    process.wait(seconds_to_save)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def write_first_run(run: FirstRun, folder: Path) -> None:
    """Write `first_run.json`, and `first_run.md` to read."""
    run.predictions = compare_predictions(run, folder)
    write_text(folder / "first_run.json", json.dumps(asdict(run), indent=1) + "\n")
    write_text(folder / "first_run.md", as_markdown(run))


def compare_predictions(run: FirstRun, folder: Path) -> list[Comparison]:
    """Look up the measurement of each prediction in the files of its part."""
    results = {part.name: part.result for part in list_parts(on_cuda=True, folder="") if part.result is not None}
    ran = {outcome.name for outcome in run.parts}
    contents: dict[str, Any] = {}
    for name in ran & results.keys():
        path = folder / name / results[name]
        contents[name] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return [
        Comparison(
            prediction.part,
            prediction.what,
            prediction.low,
            prediction.high,
            prediction.read(content) if (content := contents.get(prediction.part)) else None,
        )
        for prediction in list_predictions()
    ]


def as_markdown(run: FirstRun) -> str:
    """Return the run as a page to read."""
    parts = [[part.name, part.status, f"{part.seconds:.0f}", part.said.replace("|", "/")] for part in run.parts]
    predicted_for = PREDICTED_FOR in str(run.environment.get("device_name"))
    lines = []
    for line in run.predictions:
        lines.append([f"{line.part}: {line.what}", f"{line.low:g} to {line.high:g}", "", ""])
        if line.measured is not None:
            lines[-1][2] = f"{line.measured:.4g}"
            inside = line.low <= line.measured <= line.high
            lines[-1][3] = ("as predicted" if inside else "otherwise") if predicted_for else ""
    commands = "\n".join(f"- {part.name}: `{part.command}`" for part in run.parts)
    return "\n".join(
        [
            "# First run on a card\n",
            describe(run),
            "## Parts\n",
            table(["", "became", "seconds", "its last line"], parts),
            f"\n{commands}\n",
            "## Predicted and measured\n",
            _WHAT_WAS_PREDICTED,
            table(["", "predicted", "measured", ""], lines),
            "",
        ]
    )


_WHAT_WAS_PREDICTED = """\
The predictions are estimates for an H100 SXM, made by reading the code before any of it had run on a GPU; of another
card, or a CPU, they say nothing. Only what was measured may be quoted.
"""


if __name__ == "__main__":
    sys.exit(main())
