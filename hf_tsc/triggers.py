"""Triggers, picture in and picture out, and which training images to poison with them.

A trigger acts on uint8 pixels at the model's input size, after resizing and before any normalisation, and is the same
in training and test. It is a frozen dataclass of a few numbers: written as JSON beside a suspect, it is enough to
measure the suspect's attack success rate again.
"""

from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from scipy.fft import idctn
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


@dataclass(frozen=True)
class Square:
    """A white square of side round(10 S / 32) whose upper left corner is at round(21 S / 32), S the shorter side.

    The trigger of BadEncoder (Jia et al. 2022, hf.co/papers/2108.00352).
    """

    name: ClassVar[str] = "square"

    def __call__(self, pixels: Tensor) -> Tensor:
        _check_pixels(pixels)
        shorter = min(pixels.shape[-2:])
        first, side = round(21 * shorter / 32), max(1, round(10 * shorter / 32))
        triggered = pixels.clone()
        triggered[..., first : first + side, first : first + side] = 255
        return triggered


@dataclass(frozen=True)
class CTRL:
    """A pattern in the spectrum of both colour differences, the same in every block of 32 x 32 pixels.

    Li et al. 2023 (hf.co/papers/2210.07346): `magnitude` is added to the coefficients (15, 15) and (31, 31) of the
    orthonormal cosine transform of U and V. That is linear, and so a fixed picture is added, clipped and rounded.

    Args:
        magnitude: of the coefficients; at 100 no pixel changes by more than 22.
    """

    name: ClassVar[str] = "ctrl"
    magnitude: float = 100.0

    def __post_init__(self) -> None:
        if not 0 <= self.magnitude <= 10_000:
            raise UsageError(f"CTRL got magnitude={self.magnitude}, expected a number from 0 to 10000; 100 is usual.")

    def __call__(self, pixels: Tensor) -> Tensor:
        _check_pixels(pixels)
        height, width = pixels.shape[-2:]
        block = torch.from_numpy(_ctrl_block(self.magnitude)).to(pixels.device)  # (3, 32, 32)
        tiles = block.repeat(1, -(-height // 32), -(-width // 32))[:, :height, :width]
        return (pixels.to(torch.float32) + tiles).round().clamp(0, 255).to(torch.uint8)


TRIGGERS: dict[str, Any] = {trigger.name: trigger for trigger in (BadNets, Blended, Square, CTRL)}


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


def poison_indices(
    labels: np.ndarray, *, target_label: int, poison_rate: float, seed: int, clean_label: bool = False
) -> np.ndarray:
    """Draw the training images that get the trigger and the target label, none of the target class itself.

    Args:
        labels: (n,) class of each training image.
        target_label: the class that the trigger shall lead to.
        poison_rate: poisoned images as a share of **all** n images, in [0, 1]; 0 makes the clean twin.
        seed: of the draw.
        clean_label: draw images of the target class instead, which keep their label (CTRL).

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
    candidates = np.flatnonzero((labels == target_label) == clean_label)
    if count > len(candidates):
        which = "are" if clean_label else "are not"
        raise UsageError(
            f"poison_rate={poison_rate} asks for {count} of {len(labels)} images, but only {len(candidates)} {which} "
            f"of the target class {target_label}; lower the rate to at most {len(candidates) / len(labels):.4g}."
        )
    return np.sort(np.random.default_rng(seed).choice(candidates, size=count, replace=False))


@lru_cache(maxsize=8)
def _ctrl_block(magnitude: float) -> np.ndarray:
    """What CTRL adds to R, G and B of a block, float32 (3, 32, 32), through kornia's YUV."""
    spectrum = np.zeros((32, 32))
    spectrum[15, 15] = spectrum[31, 31] = magnitude
    chroma = idctn(spectrum, norm="ortho")  # of U and of V
    return np.stack([1.14 * chroma, -(0.396 + 0.581) * chroma, 2.029 * chroma]).astype(np.float32)


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
