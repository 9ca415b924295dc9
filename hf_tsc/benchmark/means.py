"""Means over attacks. Those that settings were chosen on have no part in them, nor have suspects that miss a limit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from statistics import mean
from typing import Any

from hf_tsc.benchmark.acceptance import ALL_TO_ALL, CLEAN, of_last_training, shortcomings
from hf_tsc.benchmark.lines import Line
from hf_tsc.benchmark.points import (
    Taken,
    columns_of,
    has_other_row,
    markdown,
    percent,
    shown_settings,
    taken_points,
    told,
)

TUNED_ON = ("badnets", "blended")
LEFT_OUT = (*TUNED_ON, ALL_TO_ALL, CLEAN)  # all-to-all has a trigger that settings were chosen on


def judging(lines: Sequence[Line]) -> list[Line]:
    """The lines that count: of suspects without shortcomings, and attacks that no setting was chosen on.

    Of a suspect that was changed or trained anew, only the last one counts.
    """
    missed = shortcomings(lines)
    return [line for line in of_last_training(lines) if line["attack"] not in LEFT_OUT and not missed[line["suspect"]]]


def attacks_of(lines: Sequence[Line]) -> list[str]:
    return sorted({line["attack"] for line in lines})


def means_table(lines: Sequence[Line]) -> str:
    """One row a method and setting, in percent: means over attacks, and over seeds mean ± standard deviation of these.

    Points within budget have none where all of them are those that the method takes.

    Args:
        lines: those of `judging`, of one model. A method that failed on a suspect has fewer suspects there.
    """
    settings, total = shown_settings(lines), len({line["suspect"] for line in lines})

    def key(taken: Taken) -> tuple[Any, ...]:
        return taken.line["budget"], settings(taken.line), taken.method

    rows = []
    found = sorted((taken for line in lines for taken in taken_points(line)), key=key)
    columns = columns_of(found)
    for (budget, shown, method), several in groupby(found, key=key):
        same = list(several)
        if has_other_row(same):
            continue
        head = [str(budget), method, told(shown), f"{len({taken.line['suspect'] for taken in same})} of {total}"]
        rows.append([*head, *(percent(_by_seed(same, column)) for column in columns)])
    return markdown(["images", "method", "settings", "suspects", *columns], rows)


def _by_seed(same: Sequence[Taken], column: str) -> list[float | None]:
    """Of each seed the mean over its attacks; None where one of them was not measured."""
    means: list[float | None] = []
    for seed in sorted({taken.line["seed"] for taken in same}):
        values = [taken.value(column) for taken in same if taken.line["seed"] == seed]
        known = [value for value in values if value is not None]
        means.append(mean(known) if len(known) == len(values) else None)
    return means
