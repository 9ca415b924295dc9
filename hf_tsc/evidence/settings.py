"""How long and how a trigger is searched for: what a user chooses, and the published settings of the two searches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hf_tsc.errors import UsageError


@dataclass(frozen=True)
class Search:
    """Settings of a search for a mask m and a pattern p (see `search_trigger`); success is a fraction.

    Attributes:
        epochs: passes over the images, at most.
        batch_size: images a step.
        rates: learning rates of Adam, one after the other; the next one when the mask has stopped shrinking.
        betas: of Adam.
        success: that a mask must reach to count.
        weight: λ of the mask's size at the start.
        raise_by, lower_by: factors of λ, after `every` units in a row with enough success, or without.
        unit: what success is looked at for that, an `epoch` or a `step`.
        floor: λ goes no lower.
        patience: epochs without a mask that is smaller by `gain`, a share, until it has stopped shrinking.
        restarts: searches from different beginnings.
    """

    epochs: int
    batch_size: int
    rates: tuple[float, ...]
    success: float
    raise_by: float
    lower_by: float
    unit: Literal["epoch", "step"]
    floor: float = 0.0
    weight: float = 1e-3
    every: int = 5
    betas: tuple[float, float] = (0.5, 0.9)
    patience: int = 25
    gain: float = 0.01
    restarts: int = 3  # ours: one search is unstable


# Neural Cleanse (Wang et al., IEEE S&P 2019), with the numbers of BackdoorBench
CLASS_SEARCH = Search(
    epochs=80, batch_size=32, rates=(0.1,), success=0.98, raise_by=2.0, lower_by=2.0**1.5, unit="epoch"
)
# DECREE (Feng et al. 2023, hf.co/papers/2303.15180); when its learning rate falls is ours, as is stopping early
ENCODER_SEARCH = Search(
    epochs=1000, batch_size=128, rates=(0.5, 0.1, 0.05), success=0.99, raise_by=5.0, lower_by=5.0, unit="step"
)
SMALL_FLOOR, LARGE_FLOOR, LARGE_SIDE = 1e-5, 1e-7, 128  # floors of λ at sides of 32 and 224; where one ends is ours


@dataclass(frozen=True)
class EvidenceSettings:
    """What a user chooses; the cost grows with each of the first three.

    Attributes:
        images: clean images that triggers are searched on, at most.
        restarts: searches for each class, or for the encoder.
        epochs: of a search, at most; None for the published number (80 for classifiers, 1000 for encoders).
        seed: of everything that is drawn.

    Raises:
        UsageError: too few of them.
    """

    images: int = 256
    restarts: int = 3
    epochs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("images", 2), ("restarts", 1), ("epochs", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise UsageError(f"evidence: {name}={value}, expected {least} or more")

    def limit(self, search: Search) -> Search:
        """The search with these restarts and epochs."""
        return replace(search, restarts=self.restarts, epochs=self.epochs or search.epochs)
