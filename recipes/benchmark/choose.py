"""Which settings the tuning chooses for each method and model, by the rule of docs/benchmark.md.

Usage: python recipes/benchmark/choose.py recipes/benchmark/tuning.jsonl > docs/benchmark/tuning.md

A candidate is a setting with a point of the path that it leaves. For TSC, WiSE-FT (off the lines of fine-tuning), MCR
and ANP that is every measured point between the ends, or the one that `max_accuracy_drop: 4` takes on a suspect's
held-out images; for the others the point that they take. Of a candidate count the means over the two attacks, on
`select`: how much accuracy it loses, and its attack success rate. Chosen is the lowest attack success rate among the
candidates that lose at most 4 points; where none does, the highest DER.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from hf_tsc.benchmark.lines import Line, read_lines
from hf_tsc.benchmark.means import TUNED_ON
from hf_tsc.benchmark.points import EXACT, MAX_DROP, farthest_within, is_taken, last_points, markdown
from hf_tsc.errors import UsageError
from hf_tsc.metrics import defense_effectiveness

GROUP = "tuning"
ALONG_PATHS = ("tsc", "wise_ft", "mcr", "anp")
WITHIN = f"max_accuracy_drop {100 * MAX_DROP:g}"


@dataclass(frozen=True)
class Candidate:
    """Means over the attacks, as fractions: of `loss`, the accuracy that is lost, of `asr` and of `der`."""

    model: str
    method: str
    settings: str
    point: str
    loss: float
    asr: float
    der: float


def candidates(lines: Iterable[Line]) -> list[Candidate]:
    """Those that were measured on both attacks; a method that failed on one of them has none.

    Raises:
        UsageError: lines of one suspect are of two trainings, whose measures cannot be compared.
    """
    found: dict[tuple[str, str, str, str], dict[str, tuple[float, float, float]]] = {}
    weights: dict[tuple[str, str], Any] = {}
    for line in lines:
        if line["group"] != GROUP or line["attack"] not in TUNED_ON or "error" in line:
            continue
        suspect = line["model"], line["attack"]
        if weights.setdefault(suspect, line.get("weights")) != line.get("weights"):
            raise UsageError(f"{line['id']}: {'/'.join(suspect)} was trained anew; run its former cells again")
        for method, name, point in _points(line):
            key = line["model"], method, _text(line["settings"]), name
            found.setdefault(key, {})[line["attack"]] = _measures(line, point)
    return [
        Candidate(*key, *(mean(values) for values in zip(*measured.values(), strict=True)))
        for key, measured in found.items()
        if len(measured) == len(TUNED_ON)
    ]


def best(several: Sequence[Candidate]) -> Candidate:
    """The rule."""
    within = [one for one in several if one.loss <= MAX_DROP + EXACT]
    if within:
        return min(within, key=lambda one: (one.asr, one.loss))
    return max(several, key=lambda one: one.der)


def chosen(lines: Iterable[Line]) -> list[Candidate]:
    """One of each model and method."""
    found = candidates(lines)
    pairs = sorted({(one.model, one.method) for one in found})
    return [best([one for one in found if (one.model, one.method) == pair]) for pair in pairs]


def page(lines: Sequence[Line]) -> str:
    """Markdown: what was chosen, from how many settings and, with the points of their paths, candidates."""
    tried: dict[tuple[str, str], list[str]] = {}
    for one in candidates(lines):
        tried.setdefault((one.model, one.method), []).append(one.settings)
    rows = []
    for one in chosen(lines):
        settings = tried[one.model, one.method]
        counts = str(len(set(settings))), str(len(settings))
        figures = [f"{100 * value:.1f}" for value in (one.loss, one.asr, one.der)]
        rows.append([one.model, one.method, one.settings, one.point, *counts, *figures])
    head = ["model", "method", "settings", "point", "of settings", "of candidates", "ACC lost", "ASR", "DER"]
    return f"# What the tuning chose\n\n{markdown(head, rows)}\n"


def _points(line: Line) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The points of a line that are candidates, with the method that each is one of, and a name."""
    own = line["method"]
    along = "wise_ft" if own == "fine_tuning" else own
    for point in last_points(line):
        if along in ALONG_PATHS and (0 < point["t"] < 1 or (own == "anp" and point["t"] == 0)):
            yield along, f"{point['t']:g}", point
        if own not in ALONG_PATHS and is_taken(line, point):
            yield own, f"{point['t']:g}", point
    if along in ALONG_PATHS and (within := farthest_within(line)) is not None:
        yield along, WITHIN, within


def _measures(line: Line, point: dict[str, Any]) -> tuple[float, float, float]:
    before, after = line["before"]["select"], point["select"]
    accuracies = {"acc_before": before["accuracy"], "acc_after": after["accuracy"]}
    rates = {"asr_before": before["attack_success_rate"], "asr_after": after["attack_success_rate"]}
    loss = before["accuracy"] - after["accuracy"]
    return loss, after["attack_success_rate"], defense_effectiveness(**accuracies, **rates)


def _text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


if __name__ == "__main__":
    print(page(read_lines(Path(sys.argv[1]))), end="")
