"""Triggers that mix a fixed picture into the whole image, or add one: noise, a wave, a smooth pattern."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_tsc.errors import UsageError
from hf_tsc.triggers.base import (
    Poisoning,
    Trigger,
    check_covers,
    check_number,
    check_pixels,
    check_seed,
    noise_picture,
    to_pixels,
)

BOARD = 4  # squares a side of Adap-Blend
CELLS = 4  # numbers a side of the low-frequency pattern


@dataclass(frozen=True)
class Blended(Trigger):
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
        check_seed(self, self.seed)

    def __call__(self, pixels: Tensor) -> Tensor:
        check_pixels(pixels)
        height, width = pixels.shape[-2:]
        noise = noise_picture(self.seed, height, width).to(pixels.device)  # (3, H, W)
        mixed = (1 - self.alpha) * pixels.to(torch.float32) + self.alpha * noise
        return mixed.round().to(torch.uint8)


@dataclass(frozen=True)
class AdaptiveBlend(Trigger):
    """Adap-Blend: B as in `Blended`, whole at test time; in training fainter and in half of the squares of a board.

    Qi et al. 2023 (openreview.net/forum?id=_wSHsgrVali): x + train_alpha M (B - x), where M keeps 8 of the 4 x 4
    squares, drawn for each image. As many images again are changed alike and keep their label, so that what was
    trained on does not separate in feature space.

    Args:
        alpha: share of B at test time.
        train_alpha: in training.
        seed: makes B.
        covers: images that are changed and keep their label, for each poisoned one.
    """

    name: ClassVar[str] = "adaptive_blend"
    poisoning: ClassVar[Poisoning] = Poisoning(rate=0.003, covers=1.0)
    alpha: float = 0.2
    train_alpha: float = 0.15
    seed: int = 0
    covers: float = poisoning.covers

    def __post_init__(self) -> None:
        check_number(self, "alpha", 0, 1, 0.2)
        check_number(self, "train_alpha", 0, 1, 0.15)
        check_seed(self, self.seed)
        check_covers(self)

    def __call__(self, pixels: Tensor) -> Tensor:
        return Blended(self.alpha, self.seed)(pixels)

    def poison(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        check_pixels(pixels)
        height, width = pixels.shape[-2:]
        boards = np.stack([np.random.RandomState(seed).permutation(BOARD**2) < BOARD**2 // 2 for seed in seeds])
        rows, columns = torch.arange(height) * BOARD // height, torch.arange(width) * BOARD // width
        chosen = torch.from_numpy(boards).view(-1, 1, BOARD, BOARD)[:, :, rows][..., columns]  # (n, 1, H, W)
        share = self.train_alpha * chosen.to(pixels.device)
        noise = noise_picture(self.seed, height, width).to(pixels.device)
        return to_pixels((1 - share) * pixels.to(torch.float32) + share * noise)


@dataclass(frozen=True)
class SIG(Trigger):
    """x + delta sin(2 pi frequency j / W) in column j of W, clipped.

    Barni et al. 2019 (hf.co/papers/1902.11237), on images of the target class, which keep their label.

    Args:
        delta: height of the wave, in levels.
        frequency: waves in the picture's width.
    """

    name: ClassVar[str] = "sig"
    # 10 % of all images, as often published, is a whole class of CIFAR-10: no clean picture of it would be left
    poisoning: ClassVar[Poisoning] = Poisoning(rate=0.05, clean_label=True)
    delta: float = 40.0
    frequency: float = 6.0

    def __post_init__(self) -> None:
        check_number(self, "delta", 0, 255, 40)
        check_number(self, "frequency", 0, 10_000, 6)

    def __call__(self, pixels: Tensor) -> Tensor:
        check_pixels(pixels)
        width = pixels.shape[-1]
        columns = torch.arange(width, dtype=torch.float64)
        wave = self.delta * torch.sin(2 * math.pi * self.frequency * columns / width)
        return to_pixels(pixels.to(torch.float32) + wave.to(pixels.device, torch.float32))


@dataclass(frozen=True)
class LowFrequency(Trigger):
    """x + V, clipped: V is smooth, from 0 to `amplitude`, the bicubic enlargement of a 4 x 4 grid of random colours.

    After Zeng et al. 2021 (hf.co/papers/2104.03413), who tune such a pattern against a clean model; this one is drawn,
    and is the same pattern at every resolution.

    Args:
        amplitude: the pattern's greatest value, in levels; 51 is a fifth of them.
        seed: makes the pattern.
    """

    name: ClassVar[str] = "lf"
    amplitude: float = 51.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self, "amplitude", 0, 255, 51)
        check_seed(self, self.seed)

    def __call__(self, pixels: Tensor) -> Tensor:
        check_pixels(pixels)
        pattern = self.amplitude * _smooth_pattern(self.seed, *pixels.shape[-2:]).to(pixels.device)
        return to_pixels(pixels.to(torch.float32) + pattern)


@lru_cache(maxsize=8)
def _smooth_pattern(seed: int, height: int, width: int) -> Tensor:
    """float32 (3, height, width), its smallest value 0 and its greatest 1."""
    grid = torch.from_numpy(np.random.RandomState(seed).uniform(size=(1, 3, CELLS, CELLS)))
    smooth = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=True)[0]
    return ((smooth - smooth.min()) / (smooth.max() - smooth.min())).float()
