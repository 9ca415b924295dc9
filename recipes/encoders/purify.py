"""Purify suspects of plan.yaml with `hf-tsc purify`, as it comes, and measure them with `hf-tsc evaluate`.

Writes docs/results/encoders/commands.json: for each suspect what `evaluate` says before and after, on all test images,
and the settings that `purify` chose. Suspects are those that `hf-tsc benchmark` has left in its folder.

Usage: python recipes/encoders/purify.py DATASET --suspects FOLDER [--image_column_name NAME] [--work FOLDER]
           [--only WORD] [--learning_rate 0.012, or other options of `hf-tsc purify`, which the entry is named by then]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from datasets import load_dataset

from hf_tsc.benchmark.plan import Plan
from hf_tsc.folders import REPORT_FILE, write_json
from hf_tsc.report import PurificationReport
from hf_tsc.suspects import RECORD

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent.parent / "docs" / "results" / "encoders" / "commands.json"
BUDGET = 1400


def hf_tsc(*words: str) -> str:
    """What the command prints."""
    done = subprocess.run([sys.executable, "-m", "hf_tsc.cli", *words], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def purify(suspect: Path, clean: Path, output: Path, further: list[str]) -> dict[str, Any]:
    """The settings and the cost of a purification."""
    if not output.exists():
        words = ["--dataset_name", str(clean), "--budget", str(BUDGET), "--output_dir", str(output)]
        hf_tsc("purify", str(suspect), *words, *further, "--resume")
    report = PurificationReport.from_file(output / REPORT_FILE)
    chosen = ("objective", "learning_rate", "optim", "move_spaces", "feature_weight", "feature_states", "curve_epochs")
    settings = {name: report.arguments[name] for name in (*chosen, "curve1_t", "augmentation")}
    return {"settings": settings, "cost": report.cost, "environment": report.environment}


def main() -> None:
    """One suspect after the other; those that are in the file already are left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="with the splits train and test")
    parser.add_argument("--image_column_name")
    parser.add_argument("--suspects", type=Path, required=True, help="the benchmark's --cache_dir")
    parser.add_argument("--work", type=Path, help="keep the models here")
    parser.add_argument("--only", default="", help="suspects whose name contains this")
    asked, further = parser.parse_known_args()
    work = asked.work or Path(tempfile.mkdtemp())
    cells = Plan.read(HERE / "plan.yaml").cells
    first, last = cells[0].rows["clean"]
    clean = work / "clean"
    if not clean.exists():
        load_dataset(asked.dataset, split=f"train[{first}:{last}]").save_to_disk(clean)
    column = ["--image_column_name", asked.image_column_name] if asked.image_column_name else []
    probe = f"train[:{cells[0].rows['suspect'][1]}]"
    results = json.loads(OUTPUT.read_text(encoding="utf-8")) if OUTPUT.is_file() else {}
    for plan in {cell.suspect.id: cell.suspect for cell in cells if cell.group == "final"}.values():
        if asked.only not in plan.id:
            continue
        name = " ".join([plan.id, *further])
        found = [folder for folder in asked.suspects.glob(f"*/{plan.id}") if (folder / RECORD).is_file()]
        if name in results or not found:
            print(f"{name}: {'is there' if name in results else 'not trained yet'}")
            continue
        suspect, output = found[0], work / name.replace(" ", "_")
        measure = ["--dataset_name", asked.dataset, *column, "--dataset_split", "test", "--json"]
        measure += ["--probe_split", probe] if plan.kind == "encoder" else []
        measure += ["--trigger", plan.trigger["name"], "--target_label", str(plan.target_label)]
        before = json.loads(hf_tsc("evaluate", str(suspect), *measure))
        made = purify(suspect, clean, output, further)
        after = json.loads(hf_tsc("evaluate", str(output), *measure))
        results[name] = {"model": plan.model, "attack": plan.attack, **made, "before": before, "after": after}
        OUTPUT.parent.mkdir(parents=True, exist_ok=True)
        write_json(OUTPUT, results)
        print(f"{name}: {before} -> {after}", flush=True)


if __name__ == "__main__":
    main()
