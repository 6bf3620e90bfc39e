"""The support matrix of all timm architectures: wrapping, keeping the classifier, `to_module()`, layer groups.

    python benchmarks/timm_zoo.py

Structure comes from the meta device, for every architecture; logits from real values, for the smallest network of each
kind of structure in each family. An interrupted run resumes: results are in a `.jsonl` next to the
output, which is deleted when the matrix is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import timm
import torch
from harness.environment import describe_command, describe_environment
from harness.results import write_text
from tqdm import tqdm
from zoo.examination import examine_structure, examine_values
from zoo.record import Structure, as_row, decide_kept, read_lines, write_line
from zoo.summary import as_markdown

# From timm's own list of what each of its files defines.
FAMILIES = {name: family for family in timm.list_modules() for name in timm.list_models(module=family)}


def main() -> None:
    """Examine the remaining architectures, then write the matrix and its summary."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    started = options.output.with_suffix(f".timm-{timm.__version__}.jsonl")
    started.parent.mkdir(parents=True, exist_ok=True)
    structures, values = read_lines(started)
    chosen = options.models or timm.list_models()
    for name in tqdm([name for name in chosen if name not in structures], desc="structure"):
        structures[name] = examine_structure(name, FAMILIES[name])
        write_line(started, "structure", structures[name])
    structures = {name: structures[name] for name in chosen}
    for structure in tqdm([s for s in smallest_of_each_kind(structures) if s.name not in values], "values"):
        values[structure.name] = examine_values(structure)
        write_line(started, "values", values[structure.name])

    by_signature: dict[str, list[str]] = {}
    for structure in structures.values():
        by_signature.setdefault(f"{structure.family} {structure.signature}", []).append(structure.name)
    rows = [
        as_row(s, values.get(s.name), decide_kept(s, values, by_signature[f"{s.family} {s.signature}"]))
        for s in structures.values()
    ]
    header = {"command": describe_command(__file__, sys.argv[1:]), **describe_environment(torch.device("cpu"))}
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = f'{{"environment": {json.dumps(header)},\n"architectures": [\n{lines}\n]}}\n'
    write_text(options.output.with_suffix(".json"), text)
    write_text(options.output.with_suffix(".md"), as_markdown(rows, header))
    started.unlink()
    print(f"wrote {options.output.with_suffix('.json')} and {options.output.with_suffix('.md')}")


def smallest_of_each_kind(structures: dict[str, Structure]) -> list[Structure]:
    """Return the networks to run with values: the smallest of each family and kind of structure, small ones first."""
    smallest: dict[str, Structure] = {}
    for structure in sorted((s for s in structures.values() if s.refused is None), key=lambda s: s.parameters):
        smallest.setdefault(f"{structure.family} {structure.signature}", structure)
    return list(smallest.values())


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME", help="architectures (default: all of timm's)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "timm_zoo")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args()
    if unknown := [name for name in options.models if name not in FAMILIES]:
        parser.error(f"{', '.join(unknown)}: no architecture of timm {timm.__version__}")
    return options


if __name__ == "__main__":
    main()
