"""Tables and pictures of the lines that a benchmark left.

A line holds the points of whole paths. What is shown of them is the point that the method takes: t* of TSC, 1 (plain)
for fine-tuning; and, as "within budget", the one farthest from the suspect that loses at most `MAX_DROP` of its
accuracy on the held-out images, which needs no trigger: of a curve as `max_accuracy_drop` would choose it, of
fine-tuning the largest share of the fine-tuned model (interpolated fine-tuning), and so on for the other methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from hf_tsc.baselines.registry import BASELINES
from hf_tsc.benchmark.lines import Line
from hf_tsc.benchmark.methods import METHODS
from hf_tsc.metrics import defense_effectiveness

MAX_DROP = 0.04
COLOURS = {"TSC": "tab:blue", "interpolated": "tab:orange", "fine-tuning": "tab:red"}
OTHER_COLOURS = ("tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "tab:gray", "black")
Measures = dict[str, Any]


@dataclass(frozen=True)
class Taken:
    """The point of a finished cell that a method takes, by one name of the method."""

    method: str
    line: Line
    point: Measures

    @property
    def place(self) -> str:
        """`report` where it was measured, else `select`."""
        return "report" if "report" in self.point else "select"

    def value(self, name: str) -> float | None:
        """A measure by its column, a fraction; None where it was not measured."""
        measured, before = self.point[self.place], self.line["before"][self.place]
        if name.endswith(" before"):
            return before[MEASURES[name.removesuffix(" before")]]
        if name == "DER":
            return defense_effectiveness(
                acc_before=before["accuracy"],
                acc_after=measured["accuracy"],
                asr_before=before["attack_success_rate"],
                asr_after=measured["attack_success_rate"],
            )
        if name in REACTIVATED:
            return self.point.get("reactivated", {}).get(REACTIVATED[name])
        if name.startswith("re-tuned "):
            return self.point.get("retuned", {}).get(MEASURES[name.removeprefix("re-tuned ")])
        return measured[MEASURES[name]]


LABELS = {"tsc": "TSC over t", "fine_tuning": "interpolated fine-tuning over its share"}
MEASURES = {"ACC": "accuracy", "ASR": "attack_success_rate", "RA": "robust_accuracy"}
COLUMNS = ("ACC before", "ASR before", "ACC", "ASR", "RA", "DER", "re-tuned ACC", "re-tuned ASR")
REACTIVATED = {"reactivated ASR": "reactivated", "clean twin's ASR": "twin"}  # shown where something was reactivated


def last_points(line: Line) -> list[Measures]:
    """The points of a cell's last path."""
    return line["paths"][-1]["points"]


def taken_points(line: Line) -> list[Taken]:
    """What a line has to say of each method; nothing where the method failed."""
    if "error" in line:
        return []
    points, at = last_points(line), line["paths"][-1]["taken"]
    own = next(point for point in points if point["t"] == at)
    names = names_of(line["method"])
    within = farthest_within(line)
    return [Taken(names[0], line, own), *([Taken(names[1], line, within)] if within is not None else [])]


def names_of(method: str) -> tuple[str, str]:
    """What a method's own point is called, and what the one within budget."""
    if method == "fine_tuning":
        return "fine-tuning", "interpolated"
    short = "TSC" if method == "tsc" else BASELINES[method].short
    return short, f"{short} within budget"


def farthest_within(line: Line, max_drop: float = MAX_DROP) -> Measures | None:
    """The point within the accuracy budget on the held-out images that is farthest from the backdoored ends."""
    lowest = line["before"]["held_out"]["score"] - max_drop - 1e-9
    both_ends = is_first_curve(line)
    inner = [p for p in last_points(line) if 0 < p["t"] < 1 or (p["t"] == 1 and line["method"] != "tsc")]
    within = [point for point in inner if point["held_out"]["score"] >= lowest]
    return max(within, key=lambda p: min(p["t"], 1 - p["t"]) if both_ends else p["t"], default=None)


def is_first_curve(line: Line) -> bool:
    """Whether the last path is a curve between the model and its copy, with a backdoor at either end."""
    return line["method"] == "tsc" and line["paths"][-1]["path"].endswith("curve 1")


def group_table(lines: Sequence[Line]) -> str:
    """One row an attack, method and setting, in percent; several seeds as mean ± standard deviation.

    Settings that all lines of a method share are left out, and columns of reactivation where there was none.
    """
    varying = {method: _varying([line for line in lines if line["method"] == method]) for method in METHODS}

    def key(taken: Taken) -> tuple[Any, ...]:
        names = varying[taken.line["method"]]
        settings = tuple((name, _short(taken.line["settings"].get(name))) for name in names)
        return taken.line["attack"], taken.line["budget"], settings, taken.method

    rows = []
    found = sorted((taken for line in lines for taken in taken_points(line)), key=key)
    columns = [*COLUMNS, *(REACTIVATED if any("reactivated" in taken.point for taken in found) else ())]
    for (attack, budget, settings, method), several in groupby(found, key=key):
        same = list(several)
        points = ", ".join(sorted({f"{taken.point['t']:g}" for taken in same}))
        shown = ", ".join(f"{name} {value}" for name, value in settings if value)
        cells = [attack, str(budget), method, shown, points, str(len(same))]
        rows.append([*cells, *(_percent([taken.value(column) for taken in same]) for column in columns)])
    head = ["attack", "images", "method", "settings", "point", "seeds", *columns]
    return markdown(head, rows)


def suspect_table(lines: Iterable[Line]) -> str:
    """The suspects, on the images of `report`."""
    by_suspect = {line["suspect"]: line for line in lines}
    rows = []
    for _, line in sorted(by_suspect.items()):
        measured = line["before"]["report"]
        names = [line["model"], line["attack"], str(line["seed"])]
        rows.append([*names, *(_percent([measured[MEASURES[column]]]) for column in ("ACC", "ASR"))])
    return markdown(["model", "attack", "seed", "ACC", "ASR"], rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the columns that hold numbers are set to the right."""

    def is_number(column: int) -> bool:
        return all(row[column][:1].isdigit() or row[column] == "" for row in rows)

    rule = ["---:" if rows and is_number(k) else "---" for k in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def tables(lines: Sequence[Line]) -> str:
    """Markdown with a table of suspects and one for every group."""
    parts = [f"## Suspects\n\n{suspect_table(lines)}"]
    for name in dict.fromkeys(line["group"] for line in lines):
        for model in sorted({line["model"] for line in lines}):
            group = [line for line in lines if (line["group"], line["model"]) == (name, model)]
            parts += [f"## {name}: {model}\n\n{group_table(group)}"] if group else []
            failed = [f"- {line['id']}: {line['error']}" for line in group if "error" in line]
            parts += ["\n".join(failed)] if failed else []
    return "\n\n".join(parts) + "\n"


def _varying(lines: Sequence[Line]) -> list[str]:
    """The names of settings whose values differ between the lines."""
    settings = [line["settings"] for line in lines]
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if len({str(one.get(name)) for one in settings}) > 1]


def _short(value: Any) -> str:
    if value is None:
        return ""
    return " ".join(map(_short, value)) if isinstance(value, list) else str(value)


def _percent(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return ""
    return f"{mean(known):.1f}" + (f" ± {stdev(known):.1f}" if len(known) > 1 else "")


def plot_curves(line: Line) -> Figure:
    """Clean accuracy and attack success rate along every path of a cell."""
    paths = line["paths"]
    figure = Figure(figsize=(4 * len(paths) + 1, 3.4), layout="constrained")
    for number, path in enumerate(paths):
        axes = figure.add_subplot(1, len(paths), number + 1)
        ts = [point["t"] for point in path["points"]]
        for label, name, style in (("clean accuracy", "accuracy", "-o"), ("ASR", "attack_success_rate", "-s")):
            axes.plot(ts, [100 * point["select"][name] for point in path["points"]], style, markersize=3, label=label)
        retuned = [point for point in path["points"] if "retuned" in point]
        if retuned:
            values = [100 * point["retuned"]["attack_success_rate"] for point in retuned]
            axes.plot([point["t"] for point in retuned], values, "k^", markersize=5, label="ASR after re-tuning")
        axes.axvline(path["taken"], color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=path["path"], xlabel="t", ylabel="%", ylim=(-2, 102))
        axes.legend(fontsize=7)
    figure.suptitle(f"{line['model']}, {line['attack']}, seed {line['seed']}: {line['method']}")
    return figure


def plot_frontier(lines: Sequence[Line], *, title: str) -> Figure:
    """Where methods stand between accuracy and attack success rate, before and after re-tuning.

    TSC over t (of a first curve both ends are backdoored), interpolated fine-tuning over its share, each along its
    path, one line a cell; plain fine-tuning over learning rates as dots, as others that end their path. On the
    images of `report` where all lines have these, else on those of `select`.
    """
    lines = [line for line in lines if "error" not in line]
    images = "report" if all(_is_reported(line) for line in lines) else "select"
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, place, name in ((left, images, "purified"), (right, "retuned", "after re-tuning with poisoned images")):
        for line in lines:
            _plot_path(axes, line, place)
        axes.set(xlabel="clean accuracy, %", title=name, ylim=(-3, 103))
        axes.grid(alpha=0.3)
    left.set(ylabel="attack success rate, %")
    handles: dict[str, Any] = {}
    for axes in (left, right):
        drawn, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, drawn, strict=True))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    return figure


def _plot_path(axes: Any, line: Line, where: str) -> None:
    own, within = names_of(line["method"])
    points = [point for point in last_points(line) if where in point]
    xs = [100 * point[where]["accuracy"] for point in points]
    ys = [100 * point[where]["attack_success_rate"] for point in points]
    label = LABELS.get(line["method"], f"{own} along its path")
    colour = COLOURS.get(own if line["method"] == "tsc" else within) or _other_colour(line["method"])
    axes.plot(xs, ys, "-o", markersize=3, linewidth=1, color=colour, label=label)
    if line["method"] != "tsc" and points and points[-1]["t"] == line["paths"][-1]["taken"] == 1:
        axes.plot(xs[-1:], ys[-1:], "o", color=COLOURS.get(own, colour), label=own, zorder=3)


def _other_colour(method: str) -> str:
    """One of its own for each of the other baselines."""
    return OTHER_COLOURS[[name for name in BASELINES if name != "fine_tuning"].index(method) % len(OTHER_COLOURS)]


def write_results(lines: Sequence[Line], output: Path, say: Callable[[str], None] = print) -> None:
    """Write `tables.md`, a frontier for every suspect (of what was reported, once TSC was) and reported curves."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "tables.md").write_text(tables(lines), encoding="utf-8")
    for name, several in groupby(sorted(lines, key=_suspect_name), key=_suspect_name):
        of_suspect = list(several)
        reported = [line for line in of_suspect if "error" not in line and _is_reported(line)]
        shown = reported if any(line["method"] == "tsc" for line in reported) else of_suspect
        plot_frontier(shown, title=name.replace("-", ", ")).savefig(output / f"frontier-{name}.png", dpi=110)
        for line in of_suspect:
            if line["method"] == "tsc" and "error" not in line and _is_reported(line):
                plot_curves(line).savefig(output / f"curves-{name}-{line['id']}.png", dpi=110)
    say(f"tables.md and pictures are in {output}")


def _is_reported(line: Line) -> bool:
    return any("report" in point for point in last_points(line))


def _suspect_name(line: Line) -> str:
    return f"{line['model']}-{line['attack']}-{line['seed']}"
