"""The points of a finished cell that stand for its method, and how numbers and tables are written.

A line holds the points of whole paths. What is shown of them is the point that the method takes: t* of TSC, 1 (plain)
for fine-tuning; and, as "within budget", the one farthest from the suspect that loses at most `MAX_DROP` of its
accuracy on the held-out images, which needs no trigger: of a curve as `max_accuracy_drop` would choose it, of
fine-tuning the largest share of the fine-tuned model (interpolated fine-tuning), and so on for the other methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from hf_tsc.baselines.registry import BASELINES
from hf_tsc.benchmark.lines import Line
from hf_tsc.metrics import defense_effectiveness

MAX_DROP = 0.04
EXACT = 1e-9  # measures are written with six digits
COLUMNS = ("ACC before", "ASR before", "ACC", "ASR", "RA", "DER", "re-tuned ACC", "re-tuned ASR")
MEASURES = {"ACC": "accuracy", "ASR": "attack_success_rate", "RA": "robust_accuracy"}
TWIN_RETUNED = "twin's re-tuned ASR"  # shown where it is known
REACTIVATED = {  # shown where something was reactivated; this twin was not purified
    "reactivated ASR": "reactivated",
    "untouched twin's ASR": "twin_plain",
    "untouched twin's reactivated ASR": "twin",
}
LOST = "ACC lost"
Measures = dict[str, Any]


@dataclass(frozen=True)
class Taken:
    """A point of a finished cell that stands for its method, by a name of its own.

    `within` is that within budget; else it is the one that the method takes.
    """

    method: str
    line: Line
    point: Measures
    within: bool = False

    @property
    def place(self) -> str:
        """`report` where it was measured, else `select`."""
        return "report" if "report" in self.point else "select"

    def value(self, name: str) -> float | None:
        """A measure by its column, a fraction; None where it was not measured."""
        measured, before = self.point[self.place], self.line["before"][self.place]
        if name.endswith(" before"):
            return before[MEASURES[name.removesuffix(" before")]]
        if name == LOST:
            return before["accuracy"] - measured["accuracy"]
        if name == "DER":
            return defense_effectiveness(
                acc_before=before["accuracy"],
                acc_after=measured["accuracy"],
                asr_before=before["attack_success_rate"],
                asr_after=measured["attack_success_rate"],
            )
        if name in REACTIVATED:
            return self.point.get("reactivated", {}).get(REACTIVATED[name])
        if name == TWIN_RETUNED:
            return self.point.get("retuned_twin", {}).get("attack_success_rate")
        if name.startswith("re-tuned "):
            return self.point.get("retuned", {}).get(MEASURES[name.removeprefix("re-tuned ")])
        return measured[MEASURES[name]]


def last_points(line: Line) -> list[Measures]:
    """The points of a cell's last path."""
    return line["paths"][-1]["points"]


def is_taken(line: Line, point: Measures) -> bool:
    """Whether it is the point that the line's method takes, if it is one of the last path."""
    return bool(point["t"] == line["paths"][-1]["taken"])


def own_point(line: Line) -> Measures:
    """The point that the line's method takes."""
    return next(point for point in last_points(line) if is_taken(line, point))


def taken_points(line: Line) -> list[Taken]:
    """What a line has to say of each method; nothing where the method failed."""
    if "error" in line:
        return []
    names = names_of(line["method"])
    within = farthest_within(line)
    further = [Taken(names[1], line, within, within=True)] if within is not None else []
    return [Taken(names[0], line, own_point(line)), *further]


def columns_of(found: Sequence[Taken]) -> list[str]:
    """Those of a table: of clean twins and of reactivation only where something was measured."""
    twins = (TWIN_RETUNED,) if any("retuned_twin" in taken.point for taken in found) else ()
    return [*COLUMNS, *twins, *(REACTIVATED if any("reactivated" in taken.point for taken in found) else ())]


def has_other_row(several: Iterable[Taken]) -> bool:
    """Whether points within budget are all the ones that their method takes, which have a row of their own."""
    return all(taken.within and is_taken(taken.line, taken.point) for taken in several)


def names_of(method: str) -> tuple[str, str]:
    """What a method's own point is called, and what the one within budget."""
    if method == "fine_tuning":
        return "fine-tuning", "interpolated"
    short = "TSC" if method == "tsc" else BASELINES[method].short
    return short, f"{short} within budget"


def farthest_within(line: Line, max_drop: float = MAX_DROP) -> Measures | None:
    """The point within the accuracy budget on the held-out images that is farthest from the backdoored ends."""
    lowest = line["before"]["held_out"]["score"] - max_drop - EXACT
    both_ends = is_first_curve(line)
    inner = [p for p in last_points(line) if 0 < p["t"] < 1 or (p["t"] == 1 and line["method"] != "tsc")]
    within = [point for point in inner if point["held_out"]["score"] >= lowest]
    return max(within, key=lambda p: min(p["t"], 1 - p["t"]) if both_ends else p["t"], default=None)


def is_first_curve(line: Line) -> bool:
    """Whether the last path is a curve between the model and its copy, with a backdoor at either end."""
    return line["method"] == "tsc" and line["paths"][-1]["path"].endswith("curve 1")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the columns that hold numbers are set to the right."""

    def is_number(column: int) -> bool:
        return all(row[column][:1].isdigit() or row[column] == "" for row in rows)

    rule = ["---:" if rows and is_number(k) else "---" for k in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def shown_settings(lines: Sequence[Line]) -> Callable[[Line], tuple[tuple[str, str], ...]]:
    """What tells a line's settings from those of its method's other lines: names and values, as text."""
    methods = {line["method"] for line in lines}
    names = {method: _varying([line for line in lines if line["method"] == method]) for method in methods}
    return lambda line: tuple((name, _short(line["settings"].get(name))) for name in names[line["method"]])


def told(settings: Sequence[tuple[str, str]]) -> str:
    """Names and values of shown settings as text; without those that are not given."""
    return ", ".join(f"{name} {value}" for name, value in settings if value)


def _varying(lines: Sequence[Line]) -> list[str]:
    """The names of settings whose values differ between the lines."""
    settings = [line["settings"] for line in lines]
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if len({str(one.get(name)) for one in settings}) > 1]


def _short(value: Any) -> str:
    if value is None:
        return ""
    return " ".join(map(_short, value)) if isinstance(value, list) else str(value)


def percent(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return ""
    return f"{mean(known):.1f}" + (f" ± {stdev(known):.1f}" if len(known) > 1 else "")
