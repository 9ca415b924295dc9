"""Search for a trigger without knowing one: the smallest mask and pattern that do something to all clean images.

    x' = (1 - m) x + m p,    minimise  loss(x') + λ |m|₁

m is one mask for all channels, p a pattern, both in [0, 1] as tanh / 2 + 1/2 of what Adam works on. λ follows the
success (Neural Cleanse, Wang et al., IEEE S&P 2019): it is raised while the trigger works, and lowered while not.

Letters: n images, b of them in a step, H and W the height and width at the model's input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_tsc.evidence.settings import Search
from hf_tsc.images import to_unit_interval

# model inputs (b, 3, H, W) -> the loss to minimise, and the success, a fraction
Aim = Callable[[Tensor], tuple[Tensor, Tensor]]
Normalize = Callable[[Tensor], Tensor]  # pixels in [0, 1] -> model inputs, both (b, 3, H, W)
INSIDE = 1 - 1e-4  # a mask or pattern begins strictly between 0 and 1


class MaskWeight:
    """λ: raised after so many units of success in a row, lowered after as many without."""

    def __init__(self, how: Search):
        self.how, self.value = how, how.weight
        self._with, self._without = 0, 0

    def update(self, success: float) -> None:
        """After one unit (an epoch or a step)."""
        if success >= self.how.success:
            self._with, self._without = self._with + 1, 0
        else:
            self._with, self._without = 0, self._without + 1
        if self._with == self.how.every:
            self.value, self._with = self.value * self.how.raise_by, 0
        if self._without == self.how.every:
            self.value, self._without = max(self.value / self.how.lower_by, self.how.floor), 0


@dataclass(frozen=True)
class FoundTrigger:
    """A trigger that works.

    Attributes:
        mask: (H, W) in [0, 1].
        pattern: (3, H, W) in [0, 1].
        success: over all images.
    """

    mask: Tensor
    pattern: Tensor
    success: float

    @property
    def norm(self) -> float:
        """|m|₁, in pixels."""
        return float(self.mask.double().sum())


class _Smallest:
    """The smallest trigger that works, and for how many epochs it has hardly shrunk."""

    def __init__(self, how: Search):
        self.how = how
        self.found: FoundTrigger | None = None
        self._reference, self._waited = math.inf, 0

    @property
    def norm(self) -> float:
        """Infinite as long as there is none."""
        return math.inf if self.found is None else self.found.norm

    def has_stopped(self) -> bool:
        """After an epoch: whether it has stopped shrinking; if so, it waits anew."""
        if self.norm < (1 - self.how.gain) * self._reference:
            self._reference, self._waited = self.norm, 0
        elif self.found is not None:
            self._waited += 1
        if self._waited < self.how.patience:
            return False
        self._waited = 0
        return True


def search_trigger(aim: Aim, pixels: Tensor, normalize: Normalize, how: Search, *, seed: int) -> FoundTrigger | None:
    """Search for the smallest trigger, from one random beginning.

    Args:
        aim: of a model in eval mode whose parameters need no gradients (see `frozen`).
        pixels: uint8 (n, 3, H, W), clean images, on the model's device.
        normalize: makes model inputs of pixels.
        how: settings.
        seed: of the beginning and of the order of the images.

    Returns:
        The smallest one at the end of an epoch whose success is enough, in that epoch on average and in itself; None
        if there was none.
    """
    trial, smallest, rates = _Trial(aim, pixels, normalize, how, seed), _Smallest(how), iter(how.rates[1:])
    for _ in range(how.epochs):
        if trial.epoch() >= how.success and trial.norm < smallest.norm:
            candidate = trial.measured()
            smallest.found = candidate if candidate.success >= how.success else smallest.found
        if smallest.has_stopped():
            if (rate := next(rates, None)) is None:
                break
            trial.optimizer.param_groups[0]["lr"] = rate
    return smallest.found


class _Trial:
    """Mask and pattern of one search, on their way."""

    def __init__(self, aim: Aim, pixels: Tensor, normalize: Normalize, how: Search, seed: int):
        self.aim, self.pixels, self.normalize, self.how = aim, pixels, normalize, how
        self.generator = torch.Generator().manual_seed(seed)
        self.weight = MaskWeight(how)
        self.raw = [self._beginning(shape) for shape in (pixels.shape[2:], pixels.shape[1:])]
        self.optimizer = torch.optim.Adam(self.raw, lr=how.rates[0], betas=how.betas)

    def trigger(self) -> tuple[Tensor, Tensor]:
        """Mask (H, W) and pattern (3, H, W) as they are now."""
        mask, pattern = (one.tanh() / 2 + 0.5 for one in self.raw)
        return mask, pattern

    @property
    def norm(self) -> float:
        """|m|₁ as it is now."""
        return float(self.trigger()[0].detach().double().sum())

    @torch.enable_grad()
    def epoch(self) -> float:
        """One pass over the images; returns the success on the way, on average over them."""
        reached = 0.0
        for chosen in self._parts(torch.randperm(len(self.pixels), generator=self.generator)):
            mask, pattern = self.trigger()
            loss, success = self._aimed(chosen, mask, pattern)
            self.optimizer.zero_grad()
            (loss + self.weight.value * mask.sum()).backward()
            self.optimizer.step()
            reached += float(success) * len(chosen) / len(self.pixels)
            if self.how.unit == "step":
                self.weight.update(float(success))
        if self.how.unit == "epoch":
            self.weight.update(reached)
        return reached

    @torch.no_grad()
    def measured(self) -> FoundTrigger:
        """The trigger as it is now, over all images."""
        mask, pattern = self.trigger()
        parts = self._parts(torch.arange(len(self.pixels)))
        success = sum(float(self._aimed(part, mask, pattern)[1]) * len(part) for part in parts) / len(self.pixels)
        return FoundTrigger(mask.cpu(), pattern.cpu(), success)

    def _aimed(self, chosen: Tensor, mask: Tensor, pattern: Tensor) -> tuple[Tensor, Tensor]:
        batch = to_unit_interval(self.pixels[chosen.to(self.pixels.device)])
        return self.aim(self.normalize(with_trigger(batch, mask, pattern)))

    def _beginning(self, shape: torch.Size) -> Tensor:
        """What tanh / 2 + 1/2 makes uniform in (0, 1)."""
        uniform = torch.rand(shape, generator=self.generator)
        return torch.atanh((2 * uniform - 1) * INSIDE).to(self.pixels.device).requires_grad_()

    def _parts(self, numbers: Tensor) -> tuple[Tensor, ...]:
        """Of nearly equal size, so that none is left with a single image."""
        return numbers.tensor_split(math.ceil(len(numbers) / self.how.batch_size))


def with_trigger(pixels: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """(1 - m) x + m p of pixels (b, 3, H, W), a mask (H, W) and a pattern (3, H, W), all in [0, 1]."""
    return (1 - mask) * pixels + mask * pattern


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, its parameters without gradients; afterwards it is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, needed in wanted:
            parameter.requires_grad_(needed)
