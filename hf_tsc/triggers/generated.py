"""Input-aware triggers: two small networks make each picture a pattern of its own, and say where it goes.

Letters: n pictures, H and W their height and width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_tsc.errors import UsageError
from hf_tsc.triggers.base import Poisoning, Trigger, check_number, check_pixels, check_whole, to_pixels

TRIGGER_FILE = "trigger.safetensors"  # beside the suspect's record
WIDTHS = (32, 64, 128)
BN_MOMENTUM = 0.05
SHARPNESS = 10.0
CHUNK = 256  # pictures at once


class PictureNet(nn.Module):
    """A picture of other channels for each picture, with values in [0, 1]: three times down, three times up.

    Args:
        channels: of the pictures that are made.
    """

    def __init__(self, channels: int):
        super().__init__()
        ins = (3, *WIDTHS[:-1])
        self.down = nn.ModuleList(_block(i, out, out) for i, out in zip(ins, WIDTHS, strict=True))
        self.middle = _block(WIDTHS[-1], WIDTHS[-1], WIDTHS[-1])
        outs = (*WIDTHS[-2::-1], channels)
        self.up = nn.ModuleList(_block(i, i, out) for i, out in zip(WIDTHS[::-1], outs, strict=True))
        self.up[-1] = self.up[-1][:-1]  # type: ignore[index]  # without the last ReLU

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> (n, channels, H, W) in [0, 1]."""
        x, sizes = (pixels - 0.5) / 0.25, []
        for block in self.down:
            x = block(x)
            sizes.append(x.shape[-2:])
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for block, size in zip(self.up, sizes[::-1], strict=True):
            x = block(F.interpolate(x, size=size, mode="bilinear", align_corners=False))
        return torch.tanh(x) / 2 + 0.5


class PatternNets(nn.Module):
    """What an input-aware trigger learns: `pattern` makes G(x), (n, 3, H, W), and `mask` M(x), (n, 1, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.pattern, self.mask = PictureNet(3), PictureNet(1)

    def where(self, pixels: Tensor) -> Tensor:
        """m(x) = tanh(20 M(x) - 10) / 2 + 1/2, nearly 0 or 1: (n, 1, H, W)."""
        return torch.tanh(SHARPNESS * (2 * self.mask(pixels) - 1)) / 2 + 0.5


@dataclass(frozen=True)
class InputAware(Trigger):
    """T(x) = x + m(x) (G(x) - x): pattern G and mask m are made by networks that are trained with the suspect.

    Nguyen and Tran 2020 (hf.co/papers/2010.08138). One tenth of the images gets T(x) and the target label, another
    tenth T with G and m of another image, and keeps its label. The mask's network is trained before, and then frozen.

    Args:
        mask_epochs: passes over the images to train the mask's network.
        density: share of a picture that the mask may cover without a penalty.
        learning_rate: of both networks, by Adam.
        nets: as learnt; None for an attack that is still to be trained.
    """

    name: ClassVar[str] = "input_aware"
    poisoning: ClassVar[Poisoning] = Poisoning(covers=1.0, learnt=True)
    mask_epochs: int = 25
    density: float = 0.032
    learning_rate: float = 0.01
    nets: PatternNets | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_whole(self, "mask_epochs", 0, 10_000, 25)
        check_number(self, "density", 0, 1, 0.032)
        check_number(self, "learning_rate", 0, 1, 0.01)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        check_pixels(pixels)
        nets = self.nets
        if nets is None:
            raise UsageError(
                "the trigger input_aware is made by networks that are trained with its suspect: expected the "
                f"suspect's suspect.json, with {TRIGGER_FILE} beside it (--trigger SUSPECT/suspect.json)"
            )
        check_size(pixels)
        batch = (pixels if pixels.ndim == 4 else pixels[None]).to(torch.float32) / 255
        nets = nets.to(pixels.device).eval()
        made = [part + nets.where(part) * (nets.pattern(part) - part) for part in batch.split(CHUNK)]
        return to_pixels(255 * torch.cat(made)).view_as(pixels)

    def save(self, folder: Path) -> None:
        """Write the networks to a folder; `trigger_from_dict` reads them back."""
        assert self.nets is not None
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in self.nets.state_dict().items()}, folder / TRIGGER_FILE
        )

    def loaded(self, folder: Path) -> InputAware:
        """The trigger with the networks of a folder.

        Raises:
            UsageError: they are not there, or are others.
        """
        nets = PatternNets()
        try:
            nets.load_state_dict(load_file(folder / TRIGGER_FILE))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UsageError(
                f"the networks of the trigger input_aware cannot be read from {folder / TRIGGER_FILE}: expected what "
                f"train-suspect wrote there, beside the suspect's suspect.json ({' '.join(str(error).split())[:200]})"
            ) from error
        return replace(self, nets=nets.eval().requires_grad_(False))


def check_size(pixels: Tensor) -> None:
    """Raises UsageError where pictures are too small to be halved three times."""
    if min(pixels.shape[-2:]) < 8:
        raise UsageError(
            f"input_aware got pictures of {pixels.shape[-2]} x {pixels.shape[-1]} pixels, expected 8 x 8 or more"
        )


def _block(ins: int, inner: int, outs: int) -> nn.Sequential:
    """Two 3 x 3 convolutions, each with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(ins, inner, 3, padding=1),
        nn.BatchNorm2d(inner, momentum=BN_MOMENTUM),
        nn.ReLU(),
        nn.Conv2d(inner, outs, 3, padding=1),
        nn.BatchNorm2d(outs, momentum=BN_MOMENTUM),
        nn.ReLU(),
    )
