"""FT-SAM: fine-tuning with adaptive sharpness-aware minimisation (Zhu et al. 2023, hf.co/papers/2304.11823).

    g = ∇L(θ),   D = diag |θ|,   ε = ρ D² g / |D g|,   θ <- θ - rate · ∇L(θ + ε)

The ascent grows with a weight's own size, so that large weights, on which backdoors rest, are the ones that shrink.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_tsc.activations import Batch
from hf_tsc.baselines.base import Case, Visit
from hf_tsc.baselines.fine_tuning import tune, visit_line
from hf_tsc.baselines.settings import Training, number
from hf_tsc.objective_trainer import ObjectiveTrainer
from hf_tsc.objectives import Forward, Objective, logits_of


@dataclass(frozen=True, kw_only=True)
class FTSAM(Training):
    """Published settings for CIFAR-10; two gradient evaluations a step.

    Attributes:
        rho: size of the ascent, in units of |D⁻¹ε|; published: 2, and 8 on Tiny ImageNet.
        label_smoothing: share of the target that is spread evenly over the other classes; with labels alone.
    """

    rho: float = number(2.0, "Size of the ascent, relative to the weights.")
    label_smoothing: float = number(
        0.1, "Share of the target that goes to the other classes; with labels alone.", high=1
    )
    batch_size: int = number(256, "Images a gradient evaluation.", low=1, whole=True)
    weight_decay: float = number(5e-4, "Weight decay.")

    def gradient_evaluations(self, images: int) -> int:
        return 2 * self.number_of_steps(images)


def run_ft_sam(case: Case, settings: FTSAM, visit: Visit) -> None:
    """Fine-tune, and visit the line back to the suspect."""
    objective = case.objective_of(settings)
    trained = objective
    if settings.objective == "cross_entropy" and settings.label_smoothing > 0:
        trained = _Smoothed(objective, settings.label_smoothing)
    tuned = tune(case, settings, trained, trainer=functools.partial(SAMTrainer, rho=settings.rho))
    visit_line(case, settings, objective, tuned, visit)


class SAMTrainer(ObjectiveTrainer):
    """Steps with the gradient at θ + ε."""

    def __init__(self, *, rho: float, **kwargs: Any):
        self.rho = rho
        super().__init__(**kwargs)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Twice: at θ, then at θ + ε on the same images, augmented alike; returns the loss at θ."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._micro_batch -= 1  # the second pass draws what the first one drew
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        with climbed(parameters, rho=self.rho), frozen_statistics(model):
            model.zero_grad()
            super().training_step(model, inputs, *args, **kwargs)
        return loss


@contextmanager
def climbed(parameters: list[nn.Parameter], *, rho: float) -> Iterator[None]:
    """Parameters at θ + ε, ε made of their gradients; afterwards they are θ again, bit by bit.

    Where |Dg| is 0, so is ε. A weight that is exactly 0 does not move.
    """
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        scaled = [weight.abs() * _gradient(parameter) for weight, parameter in zip(before, parameters, strict=True)]
        norm = torch.stack([one.square().sum() for one in scaled]).sum().sqrt()
        if norm > 0:
            for parameter, weight, one in zip(parameters, before, scaled, strict=True):
                parameter.add_(weight.abs() * one * (rho / norm))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in zip(parameters, before, strict=True):
                parameter.copy_(weight)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm layers normalise by the batch, and do not move their running statistics."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


class _Smoothed:
    """An objective whose loss is cross-entropy with smoothed labels: 1 - s on the label, s / (C - 1) on each other."""

    head: nn.Module | None = None

    def __init__(self, objective: Objective, smoothing: float):
        self.objective, self.smoothing = objective, smoothing
        self.score_name = objective.score_name

    def loss(self, forward: Forward, batch: Batch, *, seed: int) -> Tensor:
        """(1 - s) L + s / (C - 1) Σ over the other classes c of -log p_c, L the loss without smoothing.

        The sum over all classes less L; with it mixup needs no formula of its own.
        """
        seen: list[Tensor] = []

        def watched(**inputs: Tensor) -> Any:
            output: Any = forward(**inputs)
            seen.append(logits_of(lambda pixel_values: output, inputs["pixel_values"]))
            return output

        plain = self.objective.loss(watched, batch, seed=seed)
        classes = seen[0].shape[-1]
        evenly = -F.log_softmax(seen[0], dim=-1).mean()
        share = self.smoothing * classes / (classes - 1)  # s / (C - 1) for all C, and the label the rest
        return (1 - share) * plain + share * evenly

    def model_inputs(self, batch: Batch) -> Batch:
        return self.objective.model_inputs(batch)

    def training_inputs(self, batch: Batch, *, seed: int) -> Batch:
        return self.objective.training_inputs(batch, seed=seed)

    def evaluate(self, forward: Forward, batches: Any) -> dict[str, float]:
        return self.objective.evaluate(forward, batches)
