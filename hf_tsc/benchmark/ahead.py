"""Who is ahead where: of each attack the methods with the lowest rates among those that keep the accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import mean

from hf_tsc.benchmark.acceptance import CLEAN
from hf_tsc.benchmark.lines import Line
from hf_tsc.benchmark.points import (
    EXACT,
    LOST,
    MAX_DROP,
    Taken,
    markdown,
    shown_settings,
    taken_points,
    told,
)

NEAR = 0.02  # of the lowest rate: one seed and some thousand images do not tell such methods apart
RATES = ("ASR", "re-tuned ASR")
HEAD = ("attack", "images", *(f"lowest {name}" for name in RATES), f"lose more than {100 * MAX_DROP:g} points")


def ahead_table(lines: Sequence[Line]) -> str:
    """One row an attack and number of clean images, in percent, as means over seeds at the points that methods take.

    Named are the methods whose rate is lowest or within `NEAR` of it, best first, among those that lose at most
    `MAX_DROP` of the accuracy; and, with what they lose, those that lose more. Clean twins have no rate to be lowest.
    Methods that are missing for a seed, or have failed on it, are not compared.

    Args:
        lines: of one model; those of `judging`, and of clean twins.
    """
    settings = shown_settings(lines)

    def row_of(line: Line) -> tuple[bool, str, int]:
        return line["attack"] == CLEAN, line["attack"], line["budget"]

    def name(taken: Taken) -> str:
        shown = told(settings(taken.line))
        return f"{taken.method} ({shown})" if shown else taken.method

    rows = []
    for (is_twin, attack, budget), group in groupby(sorted(lines, key=row_of), key=row_of):
        of_row = list(group)
        by_name = groupby(sorted(_own_points(of_row), key=name), key=name)
        measured = {key: _means(same) for key, several in by_name if _seeds(same := list(several)) == _seeds(of_row)}
        costly = {key: values[LOST] for key, values in measured.items() if values[LOST] > MAX_DROP + EXACT}
        kept = {key: values for key, values in measured.items() if key not in costly}
        lowest = ["" if is_twin else _named(_lowest(kept, rate)) for rate in RATES]
        rows.append([attack, str(budget), *lowest, _named(costly)])
    return markdown(HEAD, rows)


def _own_points(lines: Iterable[Line]) -> list[Taken]:
    """Of each line the point that its method takes, not that within budget."""
    return [taken for line in lines for taken in taken_points(line) if not taken.within]


def _seeds(several: Iterable[Line | Taken]) -> set[int]:
    return {one.line["seed"] if isinstance(one, Taken) else one["seed"] for one in several}


def _means(same: Sequence[Taken]) -> dict[str, float]:
    """Of what has been measured of all."""
    known = {column: [v for taken in same if (v := taken.value(column)) is not None] for column in (LOST, *RATES)}
    return {column: mean(values) for column, values in known.items() if len(values) == len(same)}


def _lowest(measured: dict[str, dict[str, float]], rate: str) -> dict[str, float]:
    known = {name: values[rate] for name, values in measured.items() if rate in values}
    lowest = min(known.values(), default=0.0)
    return {name: value for name, value in known.items() if value <= lowest + NEAR + EXACT}


def _named(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * values[name]:.1f}" for name in sorted(values, key=values.__getitem__))
