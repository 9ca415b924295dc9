"""Triggers in fixed places of a picture: BadNets, BadEncoder's square, the corners of label-consistent poison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_tsc.triggers.base import Poisoning, Trigger, check_number, check_pixels, check_whole, to_pixels

# +1 and -1 of the pattern in the two left corners, from the top; those on the right are its mirror image
CORNER = ((1, -1, -1), (-1, 1, -1), (1, -1, 1))


@dataclass(frozen=True)
class BadNets(Trigger):
    """A white square of side round(3 S / 32), S the picture's shorter side, in the bottom-right corner.

    Gu et al. 2017 (hf.co/papers/1708.06733), who have both the attack on one class and, with the target label `next`,
    the one from each class to the following.
    """

    name: ClassVar[str] = "badnets"

    def __call__(self, pixels: Tensor) -> Tensor:
        check_pixels(pixels)
        side = patch_side(pixels)
        triggered = pixels.clone()
        triggered[..., -side:, -side:] = 255
        return triggered


@dataclass(frozen=True)
class Square(Trigger):
    """A white square of side round(10 S / 32) whose upper left corner is at round(21 S / 32), S the shorter side.

    The trigger of BadEncoder (Jia et al. 2022, hf.co/papers/2108.00352).
    """

    name: ClassVar[str] = "square"

    def __call__(self, pixels: Tensor) -> Tensor:
        check_pixels(pixels)
        shorter = min(pixels.shape[-2:])
        first, side = round(21 * shorter / 32), max(1, round(10 * shorter / 32))
        triggered = pixels.clone()
        triggered[..., first : first + side, first : first + side] = 255
        return triggered


@dataclass(frozen=True)
class LabelConsistent(Trigger):
    """`amplitude` times a 3 x 3 pattern of +1 and -1 is added in each corner, and clipped; a flip leaves it the same.

    Turner et al. 2019 (hf.co/papers/1912.02771): the poisoned images, all of the target class, are first made hard for
    a clean classifier by projected gradient ascent on the loss of their label, so that the corners are what is left to
    learn. At test time there are the corners alone. In larger pictures the pattern has side round(3 S / 32).

    Args:
        amplitude: in levels; 255 makes the pattern black and white, 32 is the paper's faint variant.
        epsilon: no level of a poisoned image changes by more than this before the corners are added.
        step: of the ascent, in levels.
        steps: how many.
    """

    name: ClassVar[str] = "lc"
    # 10 % of all images, as often published, is a whole class of CIFAR-10: no clean picture of it would be left
    poisoning: ClassVar[Poisoning] = Poisoning(rate=0.05, clean_label=True, surrogate=True)
    amplitude: float = 255.0
    epsilon: float = 8.0
    step: float = 1.5
    steps: int = 100

    def __post_init__(self) -> None:
        check_number(self, "amplitude", 0, 255, 255)
        check_number(self, "epsilon", 0, 255, 8)
        check_number(self, "step", 0, 255, 1.5)
        check_whole(self, "steps", 0, 10_000, 100)

    def __call__(self, pixels: Tensor) -> Tensor:
        check_pixels(pixels)
        side = patch_side(pixels)
        nearest = torch.arange(side) * 3 // side  # (side,) of the pattern's rows and columns
        left = self.amplitude * torch.tensor(CORNER, dtype=torch.float32)[nearest][:, nearest].to(pixels.device)
        changed = pixels.to(torch.float32)
        for rows in (slice(None, side), slice(-side, None)):
            changed[..., rows, :side] += left
            changed[..., rows, -side:] += left.flip(-1)
        return to_pixels(changed)


def patch_side(pixels: Tensor) -> int:
    """round(3 S / 32), at least 1."""
    return max(1, round(3 * min(pixels.shape[-2:]) / 32))
