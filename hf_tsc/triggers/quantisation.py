"""BPP: the picture itself, in fewer colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_tsc.triggers.base import Poisoning, Trigger, check_covers, check_pixels, check_whole, to_pixels


@dataclass(frozen=True)
class BPP(Trigger):
    """q(x) = 255 / (levels - 1) round((levels - 1) x / 255), rounded: `levels` values a channel are left.

    BppAttack, Wang et al. 2022 (hf.co/papers/2205.13383), without dithering. As many images as are poisoned get what
    the trigger has done to another image, x + q(z) - z clipped, and keep their label: that alone is not the trigger.

    Args:
        levels: of each channel; at 8 no value changes by more than 18.
        covers: images with the residual of another, for each poisoned one.
    """

    name: ClassVar[str] = "bpp"
    poisoning: ClassVar[Poisoning] = Poisoning(covers=1.0)
    levels: int = 8
    covers: float = poisoning.covers

    def __post_init__(self) -> None:
        check_whole(self, "levels", 2, 256, 8)
        check_covers(self)

    def __call__(self, pixels: Tensor) -> Tensor:
        check_pixels(pixels)
        steps = self.levels - 1
        return to_pixels((pixels.to(torch.float64) / 255 * steps).round() / steps * 255)

    def cover(self, pixels: Tensor, partners: Tensor, seeds: Sequence[int]) -> Tensor:
        residual = self(partners).to(torch.float32) - partners.to(torch.float32)
        return to_pixels(pixels.to(torch.float32) + residual)
