"""FST, feature shift tuning (Min et al. 2023, hf.co/papers/2310.01875).

The head W (C, d) is drawn anew and kept from growing back towards the suspect's W0, so that features have to shift:

    loss = CE + α <W, W0>,        after each step W <- W |W0| / |W|
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_tsc.baselines.base import Case, Visit
from hf_tsc.baselines.fine_tuning import train, visit_line
from hf_tsc.baselines.settings import Training, number
from hf_tsc.baselines.units import linear_head
from hf_tsc.objective_trainer import ObjectiveTrainer
from hf_tsc.seeds import derived_seed


@dataclass(frozen=True, kw_only=True)
class FST(Training):
    """Published settings; one gradient evaluation a step.

    Attributes:
        shift: α; published: 0.1 to 0.2, and less with many classes.
    """

    shift: float = number(0.2, "Weight of the product of the new head with the old one.")
    batch_size: int = number(128, "Images a gradient evaluation.", low=1, whole=True)
    epochs: float = number(10.0, "Passes over the training images.")


def run_fst(case: Case, settings: FST, visit: Visit) -> None:
    """Tune, and visit the line back to the suspect.

    Raises:
        UsageError: the suspect has no linear head.
    """
    model, objective = copy.deepcopy(case.suspect).requires_grad_(True), case.objective_of(settings)
    head = model.get_submodule(linear_head(case.suspect))
    assert isinstance(head, nn.Linear)
    old = head.weight.detach().clone()
    redraw(head, seed=derived_seed(case.seed, 0, 6))
    train(
        model,
        case.train,
        settings,
        objective=objective,
        seed=case.seed,
        use_cpu=case.use_cpu,
        trainer=functools.partial(_ShiftTrainer, head=head, old=old, shift=settings.shift),
        callbacks=[KeepNorm(head, old.norm().item())],
    )
    visit_line(case, settings, objective, model.eval(), visit)


@torch.no_grad()
def redraw(head: nn.Linear, *, seed: int) -> None:
    """Weight (C, d) and bias (C,) ~ U(-1/√d, 1/√d), in place."""
    generator, bound = torch.Generator().manual_seed(seed), 1 / math.sqrt(head.in_features)
    for tensor in (head.weight, head.bias):
        if tensor is not None:
            drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_((2 * drawn - 1) * bound)


class KeepNorm(TrainerCallback):
    """Gives a layer's weight its Frobenius norm back after each step."""

    def __init__(self, head: nn.Linear, norm: float):
        self.head, self.norm = head, norm

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.head.weight.mul_(self.norm / self.head.weight.norm())


class _ShiftTrainer(ObjectiveTrainer):
    """Adds α <W, W0> to the loss."""

    def __init__(self, *, head: nn.Linear, old: Tensor, shift: float, **kwargs: Any):
        self.head, self.old, self.shift = head, old, shift
        super().__init__(**kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) + self.shift * (self.head.weight * self.old).sum()
