"""Pictures of what a benchmark found: paths, and where methods stand between accuracy and attack success rate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from hf_tsc.baselines.registry import BASELINES
from hf_tsc.benchmark.lines import Line
from hf_tsc.benchmark.points import last_points, names_of, shown_settings

LABELS = {"tsc": "TSC over t", "fine_tuning": "interpolated fine-tuning over its share"}
IMAGES = {"select": "images for choosing", "report": "images for reporting"}
COLOURS = {"TSC": "tab:blue", "interpolated": "tab:orange", "fine-tuning": "tab:red"}
SHOWN = 20  # points of accuracy in a picture of frontiers
PALE = 0.2  # of what is not final
OTHER_COLOURS = (
    "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "tab:gray", "black", "gold"
)  # fmt: skip


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
    """Where methods stand between accuracy and attack success rate, before and, where that was done, after re-tuning.

    TSC over t (without the ends: of a first curve both are backdoored), interpolated fine-tuning over its share, each
    along its path, one line a cell, with a dot where the method takes a point; plain fine-tuning joined over learning
    rates where nothing else differs. Where the names of groups begin with `final`, cells of other groups are pale. On
    the images of `report` where all points were measured on these, else on those of `select`. What is more than
    `SHOWN` points of accuracy below the best is cut off.
    """
    return _plot_frontiers([[line] for line in lines if "error" not in line], title)


def plot_means(lines: Sequence[Line], *, title: str) -> Figure:
    """The same, each path as the mean over the lines of one method and setting: attacks and seeds."""
    finished = [line for line in lines if "error" not in line]
    settings = shown_settings(finished)

    def key(line: Line) -> tuple[Any, ...]:
        return line["method"], settings(line)

    return _plot_frontiers([list(several) for _, several in groupby(sorted(finished, key=key), key=key)], title)


def _plot_frontiers(paths: Sequence[Sequence[Line]], title: str) -> Figure:
    """Each path is the mean over some lines."""
    everywhere = all("report" in point for lines in paths for line in lines for point in last_points(line))
    images = "report" if everywhere else "select"
    retuned = any("retuned" in point for lines in paths for line in lines for point in last_points(line))
    names = {images: f"purified ({IMAGES[images]})"}
    names |= {"retuned": "after re-tuning with poisoned images"} if retuned else {}
    figure = Figure(figsize=(10 if retuned else 6, 4.2), layout="constrained")
    panels = figure.subplots(1, len(names), sharex=True, sharey=True, squeeze=False)[0]
    chosen = any(_is_final(lines) for lines in paths)
    paths, of_other_rates = sorted(paths, key=_is_final), sorted(_of_other_rates(paths), key=_are_final)
    for axes, (place, name) in zip(panels, names.items(), strict=True):
        for lines in paths:
            _plot_path(axes, lines, place, alpha=PALE if chosen and not _is_final(lines) else 1.0)
        for several in of_other_rates:
            _plot_rates(axes, several, place, alpha=PALE if chosen and not _are_final(several) else 1.0)
        axes.set(xlabel="clean accuracy, %", title=name, ylim=(-3, 103))
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="attack success rate, %")
    best = max((x for axes in panels for line in axes.get_lines() for x in line.get_xdata()), default=100)
    panels[0].set(xlim=(best - SHOWN, best + SHOWN / 20))
    handles: dict[str, Any] = {}
    for axes in panels:  # of several with a label the last one counts, which is not pale
        drawn, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, drawn, strict=True))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=1 + len(panels))
    figure.suptitle(title)
    return figure


def _is_final(lines: Sequence[Line]) -> bool:
    return all(line["group"].startswith("final") for line in lines)


def _are_final(several: Sequence[Sequence[Line]]) -> bool:
    return all(map(_is_final, several))


def _of_other_rates(paths: Sequence[Sequence[Line]]) -> list[list[Sequence[Line]]]:
    """Several paths of fine-tuning that differ in the learning rate alone, from the lowest on."""

    def rate(lines: Sequence[Line]) -> float:
        return lines[0]["settings"]["learning_rate"]

    def key(lines: Sequence[Line]) -> str:
        return json.dumps([lines[0]["budget"], {**lines[0]["settings"], "learning_rate": None}], sort_keys=True)

    tuned = [lines for lines in paths if lines[0]["method"] == "fine_tuning"]  # which cannot be without a rate
    groups = [sorted(several, key=rate) for _, several in groupby(sorted(tuned, key=key), key=key)]
    return [several for several in groups if len({rate(lines) for lines in several}) > 1]


def _plot_rates(axes: Any, several: Sequence[Sequence[Line]], where: str, *, alpha: float) -> None:
    ends = [point[1:] for lines in several for point in _mean_points(lines, where) if point[0] == 1]
    style = {"color": COLOURS["fine-tuning"], "alpha": alpha, "label": "fine-tuning over learning rates"}
    axes.plot([x for x, _ in ends], [y for _, y in ends], ":", linewidth=1.2, **style)


def _plot_path(axes: Any, lines: Sequence[Line], where: str, *, alpha: float) -> None:
    method, taken = lines[0]["method"], {line["paths"][-1]["taken"] for line in lines}
    own, within = names_of(method)
    points = [point for point in _mean_points(lines, where) if method != "tsc" or 0 < point[0] < 1]
    xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
    label = LABELS.get(method, f"{own} along its path")
    colour = COLOURS.get(own if method == "tsc" else within) or _other_colour(method)
    axes.plot(xs, ys, "-o", markersize=3, linewidth=1, color=colour, label=label, alpha=alpha)
    for _, x, y in (point for point in points if {point[0]} == taken):
        axes.plot([x], [y], "o", color=COLOURS.get(own, colour), label=own, zorder=3, alpha=alpha)


def _mean_points(lines: Sequence[Line], where: str) -> list[tuple[float, float, float]]:
    """t, accuracy and attack success rate in percent, at the points that all lines have been measured at."""
    measured = [{point["t"]: point[where] for point in last_points(line) if where in point} for line in lines]
    shared = sorted(set.intersection(*(set(points) for points in measured)))
    names = ("accuracy", "attack_success_rate")
    return [(t, *(100 * mean(points[t][name] for points in measured) for name in names)) for t in shared]


def _other_colour(method: str) -> str:
    """One of its own for each of the other baselines."""
    return OTHER_COLOURS[[name for name in BASELINES if name != "fine_tuning"].index(method) % len(OTHER_COLOURS)]


def is_reported(line: Line) -> bool:
    """Whether a point of the last path was measured on the images of `report`."""
    return any("report" in point for point in last_points(line))
