"""The training of a suspect together with its input-aware trigger (Nguyen and Tran 2020, hf.co/papers/2010.08138).

Letters: n images of a batch, H and W their height and width; d(a, b) the root mean square of a - b for each image.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from hf_tsc.activations import Batch
from hf_tsc.errors import PurificationError
from hf_tsc.images import ImagePipeline, collate, to_unit_interval
from hf_tsc.objectives import Forward, ImageClassification, logits_of
from hf_tsc.suspects.poisoned import PoisonedPixels
from hf_tsc.triggers import InputAware, PatternNets

BETAS = (0.5, 0.9)  # of Adam, for both networks
DENSITY_WEIGHT = 100.0
DECAYS = (0.4, 0.8)  # shares of the mask's epochs after which its rate falls to a tenth: 10 and 20 of 25
TINY = 1e-7


def new_nets(*, seed: int) -> PatternNets:
    """Untrained networks, a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PatternNets()


def distance(a: Tensor, b: Tensor) -> Tensor:
    """d(a, b): (n, ...) -> (n,). Its gradient is 0 where a = b."""
    difference = (a - b).flatten(1)
    return torch.linalg.vector_norm(difference, dim=1) / math.sqrt(difference.shape[1])


def diversity_loss(inputs: Tensor, others: Tensor, made: Tensor, made_of_others: Tensor) -> Tensor:
    """mean d(x1, x2) / (d(f(x1), f(x2)) + 1e-7): large where different images get like pictures."""
    return (distance(inputs, others) / (distance(made, made_of_others) + TINY)).mean()


def mask_loss(nets: PatternNets, pixels: Tensor, *, density: float) -> Tensor:
    """100 mean relu(m(x) - density) + the diversity of the masks, each image against the next one of the batch.

    Args:
        nets: with the mask's network.
        pixels: (n, 3, H, W) in [0, 1].
        density: share that is free.
    """
    masks = nets.where(pixels)
    free = DENSITY_WEIGHT * F.relu(masks - density).mean()
    # in units of a standard deviation of pixels, about a quarter, as the networks see them
    return free + diversity_loss(4 * pixels, 4 * pixels.roll(-1, 0), masks, masks.roll(-1, 0))


def train_mask(nets: PatternNets, dataset: PoisonedPixels, trigger: InputAware, *, batch_size: int, seed: int) -> None:
    """The first phase: the mask's network alone, on clean images; it is left in eval mode and frozen.

    Raises:
        PurificationError: the loss is not finite.
    """
    nets.mask.train()
    optimizer = torch.optim.Adam(nets.mask.parameters(), lr=trigger.learning_rate, betas=BETAS)
    decays = [round(share * trigger.mask_epochs) for share in DECAYS]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, decays, gamma=0.1)
    order = torch.Generator().manual_seed(seed)
    loader: Any = DataLoader(dataset, batch_size=batch_size, shuffle=True, collate_fn=collate, generator=order)
    device = next(nets.parameters()).device
    for epoch in range(trigger.mask_epochs):
        for batch in loader:
            loss = mask_loss(nets, to_unit_interval(batch["pixels"].to(device)), density=trigger.density)
            if not np.isfinite(loss.item()):
                raise PurificationError(f"the loss of the mask is {loss.item()} in epoch {epoch}: lower learning_rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    nets.mask.eval().requires_grad_(False)


class InputAwareTraining(ImageClassification):
    """The second phase: cross-entropy, with the pattern's diversity; both the classifier and the pattern learn.

    In a batch with flags, `poisoned` images get T(x) and `covers` get pattern and mask of the next image.

    Args:
        pipeline, augmentation: as in `ImageClassification`.
        nets: of which the mask is trained.
        trigger_last: put the trigger on augmented pictures; else those are augmented that carry it.
    """

    def __init__(self, pipeline: ImagePipeline, *, augmentation: str, nets: PatternNets, trigger_last: bool):
        super().__init__(pipeline, augmentation=augmentation)
        self.nets, self.trigger_last = nets, trigger_last

    def loss(self, forward: Forward, batch: Batch, *, seed: int) -> Tensor:
        if self.trigger_last:
            pixels, diversity = self.triggered(self.augmented(batch, seed=seed), batch)
        else:
            pixels, diversity = self.triggered(to_unit_interval(batch["pixels"]), batch)
            pixels = self.augmentation(pixels, seed=seed)
        logits = logits_of(forward, self.pipeline.normalize(pixels))
        return F.cross_entropy(logits, batch["labels"]) + diversity

    def triggered(self, pixels: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Pictures with the trigger, (n, 3, H, W) in [0, 1], and the loss of the pattern's diversity."""
        changed = batch["poisoned"] | batch["covers"]
        if not changed.any():
            return pixels, pixels.new_zeros(())
        own, others = pixels[changed], pixels.roll(-1, 0)[changed]
        patterns, patterns_of_others = self.nets.pattern(torch.cat([own, others])).chunk(2)
        crossed = batch["covers"][changed][:, None, None, None]
        pattern = torch.where(crossed, patterns_of_others, patterns)
        where = self.nets.where(torch.where(crossed, others, own))
        triggered = own + where * (pattern - own)
        whole = pixels.masked_scatter(changed[:, None, None, None], triggered)
        return whole, diversity_loss(own, others, patterns, patterns_of_others)


class PatternSteps(TrainerCallback):
    """The pattern's own optimiser, which steps with that of the classifier: the loss is one, the rates are not."""

    def __init__(self, nets: PatternNets, *, learning_rate: float):
        self.optimizer = torch.optim.Adam(nets.pattern.parameters(), lr=learning_rate, betas=BETAS)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def finished(trigger: InputAware, nets: PatternNets) -> InputAware:
    """The trigger as it was learnt."""
    return replace(trigger, nets=nets.eval().requires_grad_(False))
