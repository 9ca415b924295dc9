"""Triggers in the spectrum of the colour differences: CTRL and FTrojan.

Adding to coefficients of an orthonormal cosine transform is linear: it adds a fixed picture, which is rounded and
clipped with the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from scipy.fft import idctn
from torch import Tensor

from hf_tsc.errors import UsageError
from hf_tsc.triggers.base import Poisoning, Trigger, check_pixels, to_pixels

BLOCK = 32
PLACES = (15, 31)  # coefficients (15, 15) and (31, 31) of a block
# what R, G and B change by, if both colour differences change by 1
OF_YUV = (1.14, -(0.396 + 0.581), 2.029)  # through kornia's YUV
OF_YCRCB = (1.403, -(0.714 + 0.344), 1.773)  # through OpenCV's YCrCb


@dataclass(frozen=True)
class CTRL(Trigger):
    """A pattern in the spectrum of both colour differences, the same in every block of 32 x 32 pixels.

    Li et al. 2023 (hf.co/papers/2210.07346): `magnitude` is added to the coefficients (15, 15) and (31, 31) of the
    orthonormal cosine transform of U and V. It stands on images of the target class, which keep their label.

    Args:
        magnitude: of the coefficients; at 100 no pixel changes by more than 22.
    """

    name: ClassVar[str] = "ctrl"
    poisoning: ClassVar[Poisoning] = Poisoning(rate=0.05, clean_label=True)
    magnitude: float = 100.0

    def __post_init__(self) -> None:
        _check_magnitude(self, self.magnitude, usual=100)

    def __call__(self, pixels: Tensor) -> Tensor:
        return _add_to_blocks(pixels, _block(self.magnitude, OF_YUV))


@dataclass(frozen=True)
class FTrojan(Trigger):
    """As CTRL, in Cr and Cb, fainter, and with the target label on images of other classes.

    Wang et al. 2022 (hf.co/papers/2111.10991).

    Args:
        magnitude: of the coefficients; at 30 no pixel changes by more than 6.
    """

    name: ClassVar[str] = "ftrojan"
    magnitude: float = 30.0

    def __post_init__(self) -> None:
        _check_magnitude(self, self.magnitude, usual=30)

    def __call__(self, pixels: Tensor) -> Tensor:
        return _add_to_blocks(pixels, _block(self.magnitude, OF_YCRCB))


def _check_magnitude(trigger: Trigger, magnitude: float, *, usual: int) -> None:
    if not 0 <= magnitude <= 10_000:
        raise UsageError(
            f"{type(trigger).__name__} got magnitude={magnitude}, expected a number from 0 to 10000; {usual} is usual."
        )


def _add_to_blocks(pixels: Tensor, block: np.ndarray) -> Tensor:
    check_pixels(pixels)
    height, width = pixels.shape[-2:]
    tiles = torch.from_numpy(block).to(pixels.device).repeat(1, -(-height // BLOCK), -(-width // BLOCK))
    return to_pixels(pixels.to(torch.float32) + tiles[:, :height, :width])


@lru_cache(maxsize=8)
def _block(magnitude: float, channels: tuple[float, float, float]) -> np.ndarray:
    """What is added to R, G and B of a block, float32 (3, 32, 32)."""
    spectrum = np.zeros((BLOCK, BLOCK))
    for place in PLACES:
        spectrum[place, place] = magnitude
    chroma = idctn(spectrum, norm="ortho")  # of both colour differences
    return np.stack([channel * chroma for channel in channels]).astype(np.float32)
