"""Trigger inversion for classifiers: is one class much easier to reach by a small patch than the others?

Neural Cleanse (Wang et al., IEEE S&P 2019). It needs images alone. It is blind to triggers that are wide, that bend
the image or differ from image to image, and to backdoors that lead to several classes; and by chance alone some class
of a clean model may stand out. So what it gives is evidence, to be seen beside that of another model, and no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_tsc.evidence.search import FoundTrigger, Normalize, frozen, search_trigger
from hf_tsc.evidence.settings import CLASS_SEARCH, Search
from hf_tsc.objectives import Forward, logits_of
from hf_tsc.seeds import derived_seed

THRESHOLD = 2.0  # of the index; published
FEWEST_CLASSES = 5  # ours: the spread of fewer numbers says nothing
NORMAL = 1.4826  # MAD of a normal distribution -> its standard deviation
DRAWS = 2000  # of as many normal numbers as there are classes, to see what chance does


@dataclass(frozen=True)
class ClassTriggers:
    """The smallest trigger of each class.

    Attributes:
        found: (classes, restarts): what each search found, or None.
        pixels: H · W, the largest norm that there is.
        images: that were searched on.
    """

    found: tuple[tuple[FoundTrigger | None, ...], ...]
    pixels: int
    images: int

    @property
    def norms(self) -> list[float]:
        """Of each class the smallest |m|₁ in pixels; infinite, larger than all others, where nothing was found."""
        return [min((one.norm for one in row if one is not None), default=math.inf) for row in self.found]

    @property
    def easiest(self) -> int | None:
        """The class with the smallest trigger; None if none was found at all."""
        norms = self.norms
        return int(np.argmin(norms)) if min(norms) < math.inf else None

    @property
    def trigger(self) -> FoundTrigger | None:
        """The smallest of all."""
        if self.easiest is None:
            return None
        return min((one for one in self.found[self.easiest] if one is not None), key=lambda one: one.norm)

    @property
    def index(self) -> float | None:
        """See `anomaly_index`."""
        return anomaly_index(self.norms)

    @property
    def flagged(self) -> int | None:
        """The class with the smallest trigger, where the index is above the published threshold."""
        return self.easiest if self.index is not None and self.index > THRESHOLD else None

    def to_dict(self) -> dict[str, Any]:
        """For a report; None stands for what was not found, or cannot be said."""
        trigger, index, median = self.trigger, self.index, float(np.median(self.norms))
        return {
            "kind": "classes",
            "images": self.images,
            "pixels": self.pixels,
            "norms": [[None if one is None else round(one.norm, 3) for one in row] for row in self.found],
            "easiest": self.easiest,
            "norm": None if trigger is None else round(trigger.norm, 3),
            "success": None if trigger is None else round(trigger.success, 4),
            "median": round(median, 3) if math.isfinite(median) else None,
            "index": None if index is None else round(index, 3),
            "chance": None if index is None else chance_of(index, len(self.found)),
            "flagged": self.flagged,
        }


def invert_classes(
    model: nn.Module,
    pixels: Tensor,
    normalize: Normalize,
    *,
    classes: int,
    how: Search = CLASS_SEARCH,
    seed: int = 0,
    progress: bool = False,
    title: str = "Searching for triggers",
) -> ClassTriggers:
    """Search for the smallest trigger that makes a classifier answer a class, for each class.

    Args:
        model: called as `model(pixel_values=...)`; it is left as it was.
        pixels: uint8 (n, 3, H, W), clean images of all classes, on the model's device.
        normalize: makes model inputs of pixels in [0, 1].
        classes: how many the model has.
        how: settings; `restarts` of them for each class.
        seed: the same seed gives the same triggers.
        progress: show a bar, called `title`.
    """
    searches = [(number, restart) for number in range(classes) for restart in range(how.restarts)]
    found = list[FoundTrigger | None]()
    with frozen(model):
        for number, restart in tqdm(searches, title, unit=" searches", disable=not progress):
            aim = partial(_towards, model, number)
            found.append(search_trigger(aim, pixels, normalize, how, seed=derived_seed(seed, number, restart)))
    by_class = (tuple(found[i : i + how.restarts]) for i in range(0, len(found), how.restarts))
    return ClassTriggers(tuple(by_class), pixels[0, 0].numel(), len(pixels))


def _towards(model: Forward, number: int, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy with a class, and the share of images that are given it."""
    logits = logits_of(model, inputs).float()
    wanted = torch.full((len(inputs),), number, device=logits.device)
    return F.cross_entropy(logits, wanted), (logits.argmax(-1) == number).float().mean()


def anomaly_index(norms: Sequence[float]) -> float | None:
    """(median - smallest) / (1.4826 MAD): how far the smallest norm lies below the others, in units of their spread.

    Args:
        norms: one a class; infinite ones count as larger than the others.

    Returns:
        None where there are fewer than `FEWEST_CLASSES`, where half of them or more are infinite, or where more than
        half are the same.
    """
    values = np.asarray(norms, dtype=np.float64)
    median = float(np.median(values))
    if len(values) < FEWEST_CLASSES or not math.isfinite(median):
        return None
    spread = NORMAL * float(np.median(np.abs(values - median)))
    return (median - float(values.min())) / spread if 0 < spread < math.inf else None


def chance_of(index: float, classes: int) -> float:
    """How often as many normal numbers, drawn anew, have an index as large: a fraction.

    The usual threshold of 2 is passed by every third draw of 10 numbers, and by nine of ten draws of 100.
    """
    values = np.random.default_rng(0).normal(size=(DRAWS, classes))
    medians = np.median(values, axis=1, keepdims=True)
    spreads = NORMAL * np.median(np.abs(values - medians), axis=1)
    return float(((medians[:, 0] - values.min(axis=1)) / spreads >= index).mean())
