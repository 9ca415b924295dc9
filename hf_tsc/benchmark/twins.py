"""The control of the re-tuning attack: what it did to the clean twin, purified by the same method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hf_tsc.benchmark.acceptance import CLEAN
from hf_tsc.benchmark.lines import Line
from hf_tsc.benchmark.points import is_taken, last_points


def beside_twins(lines: Sequence[Line]) -> list[Line]:
    """The lines, in which the point that a method takes also holds `retuned_twin`, where that is known.

    It is known where the plan re-tuned the clean twin of the same model, seed and images, after the same method with
    the same settings, with the trigger of the line's attack, too (`retune_with`).
    """
    twins = {_key(line): line for line in lines if line["attack"] == CLEAN and "error" not in line}
    return [_beside(line, twins.get(_key(line))) for line in lines]


def _key(line: Line) -> str:
    """What a line and that of its clean twin have in common."""
    return json.dumps([line[name] for name in ("model", "seed", "budget", "method", "settings")], sort_keys=True)


def _beside(line: Line, twin: Line | None) -> Line:
    if twin is None or "error" in line:
        return line
    own = next(point for point in last_points(twin) if is_taken(twin, point))
    measured = own.get("retuned_with", {}).get(line["attack"])
    if measured is None:
        return line

    def beside(point: dict[str, Any]) -> dict[str, Any]:
        return {**point, "retuned_twin": measured} if is_taken(line, point) else point

    *others, last = line["paths"]
    return {**line, "paths": [*others, {**last, "points": [beside(point) for point in last["points"]]}]}
