"""The suspects that a benchmark plan names: what each is trained from, and which other model it starts from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from hf_tsc.suspects import Adaptive, SuspectConfig
from hf_tsc.triggers import NEXT, Attack, Poisoning, TargetLabel, trigger_from_dict

POISON, BAD_ENCODER, ADAPTIVE = "poison", "bad_encoder", "adaptive"
KINDS = ("classifier", "encoder", "dual_encoder")


@dataclass(frozen=True)
class SuspectPlan:
    """A suspect that is trained once: everything that its weights depend on, but the images themselves.

    `start` is the clean encoder that a BadEncoder is made of, the clean classifier that images are hardened against,
    or the suspect that an adaptive one is tuned from; `adaptive` holds the latter's settings.
    """

    model: str
    attack: str
    seed: int
    config: dict[str, Any]
    image_size: int
    trigger: dict[str, Any]
    target_label: TargetLabel
    poison_rate: float
    arguments: dict[str, Any]
    rows: tuple[int, int]
    kind: str = "classifier"
    start: SuspectPlan | None = None
    adaptive: dict[str, Any] | None = None

    @property
    def id(self) -> str:
        return f"{self.model}-{self.attack}-{self.seed}-{digest(self._content())}"

    @property
    def is_clean(self) -> bool:
        """Whether it is a clean twin."""
        return self.poison_rate == 0 and self.start is None

    @property
    def learns_trigger(self) -> bool:
        """Whether its trigger is trained together with it."""
        return trigger_from_dict(self.trigger).poisoning.learnt

    @property
    def attack_content(self) -> dict[str, Any]:
        """What is put on images, and what they are called then."""
        return {"trigger": self.trigger, "target_label": self.target_label}

    def _content(self) -> dict[str, Any]:
        """What later versions added has no part in it where it is not used, so that ids stay what they are."""
        apart = {"model", "attack", "start"}
        apart |= {"kind"} if self.kind == "classifier" else set()
        apart |= {"adaptive"} if self.adaptive is None else set()
        content = {key: value for key, value in vars(self).items() if key not in apart}
        return content | ({"start": self.start.id} if self.start is not None else {})


@dataclass(frozen=True)
class Suspects:
    """The models and attacks of a plan, for one model, seed and range of rows.

    Args:
        content: of the plan file.
        model: its name in there.
        seed, rows: of the suspects.
    """

    content: Mapping[str, Any]
    model: str
    seed: int
    rows: tuple[int, int]

    def of(self, attack: str) -> SuspectPlan:
        """The suspect of an attack; ValueError, KeyError or UsageError where the plan says something impossible."""
        for kind, name in (("models", self.model), ("attacks", attack)):
            if name not in self.content[kind]:
                raise ValueError(f"{name!r} is none of the {kind}: {', '.join(self.content[kind])}")
        architecture, poisoning = self.content["models"][self.model], self._attacks()[attack]
        target = NEXT if poisoning["target_label"] == NEXT else int(poisoning["target_label"])
        # each complains of what it does not know
        how = Attack(trigger_from_dict(poisoning["trigger"]), target).trigger.poisoning
        AutoConfig.for_model(**architecture["config"])
        kind, method = architecture.get("kind", KINDS[0]), poisoning.get("method", POISON)
        _check_fit(attack, how, kind, target, float(poisoning["poison_rate"]))
        _check_method(attack, how, self.model, kind, poisoning)
        arguments = _arguments(architecture, method)
        SuspectConfig(output_dir="unused", use_cpu=True, **arguments)
        return SuspectPlan(
            model=self.model,
            attack=attack,
            seed=self.seed,
            config=architecture["config"],
            image_size=int(architecture["image_size"]),
            trigger=poisoning["trigger"],
            target_label=target,
            poison_rate=float(poisoning["poison_rate"]),
            arguments=arguments,
            rows=self.rows,
            kind=kind,
            start=self._start(attack, how, poisoning),
            adaptive=poisoning.get("settings", {}) if method == ADAPTIVE else None,
        )

    def clean_twin(self, attack: str, what_for: str = "starts from") -> SuspectPlan:
        """Of the plan's first attack without poison; ValueError, which says what for, where there is none."""
        for name, other in self._attacks().items():
            if float(other["poison_rate"]) == 0 and "method" not in other:
                return self.of(name)
        raise ValueError(f"attack {attack} {what_for} a clean model: add an attack with poison_rate 0")

    def _attacks(self) -> dict[str, dict[str, Any]]:
        """The plan's, with what is different in them for this model."""
        own = self.content["models"][self.model].get("attacks", {})
        return {name: {**attack, **own.get(name, {})} for name, attack in self.content["attacks"].items()}

    def _start(self, attack: str, how: Poisoning, poisoning: Mapping[str, Any]) -> SuspectPlan | None:
        method = poisoning.get("method", POISON)
        if method == ADAPTIVE:
            return self._base(attack, poisoning)
        surrogate = how.surrogate and float(poisoning["poison_rate"]) > 0
        return self.clean_twin(attack) if method == BAD_ENCODER or surrogate else None

    def _base(self, attack: str, poisoning: Mapping[str, Any]) -> SuspectPlan:
        """The plan's suspect with the same poison."""
        same = ("trigger", "target_label", "poison_rate")
        for name, other in self._attacks().items():
            if "method" not in other and all(other[key] == poisoning[key] for key in same):
                return self.of(name)
        raise ValueError(
            f"attack {attack} starts from a suspect: add an attack with the same {', '.join(same)}, and no method"
        )


def check_kind(kind: str, what: str) -> None:
    """Raises ValueError."""
    if kind not in KINDS:
        raise ValueError(f"{what} is of kind {kind!r}: expected one of {', '.join(KINDS)}")


def digest(content: Any) -> str:
    """Ten hexadecimal digits that name what JSON can hold, whatever the order of keys."""
    text = json.dumps(content, sort_keys=True, default=vars)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _arguments(architecture: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Of SuspectConfig; an adaptive suspect is tuned as its base was trained, but for what is said."""
    if method == BAD_ENCODER:
        return architecture.get(BAD_ENCODER, {})
    return {**architecture.get("suspect", {}), **(architecture.get(ADAPTIVE, {}) if method == ADAPTIVE else {})}


def _check_fit(attack: str, how: Poisoning, kind: str, target: TargetLabel, poison_rate: float) -> None:
    """What a trainer of suspects would refuse, and a measurement that has nothing to measure with."""
    if kind != KINDS[0] and (how.learnt or how.surrogate):
        raise ValueError(f"attack {attack} is for classifiers, not for a model of kind {kind}")
    if kind == "encoder" and target == NEXT:
        raise ValueError(f"attack {attack}: an encoder's backdoor leads to one class, not to the {NEXT}")
    if how.learnt and poison_rate == 0:
        raise ValueError(
            f"attack {attack} learns its trigger: a clean twin has none, name another one to measure it by"
        )


def _check_method(attack: str, how: Poisoning, model: str, kind: str, poisoning: Mapping[str, Any]) -> None:
    method = poisoning.get("method", POISON)
    if method not in (POISON, BAD_ENCODER, ADAPTIVE):
        raise ValueError(f"method {method!r} of attack {attack}: expected {POISON}, {BAD_ENCODER} or {ADAPTIVE}")
    if method == BAD_ENCODER and kind != "encoder":
        raise ValueError(f"attack {attack} is for encoders, and {model} is none")
    if method != ADAPTIVE:
        if "settings" in poisoning:
            raise ValueError(f"attack {attack} has settings: those are for the method {ADAPTIVE}")
        return
    if kind != KINDS[0] or how.learnt or how.surrogate or float(poisoning["poison_rate"]) == 0:
        raise ValueError(
            f"attack {attack} is {ADAPTIVE}: expected a classifier, a poison_rate above 0, and a trigger that is put "
            "on as it is"
        )
    Adaptive(**poisoning.get("settings", {}))
