"""MCR, mode connectivity repair (Zhao et al. 2020, hf.co/papers/2005.00060).

A quadratic Bezier curve from the suspect (t = 0) to the suspect fine-tuned (t = 1), its bend trained at random t on
the clean images. It is TSC's curve without a permutation: beside TSC it shows what permuting adds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_tsc.baselines.base import Case, Visit
from hf_tsc.baselines.fine_tuning import train, tune
from hf_tsc.baselines.settings import Training, number
from hf_tsc.batch_norm import recompute_statistics
from hf_tsc.curve import CurveModel
from hf_tsc.functional import tensors_of
from hf_tsc.objective_trainer import ObjectiveTrainer
from hf_tsc.permutation import Params


@dataclass(frozen=True, kw_only=True)
class MCR(Training):
    """Published settings; one gradient evaluation a step, those of the end's fine-tuning included.

    Attributes:
        t: the point taken; published: 0.1.
        max_accuracy_drop: choose it instead, from 0.05, 0.1, ... 0.95: the point farthest from the suspect whose score
            on the held-out images is at most so many percentage points below the suspect's.
        end_steps, end_learning_rate: of the fine-tuning that makes the other end; as many steps as the curve by
            default.
    """

    t: float = number(0.1, "The point taken between the suspect (0) and the fine-tuned model (1).", high=1)
    max_accuracy_drop: float | None = number(
        None, "Choose t instead, so that the held-out accuracy drops at most so many points.", high=100
    )
    learning_rate: float = number(0.02, "Peak learning rate of the bend.")
    batch_size: int = number(128, "Images a gradient evaluation.", low=1, whole=True)
    weight_decay: float = number(5e-4, "Weight decay.")
    end_steps: int | None = number(None, "Steps of the end's fine-tuning; those of the curve.", low=1, whole=True)
    end_learning_rate: float = number(0.01, "Peak learning rate of the end's fine-tuning.")

    def of_the_end(self, images: int) -> Training:
        """How the end is fine-tuned."""
        steps = self.number_of_steps(images) if self.end_steps is None else self.end_steps
        return replace(self, steps=steps, learning_rate=self.end_learning_rate)

    def gradient_evaluations(self, images: int) -> int:
        return self.number_of_steps(images) + self.of_the_end(images).number_of_steps(images)


def run_mcr(case: Case, settings: MCR, visit: Visit) -> None:
    """Make the end, train the curve, and visit it."""
    objective = case.objective_of(settings)
    end = tune(case, settings.of_the_end(len(case.train)), objective)
    curve = CurveModel(case.suspect)
    curve.set_ends(tensors_of(case.suspect), tensors_of(end))
    train(
        curve,
        case.train,
        settings,
        objective=objective,
        seed=case.seed,
        use_cpu=case.use_cpu,
        trainer=_CurveTrainer,
    )

    @torch.no_grad()
    def point(t: float) -> Params:
        """The ends are the two models themselves; between them BatchNorm has statistics of its own."""
        if t in (0.0, 1.0):
            return tensors_of(end if t else case.suspect)
        params, buffers = curve.point(t), dict(case.suspect.named_buffers())
        batches = case.statistics_batches(objective, settings.batch_norm_images)
        return {**params, **recompute_statistics(case.suspect, params, batches, buffers)}

    taken = settings.t
    if settings.max_accuracy_drop is not None:
        positions = [k / 20 for k in range(1, 20)]
        taken = case.farthest_within(objective, point, positions, settings.max_accuracy_drop)
    visit("curve", True, point, taken)


class _CurveTrainer(ObjectiveTrainer):
    """Trains the bend at t ~ U(0, 1), drawn anew for every step."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        curve = self.bare_model
        assert isinstance(curve, CurveModel)
        curve.t = float(np.random.default_rng([self.args.seed, self.state.global_step]).random())
        return super().compute_loss(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All trained ones, as TSC's curves; the Trainer would leave out biases and norms, by their names."""
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
