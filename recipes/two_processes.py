"""Purify one suspect in one process and in two, three seeds each: does the number of processes change the outcome?

    hf-tsc train-suspect ... --output_dir suspect        # or one that `hf-tsc benchmark` has trained
    python recipes/two_processes.py suspect --dataset_name uoft-cs/cifar10 --image_column_name img

writes a row a run to docs/two_processes.json, and the table in docs/processes.md. Both have as many images a step and
the default settings, and each process one thread. Runs that have their row are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from hf_tsc.folders import REPORT_FILE, write_json

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MARKS = ("<!-- table: docs/two_processes.json -->\n", "<!-- end of table -->")
SEEDS = (0, 1, 2)
VARIANTS: dict[str, list[str]] = {
    "1 x 64": [],
    "2 x 32, `--sync_batch_norm`": ["--num_processes", "2", "--sync_batch_norm"],
    "2 x 32": ["--num_processes", "2"],
}


def purify(suspect: Path, data: list[str], variant: str, seed: int) -> dict[str, Any]:
    """A row: what came out of one purification."""
    options = VARIANTS[variant]
    several = ["--accelerate_config", "multi_cpu", "--per_device_train_batch_size", "32"] if options else []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "purified"
        command = [sys.executable, "-m", "hf_tsc.cli", "purify", str(suspect.absolute()), *data]
        command += ["--test_split", "test", "--trigger", str((suspect / "suspect.json").absolute())]
        command += ["--seed", str(seed), "--save_strategy", "no", "--output_dir", str(output), *several, *options]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        report = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))
    keys = ("accuracy", "attack_success_rate")
    return {
        "variant": variant,
        "seed": seed,
        "before": {key: round(report["before"]["test"][key], 6) for key in keys},
        "after": {key: round(report["after"]["test"][key], 6) for key in keys},
        "images": report["after"]["test"]["n"],
        "architecture": report["suspect"]["architecture"],
        "seconds": report["cost"]["seconds"],
        "environment": report["environment"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy and attack success rate by variant, in percent, as markdown."""
    lines = [
        f"| processes x images a step | {' | '.join(f'seed {seed}' for seed in SEEDS)} | mean |",
        "|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        found = {row["seed"]: row["after"] for row in rows if row["variant"] == variant}
        if not found:
            continue
        pairs = [(100 * one["accuracy"], 100 * one["attack_success_rate"]) for _, one in sorted(found.items())]
        cells = [f"{accuracy:.1f} / {rate:.1f}" for accuracy, rate in pairs]
        means = f"{mean(a for a, _ in pairs):.1f} / {mean(r for _, r in pairs):.1f}"
        lines.append(f"| {variant} | {' | '.join(cells)} | {means} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suspect", type=Path, help="folder with a suspect and its suspect.json")
    parser.add_argument("--output", type=Path, default=DOCS / "two_processes.json")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="by default all")
    args, data = parser.parse_known_args()  # the rest names the clean images
    rows = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else []
    for seed in SEEDS:
        for variant in args.variants:
            if any((row["variant"], row["seed"]) == (variant, seed) for row in rows):
                continue
            rows.append(purify(args.suspect, data, variant, seed))
            write_json(args.output, rows)
    page = DOCS / "processes.md"
    head, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    page.write_text(f"{head}{MARKS[0]}{table(rows)}{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
