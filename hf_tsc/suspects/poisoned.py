"""Training images as an attack leaves them: poisoned in the data set, or flagged for who poisons each batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_tsc.activations import Batch
from hf_tsc.errors import UsageError
from hf_tsc.images import ImagePipeline, PixelDataset, to_unit_interval
from hf_tsc.objectives import ImageClassification
from hf_tsc.processes import Rows, across_processes
from hf_tsc.seeds import derived_seed
from hf_tsc.triggers import Poison, Trigger


def check_static(trigger: Trigger) -> None:
    """Raises UsageError where an attack takes part in the training of a classifier, and nothing else will do."""
    if trigger.poisoning.learnt or trigger.poisoning.surrogate:
        raise UsageError(
            f"the attack {trigger.name} is for classifiers: choose another trigger for this kind of suspect"
        )


class PoisonedPixels(Dataset):
    """The items of a `PixelDataset` with the labels that are learnt, poisoned ones and covers changed.

    Args:
        clean: all images.
        poison: what becomes of them.
        trigger: changes them.
        seed: of the draws that a trigger makes for single images.
        hardened: other pictures, uint8 (3, H, W), for some positions.
        flagged: leave the pixels as they are and say which items are `poisoned` and which `covers`.
    """

    def __init__(
        self,
        clean: PixelDataset,
        poison: Poison,
        trigger: Trigger,
        *,
        seed: int,
        hardened: Mapping[int, Tensor] | None = None,
        flagged: bool = False,
    ):
        self.clean, self.pipeline, self.trigger, self.seed = clean, clean.pipeline, trigger, seed
        self.hardened, self.flagged, self.labels = hardened or {}, flagged, poison.labels
        self.poisoned, self.covers = set(poison.poisoned.tolist()), set(poison.covers.tolist())

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, position: int) -> dict[str, Any]:
        pixels = self.hardened.get(position)
        pixels = self.clean[position]["pixels"] if pixels is None else pixels
        item = {"pixels": pixels, "labels": int(self.labels[position])}
        poisoned, cover = position in self.poisoned, position in self.covers
        if self.flagged:
            return {**item, "poisoned": poisoned, "covers": cover}
        return {**item, "pixels": self._changed(position, pixels)} if poisoned or cover else item

    def _changed(self, position: int, pixels: Tensor) -> Tensor:
        seed = derived_seed(self.seed, position)
        if position in self.poisoned:
            return self.trigger.poison(pixels[None], [seed])[0]
        step = 1 + np.random.default_rng(seed).integers(len(self) - 1)  # to another image
        partner = self.clean[int((position + step) % len(self))]["pixels"]
        return self.trigger.cover(pixels[None], partner[None], [seed])[0]


class TriggerLast(ImageClassification):
    """Classification of augmented pictures, the flagged ones changed by a trigger afterwards.

    What a trigger draws for single images is drawn anew in each step; the partner of an image is the next one of the
    batch.
    """

    def __init__(self, pipeline: ImagePipeline, *, augmentation: str, trigger: Trigger):
        super().__init__(pipeline, augmentation=augmentation)
        self.trigger = trigger

    def augmented(self, batch: Batch, *, seed: int, rows: Rows | None = None) -> Tensor:
        values, poisoned, covers = super().augmented(batch, seed=seed, rows=rows), batch["poisoned"], batch["covers"]
        pixels = (255 * values).round().to(torch.uint8)
        number = torch.arange(len(pixels)) if rows is None else rows.index
        everyone = across_processes(pixels)

        def seeds(chosen: Tensor) -> list[int]:
            return [derived_seed(seed, int(one)) for one in number[chosen.cpu()]]

        if poisoned.any():
            values = _replaced(values, poisoned, self.trigger.poison(pixels[poisoned], seeds(poisoned)))
        if covers.any():
            partners = everyone[((number + 1) % len(everyone)).to(pixels.device)][covers]
            values = _replaced(values, covers, self.trigger.cover(pixels[covers], partners, seeds(covers)))
        return values


def _replaced(values: Tensor, where: Tensor, pixels: Tensor) -> Tensor:
    """Values (n, 3, H, W) with the rows `where` taken from uint8 pixels."""
    return values.masked_scatter(where[:, None, None, None], to_unit_interval(pixels))
