"""The settings of a baseline: fields that carry their own limits, and the training that most of them share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from hf_tsc.batch_norm import IMAGES as BATCH_NORM_IMAGES
from hf_tsc.errors import UsageError
from hf_tsc.images import AUGMENTATIONS
from hf_tsc.tsc_config import FEATURE_STATES, OBJECTIVES, TEACHER_ERRORS, TEACHER_VIEWS

LIMITS = ("low", "high", "whole")  # of a field of numbers, in its metadata


def number(default: Any, help: str, *, low: float = 0, high: float | None = None, whole: bool = False) -> Any:
    """A field that holds a number from `low` to `high`, or None where that is its default."""
    return field(default=default, metadata=limits(help, low=low, high=high, whole=whole))


def limits(help: str, *, low: float = 0, high: float | None = None, whole: bool = False) -> dict[str, Any]:
    """The metadata of a field of numbers."""
    return {"help": help, "low": low, "high": high, "whole": whole}


def choice(default: str, choices: Sequence[str], help: str) -> Any:
    """A field that holds one of some names."""
    return field(default=default, metadata={"help": help, "choices": tuple(choices)})


def check(settings: Any) -> None:
    """Raises UsageError where a field of a dataclass is outside of the limits that it declares."""
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if "choices" in entry.metadata and value not in entry.metadata["choices"]:
            raise UsageError(f"{entry.name}={value!r}: expected one of {', '.join(entry.metadata['choices'])}")
        if "low" in entry.metadata and not (value is None and entry.default is None):
            several = isinstance(value, list | tuple)
            if (several and not value) or not all(
                _fits(one, entry.metadata) for one in (value if several else [value])
            ):
                raise UsageError(f"{entry.name}={value!r}: expected {_expected(entry.metadata)}")


def _fits(value: Any, limits: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if limits["whole"] else (int, float)):
        return False
    return math.isfinite(value) and limits["low"] <= value <= (math.inf if limits["high"] is None else limits["high"])


def _expected(limits: Any) -> str:
    what = "a whole number" if limits["whole"] else "a number"
    if limits["high"] is None:
        return f"{what} of {limits['low']:g} or more"
    return f"{what} from {limits['low']:g} to {limits['high']:g}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all baselines can be told, named as in `TSCConfig`.

    `objective` is what is trained for: of classifiers `cross_entropy` (the labels) or `distillation` (the suspect's
    own answers on clean images, for which no labels are needed).
    """

    batch_size: int = number(64, "Images a gradient evaluation.", low=1, whole=True)
    objective: str = choice("cross_entropy", OBJECTIVES, "Training loss.")
    temperature: float = number(2.0, "Temperature of the distillation.")
    teacher_view: str = choice("same", TEACHER_VIEWS, "Pictures that a distilled suspect answers to.")
    teacher_errors: str = choice(
        "keep", TEACHER_ERRORS, "What to do with a distilled suspect's answers that are not the label."
    )
    feature_weight: float = number(0.0, "Of a distilled suspect's hidden states in the loss; 0 for none.")
    feature_states: str = choice("all", FEATURE_STATES, "Which hidden states.")
    mixup_alpha: float = number(0.0, "Mixup with Beta(alpha, alpha); 0 for none.")
    batch_norm_images: str = choice(
        "training", BATCH_NORM_IMAGES, "Images that BatchNorm statistics between two models are computed of."
    )
    augmentation: str = choice("none", AUGMENTATIONS, "Random changes of the training images.")

    def __post_init__(self) -> None:
        check(self)
        for entry in fields(self):
            if entry.name in self.without_effect() and (value := getattr(self, entry.name)) != entry.default:
                raise UsageError(f"{entry.name}={value!r} would have no effect: this method has no use for it")

    def without_effect(self) -> Sequence[str]:
        """Names of those settings that a method has no use for."""
        return ()

    def gradient_evaluations(self, images: int) -> int:
        """Backward passes of one batch that the method takes on so many training images."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Training(Settings):
    """How a network is trained on; `steps` counts where it is given, and `epochs` passes otherwise."""

    steps: int | None = number(None, "Optimisation steps; overrides epochs.", low=1, whole=True)
    epochs: float = number(100.0, "Passes over the training images.")
    learning_rate: float = number(0.01, "Peak learning rate.")
    optim: str = field(default="sgd", metadata={"help": "The optimizer."})
    optim_args: str | None = field(default="momentum=0.9", metadata={"help": "Options of the optimizer."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    weight_decay: float = number(0.0, "Weight decay.")

    def number_of_steps(self, images: int) -> int:
        """Optimisation steps on so many images; 1 at least."""
        if self.steps is not None:
            return self.steps
        return max(1, round(self.epochs * math.ceil(images / self.batch_size)))

    def gradient_evaluations(self, images: int) -> int:
        return self.number_of_steps(images)
