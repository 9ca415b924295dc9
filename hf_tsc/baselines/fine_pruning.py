"""Fine-pruning (Liu et al. 2018, hf.co/papers/1805.12185): prune what is dormant on clean images, then fine-tune.

In a network with BatchNorm layers the units are the features that the head reads, ranked by their mean activation. In
one without, they are the hidden units of the last third of the MLPs, ranked by their mean |activation| times the norm
of what they write. Pruned units stay pruned while the rest is tuned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from hf_tsc.baselines.base import Case, Visit
from hf_tsc.baselines.fine_tuning import line, tune
from hf_tsc.baselines.settings import Training, number
from hf_tsc.baselines.units import Units, batch_norm_units, head_units, hidden_units, mean_activations, prune
from hf_tsc.errors import UsageError
from hf_tsc.functional import model_at, tensors_of
from hf_tsc.permutation import Params

LAST_SHARE = 1 / 3  # of the MLPs


@dataclass(frozen=True, kw_only=True)
class FinePruning(Training):
    """Published settings; one gradient evaluation a step of the fine-tuning, none for the pruning.

    Attributes:
        ratio: share of the units to prune; by default chosen in steps of 1 %, as long as `max_accuracy_drop` is kept.
        max_accuracy_drop: percentage points that the score on the held-out images may lie below the suspect's after
            the pruning; published: 10 % of it.
    """

    ratio: float | None = number(None, "Share of the units to prune.", high=1)
    max_accuracy_drop: float = number(
        10.0, "Without a ratio, prune on until the held-out accuracy drops more points than this.", high=100
    )
    batch_size: int = number(256, "Images a gradient evaluation.", low=1, whole=True)
    weight_decay: float = number(5e-4, "Weight decay.")


def run_fine_pruning(case: Case, settings: FinePruning, visit: Visit) -> None:
    """Visit the pruned suspects by ratio; fine-tune the one taken, and visit the line from it to the result.

    Raises:
        UsageError: the suspect has no units that can be pruned.
        PurificationError: the loss is not finite.
    """
    objective, layers = case.objective_of(settings), prunable(case.suspect)
    weights = tensors_of(case.suspect)
    activations = mean_activations(case.suspect, layers, case.clean_batches(objective))
    order = dormancy(weights, layers, activations)

    def pruned(ratio: float) -> Params:
        return prune(weights, zip(layers, chosen(order, layers, ratio), strict=True))

    ratio = settings.ratio
    if ratio is None:
        steps = [k / 100 for k in range(100)]
        ratio = case.farthest_within(objective, pruned, steps, settings.max_accuracy_drop, until=True)
    visit("pruning", False, pruned, ratio)
    start = replace(case, suspect=model_at(case.suspect, pruned(ratio)))
    keep = KeepPruned(layers, chosen(order, layers, ratio))
    tuned = tune(start, settings, objective, callbacks=[keep])
    visit("interpolation from the pruned", True, line(start, settings, objective, tuned), 1.0)


def prunable(model: PreTrainedModel) -> list[Units]:
    """The layers of units that fine-pruning looks at.

    Raises:
        UsageError: there are none.
    """
    if batch_norm_units(model):
        return [head_units(model)]
    hidden = hidden_units(model)
    if not hidden:
        raise UsageError(f"{type(model).__name__} has no hidden units to prune: use another method")
    return hidden[-math.ceil(len(hidden) * LAST_SHARE) :]


def dormancy(weights: Params, layers: Sequence[Units], activations: Sequence[Tensor]) -> Tensor:
    """All units of all layers, the most dormant first: places in the concatenation of the layers, int64 (Σ n,).

    Args:
        weights: of the suspect.
        layers: of units.
        activations: mean |activation| of each, (n,).
    """
    scores = [activations[0]]
    if len(layers) > 1 or layers[0].biases:  # hidden units: what they write counts as well
        scores = [
            activation * _norms(weights[units.weight], units.dim)
            for units, activation in zip(layers, activations, strict=True)
        ]
    return torch.cat(scores).argsort(stable=True)


def _norms(weight: Tensor, dim: int) -> Tensor:
    """(n,): the norm of each slice along an axis, in float64 on the CPU."""
    return weight.detach().cpu().double().movedim(dim, 0).flatten(1).norm(dim=1)


def chosen(order: Tensor, layers: Sequence[Units], ratio: float) -> list[Tensor]:
    """Which units of each layer are among the first floor(ratio · all), bool (n,) each."""
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[: math.floor(ratio * len(order) + 1e-9)]] = True
    return list(mask.split([units.size for units in layers]))


class KeepPruned(TrainerCallback):
    """Zeroes the pruned units again after each step."""

    def __init__(self, layers: Sequence[Units], masks: Sequence[Tensor]):
        self.pruned = list(zip(layers, masks, strict=True))

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        assert model is not None
        tensors = dict(model.named_parameters())
        for name, tensor in prune(dict(tensors), self.pruned).items():
            if tensor is not tensors[name]:
                tensors[name].copy_(tensor)
