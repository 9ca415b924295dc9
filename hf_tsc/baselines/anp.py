"""ANP, adversarial neuron pruning (Wu & Wang 2021, hf.co/papers/2110.14430).

Unit j has a mask m_j in [0, 1], and noise δ_j, ξ_j in [-ε, ε]: its factor is m_j + δ_j, its bias (1 + ξ_j) b_j. Each
step, noise is drawn and moved once by its gradient's sign so that the loss grows; then the masks take a step on

    α L(m) + (1 - α) L(m, δ, ξ)

The weights stay. Units whose masks fall are those that the loss depends on most easily: they are pruned. A unit is a
BatchNorm channel; in a network with LayerNorms alone, a hidden unit of an MLP, whose factor acts after the
non-linearity, in the layer that reads it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_tsc.activations import Batch
from hf_tsc.baselines.base import Case, Visit, check_finite
from hf_tsc.baselines.settings import Settings, limits, number
from hf_tsc.baselines.units import Units, prune, units_of
from hf_tsc.errors import UsageError
from hf_tsc.functional import call_at, tensors_of
from hf_tsc.objectives import Objective
from hf_tsc.permutation import Params
from hf_tsc.seeds import derived_seed

THRESHOLDS = (0.0, *(k / 20 for k in range(1, 19)))  # 0, 0.05, ... 0.9, as published


@dataclass(frozen=True, kw_only=True)
class ANP(Settings):
    """Published settings for 500 images; three gradient evaluations a step.

    Attributes:
        steps: of the masks.
        epsilon: ε, the largest noise; published: 0.4.
        alpha: α, weight of the loss without noise; published: 0.2.
        learning_rate, momentum: of the masks; published: 0.2 on 500 images, 0.01 on 2,500.
        threshold: prune the units whose mask is at most this; by default the largest of 0, 0.05, ... 0.9 that keeps
            `max_accuracy_drop`.
        max_accuracy_drop: percentage points that the score on the held-out images may lie below the suspect's.
    """

    steps: int = number(2000, "Steps of the masks.", low=1, whole=True)
    epsilon: float = number(0.4, "Largest noise on a unit.")
    alpha: float = number(0.2, "Weight of the loss without noise.", high=1)
    learning_rate: float = number(0.2, "Learning rate of the masks.")
    momentum: float = number(0.9, "Momentum of the masks.", high=1)
    threshold: float | None = number(None, "Prune the units whose mask is at most this.", high=1)
    max_accuracy_drop: float = number(
        5.0, "Without a threshold, the largest that lets the held-out accuracy drop so many points.", high=100
    )
    thresholds: list[float] = field(
        default_factory=lambda: list(THRESHOLDS), metadata=limits("Thresholds to choose from, ascending.", high=1)
    )
    batch_size: int = number(128, "Images a gradient evaluation.", low=1, whole=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if sorted(self.thresholds) != list(self.thresholds):
            raise UsageError(
                f"thresholds={self.thresholds}: expected ascending numbers: the last that keeps the accuracy counts"
            )

    def gradient_evaluations(self, images: int) -> int:
        return 3 * self.steps


@dataclass(frozen=True)
class Noise:
    """On factors and biases of each layer of units, (n,) each."""

    factors: list[Tensor]
    biases: list[Tensor]


def run_anp(case: Case, settings: ANP, visit: Visit) -> None:
    """Train the masks, and visit the suspect pruned at every threshold.

    Raises:
        UsageError: the suspect has no units that can be pruned.
        PurificationError: the loss is not finite.
        AccuracyBudgetError: no threshold keeps `max_accuracy_drop`.
    """
    objective, layers = case.objective_of(settings), units_of(case.suspect)
    masks = train_masks(case, settings, objective, layers)
    weights = tensors_of(case.suspect)

    def point(threshold: float) -> Params:
        return prune(weights, ((units, mask <= threshold) for units, mask in zip(layers, masks, strict=True)))

    taken = settings.threshold
    if taken is None:
        taken = case.farthest_within(objective, point, settings.thresholds, settings.max_accuracy_drop)
    visit("threshold", True, point, taken)


def train_masks(case: Case, settings: ANP, objective: Objective, layers: list[Units]) -> list[Tensor]:
    """The masks of each layer of units, (n,) each, in [0, 1]; dropout is off, BatchNorm keeps its statistics."""
    weights = tensors_of(case.suspect)
    first = weights[layers[0].weight]

    def loss_at(noise: Noise | None, batch: Batch, seed: int) -> Tensor:
        tensors = masked(weights, layers, masks, noise)
        return objective.loss(lambda **inputs: call_at(case.suspect, tensors, inputs), batch, seed=seed)

    masks = [torch.ones(units.size, dtype=first.dtype, device=first.device, requires_grad=True) for units in layers]
    optimizer = torch.optim.SGD(masks, lr=settings.learning_rate, momentum=settings.momentum)
    generator = torch.Generator().manual_seed(derived_seed(case.seed, 0, 2))
    for step, batch in enumerate(case.drawn_batches(settings.batch_size, settings.steps)):
        given: dict[str, Any] = {"batch": batch, "seed": derived_seed(case.seed, step, 3)}
        drawn = _drawn(masks, settings.epsilon, generator)
        noise = ascend(functools.partial(loss_at, **given), drawn, settings.epsilon)
        loss = settings.alpha * loss_at(None, **given) + (1 - settings.alpha) * loss_at(noise, **given)
        check_finite(loss, step, f"learning_rate={settings.learning_rate:g}")
        step_masks(optimizer, masks, loss)
    return [mask.detach() for mask in masks]


def masked(weights: Params, layers: list[Units], masks: list[Tensor], noise: Noise | None = None) -> Params:
    """All tensors with factors m (or m + δ) and, with noise, biases (1 + ξ) b."""
    result = dict(weights)
    for place, (units, mask) in enumerate(zip(layers, masks, strict=True)):
        factors = mask if noise is None else mask + noise.factors[place]
        result[units.weight] = units.scaled(weights, factors)
        if noise is not None:
            for name in units.biases:
                result[name] = weights[name] * (1 + noise.biases[place])
    return result


def ascend(loss_at: Callable[[Noise], Tensor], noise: Noise, epsilon: float) -> Noise:
    """One step of size ε along the sign of the noise's gradient, projected to [-ε, ε].

    Of a BatchNorm channel or hidden unit without a bias, ξ has no gradient and stays.
    """
    flat = [*noise.factors, *noise.biases]
    grads = torch.autograd.grad(loss_at(noise), flat, allow_unused=True)
    moved = [
        (one.detach() + epsilon * (0 if grad is None else grad.sign())).clamp(-epsilon, epsilon)
        for one, grad in zip(flat, grads, strict=True)
    ]
    return Noise(moved[: len(noise.factors)], moved[len(noise.factors) :])


def step_masks(optimizer: torch.optim.Optimizer, masks: list[Tensor], loss: Tensor) -> None:
    """A step down, and back into [0, 1]."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for mask in masks:
            mask.clamp_(0, 1)


def _drawn(masks: list[Tensor], epsilon: float, generator: torch.Generator) -> Noise:
    """δ, ξ ~ U(-ε, ε)."""

    def draw(like: Tensor) -> Tensor:
        drawn = epsilon * (2 * torch.rand(like.shape, generator=generator, dtype=torch.float64) - 1)
        return drawn.to(like.dtype).to(like.device).requires_grad_(True)

    return Noise([draw(mask) for mask in masks], [draw(mask) for mask in masks])
