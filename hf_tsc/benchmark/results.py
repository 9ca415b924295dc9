"""Tables and pictures of the lines that a benchmark left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from hf_tsc.benchmark.acceptance import CLEAN, of_last_runs, of_last_suspects, of_last_training, suspect_table
from hf_tsc.benchmark.ahead import ahead_table
from hf_tsc.benchmark.lines import Line
from hf_tsc.benchmark.means import attacks_of, judging, means_table
from hf_tsc.benchmark.pictures import is_reported, plot_curves, plot_frontier, plot_means
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
from hf_tsc.benchmark.twins import beside_twins


def group_table(lines: Sequence[Line]) -> str:
    """One row an attack, method and setting, in percent; several seeds as mean ± standard deviation.

    Left out are settings that all lines of a method share, columns of clean twins and of reactivation where they would
    be empty, and points within budget where they are the ones that the method takes.
    """
    settings_of = shown_settings(lines)

    def key(taken: Taken) -> tuple[Any, ...]:
        return taken.line["attack"], taken.line["budget"], settings_of(taken.line), taken.method

    rows = []
    found = sorted((taken for line in lines for taken in taken_points(line)), key=key)
    columns = columns_of(found)
    for (attack, budget, settings, method), several in groupby(found, key=key):
        same = list(several)
        if has_other_row(same):
            continue
        points = ", ".join(sorted({f"{taken.point['t']:g}" for taken in same}))
        cells = [attack, str(budget), method, told(settings), points, str(len(same))]
        rows.append([*cells, *(percent([taken.value(column) for taken in same]) for column in columns)])
    head = ["attack", "images", "method", "settings", "point", "seeds", *columns]
    return markdown(head, rows)


def tables(lines: Sequence[Line]) -> str:
    """Markdown with a table of suspects; for a group's models of attacks, of their means, of who is ahead."""
    parts = [f"## Suspects\n\n{suspect_table(lines)}"]
    lines = beside_twins(of_last_suspects(of_last_runs(lines)))
    counting = judging(lines)
    for name in dict.fromkeys(line["group"] for line in lines):
        for model in sorted({line["model"] for line in lines}):
            group, judged = (_of_group(some, name, model) for some in (lines, counting))
            parts += [f"## {name}: {model}\n\n{group_table(group)}"] if group else []
            failed = [f"- {line['id']}: {line['error']}" for line in group if "error" in line]
            parts += ["\n".join(failed)] if failed else []
            if len(attacks := attacks_of(judged)) > 1:
                parts.append(f"### {name}: {model}, means over {', '.join(attacks)}\n\n{means_table(judged)}")
                twins = [line for line in of_last_training(group) if line["attack"] == CLEAN]
                parts.append(f"### {name}: {model}, who is ahead\n\n{ahead_table([*judged, *twins])}")
    return "\n\n".join(parts) + "\n"


def _of_group(lines: Sequence[Line], name: str, model: str) -> list[Line]:
    return [line for line in lines if (line["group"], line["model"]) == (name, model)]


def write_results(lines: Sequence[Line], output: Path, say: Callable[[str], None] = print) -> None:
    """Write `tables.md`, a frontier for every suspect, curves and means.

    A frontier is of the last training of its suspect, and of what was reported once TSC was; the other cells, which
    settings were chosen among, get a picture of their own, `search-...`. Of cells that were run twice on the same
    weights the last run is drawn.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / "tables.md").write_text(tables(lines), encoding="utf-8")
    last_runs = of_last_runs(lines)
    for name, several in groupby(sorted(last_runs, key=_suspect_name), key=_suspect_name):
        of_suspect = list(several)
        drawn = of_last_training(of_suspect)
        finished = [line for line in drawn if "error" not in line]
        searched = [line for line in finished if not is_reported(line)]
        reported = [line for line in finished if is_reported(line)]
        if not any(line["method"] == "tsc" for line in reported):
            reported, searched = finished, []
        title = name.replace("-", ", ")
        plot_frontier(reported, title=title).savefig(output / f"frontier-{name}.png", dpi=110)
        if searched:
            plot_frontier(searched, title=f"{title}: the search").savefig(output / f"search-{name}.png", dpi=110)
        for line in of_suspect:
            if line["method"] == "tsc" and "error" not in line and is_reported(line):
                plot_curves(line).savefig(output / f"curves-{name}-{line['id']}.png", dpi=110)
    _write_means(judging(last_runs), output)
    say(f"tables.md and pictures are in {output}")


def _write_means(lines: Sequence[Line], output: Path) -> None:
    """A picture of every group, model and number of clean images, where several attacks count."""

    def key(line: Line) -> tuple[str, str, int]:
        return line["group"], line["model"], line["budget"]

    for (group, model, budget), several in groupby(sorted(lines, key=key), key=key):
        same = list(several)
        if len(attacks := attacks_of(same)) > 1:
            title = f"{model}, {budget} clean images: means over {', '.join(attacks)}"
            plot_means(same, title=title).savefig(output / f"means-{group}-{model}-{budget}.png", dpi=110)


def _suspect_name(line: Line) -> str:
    return f"{line['model']}-{line['attack']}-{line['seed']}"
