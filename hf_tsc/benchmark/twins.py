"""The control of the re-tuning attack: what it did to the clean twin, purified by the same method."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hf_tsc.benchmark.acceptance import CLEAN
from hf_tsc.benchmark.lines import Line
from hf_tsc.benchmark.points import is_taken, own_point

ATTACK = ("trigger", "target_label")


def beside_twins(lines: Sequence[Line]) -> list[Line]:
    """The lines, in which the point that a method takes also holds `retuned_twin`, where that is known.

    It is known where the plan re-tuned the clean twin of the same model, seed and images, after the same method with
    the same settings, with the trigger of the line's attack, too (`retune_with`).
    """
    known: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["attack"] == CLEAN and "error" not in line:
            known.setdefault(_run(line), {}).update(_retuned(line))
    return [_beside(line, known.get(_run(line), {})) for line in lines]


def _run(line: Line) -> str:
    """What a line and that of its clean twin have in common."""
    return json.dumps([line[name] for name in ("model", "seed", "budget", "method", "settings")], sort_keys=True)


def _attack(described: Mapping[str, Any]) -> str:
    return json.dumps([described.get(name) for name in ATTACK], sort_keys=True)


def _retuned(twin: Line) -> dict[str, Any]:
    """What each attack did at the point that the method takes, by the attack."""
    return {_attack(measured): measured for measured in own_point(twin).get("retuned_with", {}).values()}


def _beside(line: Line, known: dict[str, Any]) -> Line:
    if "error" in line or line["attack"] == CLEAN or (measured := known.get(_attack(line))) is None:
        return line

    def beside(point: dict[str, Any]) -> dict[str, Any]:
        return {**point, "retuned_twin": measured} if is_taken(line, point) else point

    *others, last = line["paths"]
    return {**line, "paths": [*others, {**last, "points": [beside(point) for point in last["points"]]}]}
