"""Attacks, a trigger and what it shall lead to; and which images of a training set they poison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_tsc.errors import UsageError
from hf_tsc.triggers.base import NEXT, TargetLabel, Trigger
from hf_tsc.triggers.registry import trigger_to_dict


@dataclass(frozen=True)
class Attack:
    """A known trigger and the label it is meant to give: to measure with, never to purify with.

    Attributes:
        trigger: what is put on images.
        target_label: the class that it leads to; `"next"` leads each class y to (y + 1) mod classes (all-to-all).

    Raises:
        UsageError: another word than `"next"`, or that with a trigger on images that keep their label.
    """

    trigger: Trigger
    target_label: TargetLabel

    def __post_init__(self) -> None:
        if isinstance(self.target_label, str) and self.target_label != NEXT:
            raise UsageError(f"Got target_label={self.target_label!r}, expected a class number or {NEXT!r}.")
        if self.target_label == NEXT and self.trigger.poisoning.clean_label:
            raise UsageError(
                f"Got target_label={NEXT!r} for {self.trigger.name}, whose poisoned images keep their label: expected "
                "one class."
            )

    def wanted(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """The labels that triggered images of these classes are meant to get, int64 (n,)."""
        if self.target_label == NEXT:
            return (np.asarray(labels, dtype=np.int64) + 1) % num_classes
        return np.full(len(labels), self.target_label, dtype=np.int64)

    def to_dict(self) -> dict[str, Any]:
        """As a report and a suspect's record keep it."""
        return {"trigger": trigger_to_dict(self.trigger), "target_label": self.target_label}


@dataclass(frozen=True)
class Poison:
    """What becomes of the n images of a training set.

    Attributes:
        poisoned: positions that get the trigger, sorted.
        covers: other positions that are changed and keep their label, sorted.
        labels: int64 (n,), what is learnt.
    """

    poisoned: np.ndarray
    covers: np.ndarray
    labels: np.ndarray


def draw_poison(
    attack: Attack,
    labels: np.ndarray,
    *,
    rate: float,
    seed: int,
    num_classes: int,
    clean_label: bool | None = None,
) -> Poison:
    """Draw the images of a training set that an attack changes, as its trigger's `poisoning` says.

    Args:
        attack: trigger and target label.
        labels: (n,) class of each training image.
        rate: poisoned images as a share of all n; covers come on top.
        seed: of the draw.
        num_classes: of the labels.
        clean_label: poison the target class and keep its label; None as the trigger's attack does.

    Raises:
        UsageError: as in `poison_indices`; or more covers than images.
    """
    how = attack.trigger.poisoning
    clean_label = how.clean_label if clean_label is None else clean_label
    target = attack.target_label
    poisoned = poison_indices(
        labels,
        target_label=None if isinstance(target, str) else target,
        poison_rate=rate,
        seed=seed,
        clean_label=clean_label,
    )
    others = np.setdiff1d(np.arange(len(labels)), poisoned)
    count = round(attack.trigger.covers * len(poisoned))
    if count > len(others):
        raise UsageError(
            f"poison_rate={rate} of {len(labels)} images asks for {len(poisoned)} poisoned ones and, for "
            f"{attack.trigger.name}, {count} that are changed and keep their label; lower the rate to at most "
            f"{1 / (1 + attack.trigger.covers):.4g}."
        )
    covers = np.sort(np.random.default_rng([seed, 1]).choice(others, size=count, replace=False))
    learnt = np.array(labels, dtype=np.int64)
    learnt[poisoned] = attack.wanted(learnt[poisoned], num_classes)
    return Poison(poisoned, covers, learnt)


def poison_indices(
    labels: np.ndarray, *, target_label: int | None, poison_rate: float, seed: int, clean_label: bool = False
) -> np.ndarray:
    """Draw the training images that get the trigger and the target label, none of the target class itself.

    Args:
        labels: (n,) class of each training image.
        target_label: the class that the trigger shall lead to; None where each class has its own, and images are drawn
            from all.
        poison_rate: poisoned images as a share of **all** n images, in [0, 1]; 0 makes the clean twin.
        seed: of the draw.
        clean_label: draw images of the target class instead, which keep their label.

    Returns:
        (round(poison_rate * n),) sorted indices, int64.

    Raises:
        UsageError: the rate is out of range or poisons no image, the target is no label of the set, or the other
            classes have too few images.
    """
    if not 0 <= poison_rate <= 1:
        raise UsageError(f"Got poison_rate={poison_rate}, expected a share of all images in [0, 1].")
    if target_label is not None and target_label not in labels:
        raise UsageError(f"Got target_label={target_label}, expected one of the labels {np.unique(labels).tolist()}.")
    count = round(poison_rate * len(labels))
    if poison_rate > 0 and count == 0:
        raise UsageError(f"poison_rate={poison_rate} of {len(labels)} images poisons none; raise the rate.")
    allowed = np.full(len(labels), True) if target_label is None else (labels == target_label) == clean_label
    candidates = np.flatnonzero(allowed)
    if count > len(candidates):
        which = "are" if clean_label else "are not"
        raise UsageError(
            f"poison_rate={poison_rate} asks for {count} of {len(labels)} images, but only {len(candidates)} {which} "
            f"of the target class {target_label}; lower the rate to at most {len(candidates) / len(labels):.4g}."
        )
    return np.sort(np.random.default_rng(seed).choice(candidates, size=count, replace=False))
