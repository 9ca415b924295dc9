"""Puts the numbers of docs/derive_speed.json and docs/matching.json into the tables of docs/symmetry.md.

python recipes/symmetry_docs.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"


def derive_table(record: dict[str, Any]) -> str:
    rows = [
        f"| {r['model']} | {r['parameters'] / 1e6:.0f} M | {r['spaces']} | {r['median_s']} |" for r in record["rows"]
    ]
    head = ["| model | parameters | spaces | seconds |", "|---|---:|---:|---:|"]
    return "\n".join([*head, *rows, "", _origin(record)])


def matching_table(record: dict[str, Any]) -> str:
    head = ["| ViT-B/16, all spaces | seconds | SciPy alone, one space of 3072 units |", "|---|---:|---:|"]
    rows = [f"| {r['problem']} | {r['seconds']} | {r['scipy_on_one_space_s']} |" for r in record["rows"]]
    return "\n".join([*head, *rows, "", _origin(record)])


def memory_table(record: dict[str, Any]) -> str:
    head = ["| model | taps | all at once, GB | at least, GB | activations of an image, GB |"]
    rows = [
        f"| {r['model']} | {r['taps']} | {r['all_gb']:.2f} | {r['largest_gb']:.2f} | {r['image_gb']:.3f} |"
        for r in record["memory"]
    ]
    return "\n".join([*head, "|---|---:|---:|---:|---:|", *rows])


def _origin(record: dict[str, Any]) -> str:
    hardware, versions = record["hardware"], record["versions"]
    return (
        f"`{record['command']}`, {record['date']}: {hardware['threads']} threads on {hardware['cores']} cores, "
        f"torch {versions['torch']}, transformers {versions['transformers']}."
    )


def with_tables(page: str) -> str:
    """The page with all tables as the files have them."""
    speed, matching = (json.loads((DOCS / name).read_text()) for name in ("derive_speed.json", "matching.json"))
    tables = {
        "derive_speed": derive_table(speed),
        "matching": matching_table(matching),
        "memory": memory_table(matching),
    }
    for name, table in tables.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end of table -->)"
        page = re.sub(pattern, lambda found, table=table: f"{found[1]}{table}\n{found[2]}", page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    file = DOCS / "symmetry.md"
    file.write_text(with_tables(file.read_text(encoding="utf-8")), encoding="utf-8")
