"""WaNet: the picture itself, bent a little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_tsc.triggers.base import (
    Poisoning,
    Trigger,
    check_covers,
    check_number,
    check_pixels,
    check_seed,
    check_whole,
    to_pixels,
)

SIDE = 32  # the published strength is for pictures of this side


@dataclass(frozen=True)
class WaNet(Trigger):
    """Resamples x at clip(I + s U / 32, -1, 1): I is the identity grid in [-1, 1], U a smooth random field.

    Nguyen and Tran 2021 (hf.co/papers/2102.10369). U is the bicubic enlargement of `cells` x `cells` vectors drawn
    from [-1, 1] and divided by their mean size. It moves the same part of a picture at every resolution: s / 2 times
    |U| pixels at a side of 32, the published setting, and 7 times as many at 224.

    Noise mode: twice as many images as are poisoned (`covers`) are bent by U and a field of noise R / 32 of their own,
    R ~ U(-1, 1), and keep their label, so that not any bending is the trigger.

    Args:
        strength: s.
        cells: side of the grid that U is made of.
        seed: of the field.
        covers: images bent with noise, for each poisoned one.
    """

    name: ClassVar[str] = "wanet"
    poisoning: ClassVar[Poisoning] = Poisoning(covers=2.0)
    strength: float = 0.5
    cells: int = 4
    seed: int = 0
    covers: float = poisoning.covers

    def __post_init__(self) -> None:
        check_number(self, "strength", 0, SIDE, 0.5)
        check_whole(self, "cells", 2, 1024, 4)
        check_seed(self, self.seed)
        check_covers(self)

    def __call__(self, pixels: Tensor) -> Tensor:
        check_pixels(pixels)
        batch = pixels if pixels.ndim == 4 else pixels[None]
        grid = self._grid(pixels).expand(len(batch), -1, -1, -1)
        return _resampled(batch, grid).view_as(pixels)

    def cover(self, pixels: Tensor, partners: Tensor, seeds: Sequence[int]) -> Tensor:
        height, width = pixels.shape[-2:]
        noise = np.stack([np.random.RandomState(seed).uniform(-1, 1, size=(height, width, 2)) for seed in seeds])
        noise_field = torch.from_numpy(noise / SIDE).to(pixels.device, torch.float32)  # (n, H, W, 2)
        return _resampled(pixels, self._grid(pixels) + noise_field)

    def _grid(self, pixels: Tensor) -> Tensor:
        """I + s U / 32, float32 (1, H, W, 2), the last axis (x, y), clipped to the picture."""
        height, width = pixels.shape[-2:]
        moved = identity_grid(height, width) + self.strength / SIDE * smooth_field(
            self.cells, self.seed, height, width
        )
        return moved.clamp(-1, 1).to(pixels.device, torch.float32)


def identity_grid(height: int, width: int) -> Tensor:
    """Where each pixel is, float64 (1, H, W, 2), the last axis (x, y), from -1 to 1."""
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height, dtype=torch.float64),
        torch.linspace(-1, 1, width, dtype=torch.float64),
        indexing="ij",
    )
    return torch.stack([x, y], dim=-1)[None]


@lru_cache(maxsize=8)
def smooth_field(cells: int, seed: int, height: int, width: int) -> Tensor:
    """U, float64 (1, H, W, 2): through `cells` x `cells` random vectors whose mean |component| is 1."""
    drawn = torch.from_numpy(np.random.RandomState(seed).uniform(-1, 1, size=(1, 2, cells, cells)))
    field = F.interpolate(drawn / drawn.abs().mean(), size=(height, width), mode="bicubic", align_corners=True)
    return field.permute(0, 2, 3, 1)


def _resampled(pixels: Tensor, grid: Tensor) -> Tensor:
    """Bilinear values at the places of a grid (n, H, W, 2), those outside moved to the border."""
    values = F.grid_sample(pixels.to(torch.float32), grid.clamp(-1, 1), mode="bilinear", align_corners=True)
    return to_pixels(values)
