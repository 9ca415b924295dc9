"""The loss barrier between two models of one architecture: how far the loss rises on the straight line between them.

    height = max over t of  L((1 - t) A + t B) - ((1 - t) L(A) + t L(B))

(Frankle et al. 2020, hf.co/papers/1912.05671). Without a barrier, B lies in A's basin; with one it need not be another
function: a permuted copy of A does the same as A, behind a barrier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_tsc.activations import Batch
from hf_tsc.batch_norm import recompute_statistics
from hf_tsc.functional import call_at
from hf_tsc.objectives import Objective
from hf_tsc.permutation import Params

POINTS = 11


@dataclass(frozen=True)
class Barrier:
    """What was found on the way from A (t = 0) to B (t = 1).

    Attributes:
        height: of the barrier, in units of the loss; 0 where the loss nowhere lies above the straight line, None where
            it is not finite at some t.
        t: where.
        losses: at evenly spread t, both ends included; None for one that is not finite.
    """

    height: float | None
    t: float
    losses: tuple[float | None, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "losses": list(self.losses)}


def loss_barrier(loss: Callable[[Params], float], start: Params, end: Params, *, points: int = POINTS) -> Barrier:
    """Walk from `start` to `end`, tensors of the same names and shapes, and look at the loss.

    Args:
        loss: of a point.
        start, end: A and B.
        points: how many on the way, both ends included.
    """
    ts = torch.linspace(0, 1, points, dtype=torch.float64).tolist()
    losses = [loss({name: start[name].lerp(end[name], t) for name in start}) for t in ts]
    if lost := [t for t, found in zip(ts, losses, strict=True) if not math.isfinite(found)]:
        return Barrier(None, lost[0], tuple(found if math.isfinite(found) else None for found in losses))
    excess = [found - ((1 - t) * losses[0] + t * losses[-1]) for t, found in zip(ts, losses, strict=True)]
    height = max(0.0, *excess)  # rounding may leave the ends a little off 0
    return Barrier(height, ts[excess.index(height)] if height > 0 else 0.0, tuple(losses))


def parameters_of(model: nn.Module) -> Params:
    """By name, detached: what a straight line joins; buffers are recomputed or those of both ends."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def clean_loss(
    model: nn.Module,
    objective: Objective,
    *,
    statistics: Callable[[], Iterable[Batch]],
    measured: Callable[[], Iterable[Batch]],
) -> Callable[[Params], float]:
    """The loss of points of a model's architecture, each with BatchNorm statistics of its own.

    Args:
        model: the architecture, in eval mode; not changed.
        objective: gives the loss.
        statistics: the batches that BatchNorm's statistics are computed over, anew at each call.
        measured: the batches that the loss is of, anew at each call.
    """
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}

    def loss(params: Params) -> float:
        inputs = (objective.model_inputs(batch) for batch in statistics())
        point = {**params, **recompute_statistics(model, params, inputs, buffers)}

        def forward(**batch: Tensor) -> Any:
            return call_at(model, point, batch)

        return objective.evaluate(forward, measured())["loss"]

    return loss
