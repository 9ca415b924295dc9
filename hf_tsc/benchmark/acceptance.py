"""Which suspects are fit to judge a defence by: the backdoor works, and the clean accuracy is that of the clean twin.

Attacks are known by their names in the plan: that of their trigger, `clean` for the clean twin, `all_to_all` for a
backdoor that leads each class to the next.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from hf_tsc.benchmark.lines import Line
from hf_tsc.benchmark.points import EXACT, MEASURES, markdown, percent, told
from hf_tsc.triggers import TRIGGERS

CLEAN, ALL_TO_ALL = "clean", "all_to_all"
LOWEST_ASR, LOWEST_ASR_CLEAN_LABEL = 0.9, 0.6
LARGEST_DISTANCE = 0.02  # of the accuracy from the clean twin's


def lowest_asr(attack: str, accuracy: float) -> float:
    """What the attack success rate must reach; of all-to-all a share of the accuracy, which is its bound."""
    if attack == ALL_TO_ALL:
        return LOWEST_ASR * accuracy
    clean_label = attack in TRIGGERS and TRIGGERS[attack].poisoning.clean_label
    return LOWEST_ASR_CLEAN_LABEL if clean_label else LOWEST_ASR


def shortcomings(lines: Iterable[Line]) -> dict[str, str]:
    """What each suspect misses on the images of `report`, in words; an empty text where nothing, and for clean twins.

    Args:
        lines: of a benchmark; a suspect's twin is the model of the attack `clean` with the same name and seed.
    """
    by_suspect = {line["suspect"]: line for line in lines}
    twins = {(line["model"], line["seed"]): line for line in by_suspect.values() if line["attack"] == CLEAN}
    return {
        name: "" if line["attack"] == CLEAN else _missed(line, twins.get((line["model"], line["seed"])))
        for name, line in by_suspect.items()
    }


def _missed(line: Line, twin: Line | None) -> str:
    measured = line["before"]["report"]
    wanted = lowest_asr(line["attack"], measured["accuracy"])
    missed = [f"ASR below {100 * wanted:.1f}"] if measured["attack_success_rate"] < wanted - EXACT else []
    if twin is None:
        missed.append("no clean twin")
    else:
        distance = abs(measured["accuracy"] - twin["before"]["report"]["accuracy"])
        missed += [f"ACC {100 * distance:.1f} from the clean twin's"] if distance > LARGEST_DISTANCE + EXACT else []
    return ", ".join(missed)


def suspect_table(lines: Sequence[Line]) -> str:
    """The suspects, on the images of `report`, what they miss, and how often each was trained.

    The same plan and seed give other weights on another machine. Lines of several trainings do not belong to one
    network; those without the hash of its weights count as one. Measures are of the last line. A suspect whose attack
    was given other settings since is called replaced; what the settings are is told where lines have any.
    """
    by_suspect, missed = {line["suspect"]: line for line in lines}, shortcomings(lines)
    last = {line["suspect"] for line in of_last_suspects(lines)}
    numbers = {name: _numbers(line) for name, line in by_suspect.items()}
    with_numbers, rows = any(numbers.values()), []
    for name, line in sorted(by_suspect.items()):
        measured = line["before"]["report"]
        names = [line["model"], line["attack"], *([numbers[name]] if with_numbers else []), str(line["seed"])]
        figures = [percent([measured[MEASURES[column]]]) for column in ("ACC", "ASR")]
        misses = [*([] if name in last else ["replaced"]), *([missed[name]] if missed[name] else [])]
        trainings = {other.get("weights") for other in lines if other["suspect"] == name}
        rows.append([*names, *figures, str(len(trainings)), ", ".join(misses)])
    columns = ["model", "attack", *(["numbers given"] if with_numbers else []), "seed", "ACC", "ASR", "trainings"]
    return markdown([*columns, "misses"], rows)


def _numbers(line: Line) -> str:
    """What the plan gave the trigger, and the share of poisoned images where the line tells it."""
    if line["attack"] == CLEAN:
        return ""
    rate = line.get("poison_rate")
    trigger = [(name, str(value)) for name, value in line.get("trigger", {}).items() if name != "name"]
    return told([*trigger, ("poisoned", f"{100 * rate:g} %" if rate else "")])


def of_last_runs(lines: Sequence[Line]) -> list[Line]:
    """Of lines that differ in nothing but where they are measured, the last one."""
    names = ("group", "suspect", "weights", "budget", "held_out", "method", "settings")
    last = {json.dumps([line.get(name) for name in names], sort_keys=True): line for line in lines}
    return list(last.values())


def of_last_suspects(lines: Sequence[Line]) -> list[Line]:
    """Of each model, attack and seed the lines of the last suspect: those of one that was replaced are left out."""
    return _like_the_last(lines, "suspect")


def of_last_training(lines: Sequence[Line]) -> list[Line]:
    """Of each model, attack and seed the lines that measured the same weights as the last one did."""
    return _like_the_last(lines, "suspect", "weights")


def _like_the_last(lines: Sequence[Line], *names: str) -> list[Line]:
    last = {(line["model"], line["attack"], line["seed"]): [line.get(name) for name in names] for line in lines}
    return [
        line
        for line in lines
        if [line.get(name) for name in names] == last[line["model"], line["attack"], line["seed"]]
    ]
