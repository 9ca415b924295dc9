"""All triggers by name, and how they are written as JSON and read again."""

from __future__ import annotations

import json
import operator
from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_tsc.errors import UsageError
from hf_tsc.triggers.base import NEXT, TargetLabel, Trigger
from hf_tsc.triggers.blending import SIG, AdaptiveBlend, Blended, LowFrequency
from hf_tsc.triggers.frequency import CTRL, FTrojan
from hf_tsc.triggers.generated import InputAware
from hf_tsc.triggers.patches import BadNets, LabelConsistent, Square
from hf_tsc.triggers.quantisation import BPP
from hf_tsc.triggers.warping import WaNet

TRIGGERS: dict[str, Any] = {
    trigger.name: trigger
    for trigger in (
        BadNets,
        Blended,
        Square,
        CTRL,
        SIG,
        WaNet,
        BPP,
        FTrojan,
        AdaptiveBlend,
        LabelConsistent,
        LowFrequency,
        InputAware,
    )
}


def trigger_to_dict(trigger: Trigger) -> dict[str, Any]:
    """Return `{"name": ..., **numbers}`, ready for JSON; what a trigger has learnt is kept in a file."""
    return {"name": trigger.name, **{name: getattr(trigger, name) for name in _numbers(type(trigger))}}


def trigger_from_dict(record: dict[str, Any], *, folder: Path | None = None) -> Trigger:
    """Make the trigger that `trigger_to_dict` wrote.

    Args:
        record: name and numbers; what is missing is as published.
        folder: where a trigger that is learnt has its file; None for one that is still to be trained.

    Raises:
        UsageError: the name is not in `TRIGGERS`, a key is not one of that trigger's numbers, or the file is missing.
    """
    numbers = dict(record)
    name = numbers.pop("name", None)
    if name not in TRIGGERS:
        raise UsageError(f"Got the trigger name {name!r}, expected one of {', '.join(sorted(TRIGGERS))}.")
    known = _numbers(TRIGGERS[name])
    if unknown := sorted(set(numbers) - set(known)):
        raise UsageError(f"The trigger {name!r} got the unknown key(s) {unknown}, expected some of {sorted(known)}.")
    made: Trigger = TRIGGERS[name](**numbers)
    return made.loaded(folder) if isinstance(made, InputAware) and folder is not None else made


def read_trigger(file: Path, *, to_train: bool = False) -> tuple[Trigger, TargetLabel | None]:
    """The trigger and the target label of a suspect's record or a report.

    Args:
        file: JSON.
        to_train: a trigger that is learnt is still to be trained, and its file is not looked for.

    Raises:
        UsageError: a trigger of another version, or one that is learnt and whose file is not beside.
        OSError, ValueError, KeyError, TypeError, AttributeError: the file holds something else.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    content = content.get("attack", content)
    target = content.get("target_label")
    trigger = trigger_from_dict(dict(content["trigger"]), folder=None if to_train else file.parent)
    return trigger, target if target is None or target == NEXT else operator.index(target)


def _numbers(kind: type) -> list[str]:
    """The names of the numbers that make a trigger: its fields without what it has learnt."""
    return [field.name for field in fields(kind) if field.compare]
