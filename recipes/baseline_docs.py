"""The table of methods in docs/baselines.md, made of what the code declares.

Usage: python recipes/baseline_docs.py
"""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from hf_tsc.baselines.registry import BASELINES, Baseline
from hf_tsc.baselines.settings import Training

PAGE = Path(__file__).resolve().parent.parent / "docs" / "baselines.md"
MARKS = ("<!-- table: recipes/baseline_docs.py -->\n", "<!-- end of table -->")


def table() -> str:
    """One row a method, as markdown."""
    lines = [
        "| `--method` | what it does | own settings and defaults | gradient evaluations | its point |",
        "|---|---|---|---|---|",
    ]
    for name, baseline in BASELINES.items():
        paper = f" ([{baseline.authors}](https://hf.co/papers/{baseline.paper}))" if baseline.paper else ""
        cells = [f"`{name}`", f"**{baseline.title}**{paper}. {baseline.does}", _settings(baseline)]
        lines.append(f"| {' | '.join([*cells, baseline.counted, baseline.chosen])} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """The page with the table between its marks replaced."""
    head, rest = page.split(MARKS[0])
    _, tail = rest.split(MARKS[1])
    return f"{head}{MARKS[0]}{table()}{MARKS[1]}{tail}"


def _settings(baseline: Baseline) -> str:
    """Those of its own, and shared ones with a default of its own."""
    usual = {entry.name: _default(entry) for entry in fields(Training)}
    own = [(entry.name, _default(entry)) for entry in fields(baseline.settings)]
    shown = [f"`{name}` {_text(value)}" for name, value in own if name not in usual or value != usual[name]]
    return ", ".join(shown) or "those below"


def _default(entry: Field[Any]) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def _text(value: Any) -> str:
    if isinstance(value, list):
        return (
            f"{value[0]:g}, {value[1]:g}, ... {value[-1]:g}" if len(value) > 3 else " ".join(f"{x:g}" for x in value)
        )
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
