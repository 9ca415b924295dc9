"""Triggers, picture in and picture out, and which training images to poison with them (BadNets, Blended).

A trigger acts on uint8 pixels at the model's input size, after resizing and before any normalisation, and is the same
in training and test. It is a frozen dataclass of a few numbers: written as JSON beside a suspect, it is enough to
measure the suspect's attack success rate again.
"""

from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from hf_tsc.errors import UsageError

MAX_SEED = 2**32 - 1


class Trigger(Protocol):
    """A frozen dataclass that maps pictures to pictures with the backdoor's pattern, without randomness."""

    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Put the pattern on each picture.

        Args:
            pixels: uint8, (3, H, W) or (n, 3, H, W), 0..255; left as it is.

        Returns:
            A new uint8 tensor of the same shape.

        Raises:
            UsageError: `pixels` has another dtype or shape.
        """


@dataclass(frozen=True)
class BadNets:
    """A white square of side round(3 S / 32), S the picture's shorter side, in the bottom-right corner.

    Gu et al. 2017 (hf.co/papers/1708.06733), all-to-one.
    """

    name: ClassVar[str] = "badnets"

    def __call__(self, pixels: Tensor) -> Tensor:
        _check_pixels(pixels)
        side = max(1, round(3 * min(pixels.shape[-2:]) / 32))
        triggered = pixels.clone()
        triggered[..., -side:, -side:] = 255
        return triggered


@dataclass(frozen=True)
class Blended:
    """(1 - alpha) x + alpha B, rounded; B is one picture of uniform noise 0..255, made anew for each resolution.

    Chen et al. 2017 (hf.co/papers/1712.05526). No pixel changes by more than round(255 alpha).

    Args:
        alpha: the noise picture's share, in [0, 1].
        seed: makes B, 0..2^32 - 1. Another seed is another trigger.
    """

    name: ClassVar[str] = "blended"
    alpha: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"Blended got alpha={self.alpha}, expected a share in [0, 1]; 0.2 is usual.")
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"Blended got seed={self.seed}, expected an integer from 0 to {MAX_SEED}.")

    def __call__(self, pixels: Tensor) -> Tensor:
        _check_pixels(pixels)
        height, width = pixels.shape[-2:]
        noise = _noise_picture(self.seed, height, width).to(pixels.device)  # (3, H, W)
        mixed = (1 - self.alpha) * pixels.to(torch.float32) + self.alpha * noise
        return mixed.round().to(torch.uint8)


TRIGGERS: dict[str, Any] = {BadNets.name: BadNets, Blended.name: Blended}


def trigger_to_dict(trigger: Trigger) -> dict[str, Any]:
    """Return `{"name": ..., **numbers}`, ready for JSON."""
    return {"name": trigger.name, **asdict(trigger)}


def trigger_from_dict(record: dict[str, Any]) -> Trigger:
    """Make the trigger that `trigger_to_dict` wrote.

    Raises:
        UsageError: the name is not in `TRIGGERS`, or a key is not one of that trigger's numbers.
    """
    numbers = dict(record)
    name = numbers.pop("name", None)
    if name not in TRIGGERS:
        raise UsageError(f"Got the trigger name {name!r}, expected one of {', '.join(sorted(TRIGGERS))}.")
    known = {field.name for field in fields(TRIGGERS[name])}
    if unknown := sorted(set(numbers) - known):
        raise UsageError(f"The trigger {name!r} got the unknown key(s) {unknown}, expected some of {sorted(known)}.")
    return TRIGGERS[name](**numbers)


def poison_indices(labels: np.ndarray, *, target_label: int, poison_rate: float, seed: int) -> np.ndarray:
    """Draw the training images that get the trigger and the target label, none of the target class itself.

    Args:
        labels: (n,) class of each training image.
        target_label: the class that the trigger shall lead to.
        poison_rate: poisoned images as a share of **all** n images, in [0, 1]; 0 makes the clean twin.
        seed: of the draw.

    Returns:
        (round(poison_rate * n),) sorted indices, int64.

    Raises:
        UsageError: the rate is out of range or poisons no image, the target is no label of the set, or the other
            classes have too few images.
    """
    if not 0 <= poison_rate <= 1:
        raise UsageError(f"Got poison_rate={poison_rate}, expected a share of all images in [0, 1].")
    if target_label not in labels:
        raise UsageError(f"Got target_label={target_label}, expected one of the labels {np.unique(labels).tolist()}.")
    count = round(poison_rate * len(labels))
    if poison_rate > 0 and count == 0:
        raise UsageError(f"poison_rate={poison_rate} of {len(labels)} images poisons none; raise the rate.")
    candidates = np.flatnonzero(labels != target_label)
    if count > len(candidates):
        raise UsageError(
            f"poison_rate={poison_rate} asks for {count} of {len(labels)} images, but only {len(candidates)} are not "
            f"of the target class {target_label}; lower the rate to at most {len(candidates) / len(labels):.4g}."
        )
    return np.sort(np.random.default_rng(seed).choice(candidates, size=count, replace=False))


@lru_cache(maxsize=8)
def _noise_picture(seed: int, height: int, width: int) -> Tensor:
    """Return B ~ U{0..255}, uint8 (3, height, width).

    `RandomState`: numpy keeps its streams the same for ever, so that a saved seed still means the same trigger.
    """
    noise = np.random.RandomState(seed).randint(0, 256, size=(3, height, width), dtype=np.uint8)
    return torch.from_numpy(noise)


def _check_pixels(pixels: Tensor) -> None:
    if pixels.dtype != torch.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-3] != 3:
        raise UsageError(
            f"A trigger got pixels of dtype {pixels.dtype} and shape {tuple(pixels.shape)}, expected uint8 of shape "
            "(3, H, W) or (n, 3, H, W); apply it after resizing and before normalising."
        )
