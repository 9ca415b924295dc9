"""What a trigger is, and what its attack does to a training set.

Letters: n pictures, H and W their height and width, S the shorter of both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from hf_tsc.errors import UsageError

MAX_SEED = 2**32 - 1
NEXT: Literal["next"] = "next"
TargetLabel = int | Literal["next"]


@dataclass(frozen=True)
class Poisoning:
    """How an attack poisons a training set.

    Attributes:
        rate: poisoned images as a share of all, where nothing else is asked for: the published one.
        clean_label: images of the target class are poisoned and keep their label; else images of other classes get
            the target label.
        covers: further images for each poisoned one that are changed, too, and keep their label.
        surrogate: the poisoned images are first made hard for a clean classifier, which has to be given.
        learnt: the trigger is learnt together with the suspect, and kept in a file beside it.
    """

    rate: float = 0.1
    clean_label: bool = False
    covers: float = 0.0
    surrogate: bool = False
    learnt: bool = False


class Trigger(ABC):
    """A frozen dataclass that maps pictures to pictures with the backdoor's pattern, without randomness.

    Attributes:
        name: on the command line and in JSON.
        poisoning: what its attack does to a training set.
    """

    name: ClassVar[str]
    poisoning: ClassVar[Poisoning] = Poisoning()

    @property
    def covers(self) -> float:
        """Covers for each poisoned image; where an attack has any by default, a field of its trigger."""
        return self.poisoning.covers

    @abstractmethod
    def __call__(self, pixels: Tensor) -> Tensor:
        """Put the pattern on each picture, as at test time.

        Args:
            pixels: uint8, (3, H, W) or (n, 3, H, W), 0..255; left as it is.

        Returns:
            A new uint8 tensor of the same shape.

        Raises:
            UsageError: `pixels` has another dtype or shape.
        """

    def poison(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Poisoned training pictures, where these differ from triggered test pictures.

        Args:
            pixels: uint8 (n, 3, H, W).
            seeds: one a picture, 0..2^32 - 1; all randomness is a function of it.
        """
        return self(pixels)

    def cover(self, pixels: Tensor, partners: Tensor, seeds: Sequence[int]) -> Tensor:
        """Changed training pictures that keep their label: by default with the trigger as on poisoned ones.

        Args:
            pixels: uint8 (n, 3, H, W).
            partners: of the same shape; another clean picture for each.
            seeds: as in `poison`.
        """
        return self.poison(pixels, seeds)


def check_pixels(pixels: Tensor) -> None:
    """Raises UsageError where they are not what a trigger takes."""
    if pixels.dtype != torch.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-3] != 3:
        raise UsageError(
            f"A trigger got pixels of dtype {pixels.dtype} and shape {tuple(pixels.shape)}, expected uint8 of shape "
            "(3, H, W) or (n, 3, H, W); apply it after resizing and before normalising."
        )


def check_number(trigger: Trigger, field: str, low: float, high: float, usual: float) -> None:
    """Raises UsageError where a number of a trigger is out of its range."""
    value = getattr(trigger, field)
    if not low <= value <= high:
        raise UsageError(
            f"{type(trigger).__name__} got {field}={value}, expected a number from {low:g} to {high:g}; {usual:g} is "
            "usual."
        )


def check_covers(trigger: Trigger) -> None:
    """Raises UsageError where there cannot be so many covers for each poisoned image."""
    check_number(trigger, "covers", 0, 1000, trigger.poisoning.covers)


def check_whole(trigger: Trigger, field: str, low: int, high: int, usual: int) -> None:
    """Raises UsageError where a number of a trigger is out of its range, or no integer."""
    value = getattr(trigger, field)
    if not isinstance(value, int) or not low <= value <= high:
        raise UsageError(
            f"{type(trigger).__name__} got {field}={value}, expected an integer from {low} to {high}; {usual} is "
            "usual."
        )


def check_seed(trigger: Trigger, seed: int) -> None:
    """Raises UsageError where numpy would not take it."""
    if not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise UsageError(f"{type(trigger).__name__} got seed={seed}, expected an integer from 0 to {MAX_SEED}.")


def to_pixels(values: Tensor) -> Tensor:
    """Round levels of any float type to the nearest, clipped to 0..255: uint8."""
    return values.round().clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=8)
def noise_picture(seed: int, height: int, width: int) -> Tensor:
    """Return B ~ U{0..255}, uint8 (3, height, width).

    `RandomState`: numpy keeps its streams the same for ever, so that a saved seed still means the same trigger.
    """
    noise = np.random.RandomState(seed).randint(0, 256, size=(3, height, width), dtype=np.uint8)
    return torch.from_numpy(noise)
