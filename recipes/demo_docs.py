"""Run the demo for seeds 0, 1 and 2 and keep what it gives.

Writes docs/demo/seed-N.json, table.md and MODEL.png, the cards in model_cards/ with the reports that they are made of,
and the table in README.md.

Usage: python recipes/demo_docs.py [--work FOLDER]     (about twenty minutes on two cores)
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from hf_tsc.demo import DEMO_MODELS, RESULT_FILE, best_fine_tuning, run_demo
from hf_tsc.folders import CARD_FILE, PLOT_FILE, REPORT_FILE

ROOT = Path(__file__).resolve().parent.parent
DOCS, CARDS, README = ROOT / "docs" / "demo", ROOT / "model_cards", ROOT / "README.md"
MARKS = ("<!-- table: docs/demo/table.md -->\n", "<!-- end of table -->")
SEEDS = (0, 1, 2)


def table(records: list[dict[str, Any]]) -> str:
    """Means over the seeds, in percent, as markdown."""
    lines = ["| model | | clean accuracy | attack success rate |", "|---|---|---:|---:|"]
    for i, name in enumerate(DEMO_MODELS):
        runs = [record["models"][i] for record in records]
        rows = {
            "suspect": [run["before"] for run in runs],
            "plain fine-tuning, best of 3 rates": [best_fine_tuning(run)[1] for run in runs],
            "**TSC**": [run["tsc"] for run in runs],
        }
        for label, entries in rows.items():
            accuracy = [100 * entry["accuracy"] for entry in entries]
            success = [100 * entry["attack_success_rate"] for entry in entries]
            lines.append(f"| {name} | {label} | {_summary(accuracy)} | {_summary(success)} |")
    return "\n".join(lines) + "\n"


def with_table(readme: str, rows: str) -> str:
    """The README with the table between its marks replaced."""
    head, rest = readme.split(MARKS[0])
    _, tail = rest.split(MARKS[1])
    return f"{head}{MARKS[0]}{rows}{MARKS[1]}{tail}"


def _summary(values: list[float]) -> str:
    return f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    """Run, copy, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="keep the models here")
    work = parser.parse_args().work or Path(tempfile.mkdtemp())
    DOCS.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS:
        output = work / f"seed-{seed}"
        if not (output / RESULT_FILE).is_file():
            shutil.rmtree(output, ignore_errors=True)
            run_demo(output, seed=seed, names=list(DEMO_MODELS))
        shutil.copy(output / RESULT_FILE, DOCS / f"seed-{seed}.json")
    for name in DEMO_MODELS:
        purified = work / "seed-0" / f"{name}-purified"
        shutil.copy(purified / PLOT_FILE, DOCS / f"{name}.png")
        shutil.copy(purified / CARD_FILE, CARDS / f"demo-{name}.md")
        shutil.copy(purified / REPORT_FILE, CARDS / f"demo-{name}.json")
    records = [json.loads((DOCS / f"seed-{seed}.json").read_text(encoding="utf-8")) for seed in SEEDS]
    (DOCS / "table.md").write_text(table(records), encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8"), table(records)), encoding="utf-8")
    print(table(records))


if __name__ == "__main__":
    main()
