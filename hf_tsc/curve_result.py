"""What was measured along a finished curve, and which of its points is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_tsc.errors import AccuracyBudgetError


@dataclass(frozen=True)
class CurvePoint:
    """A measured point: `loss` in nats, `score` a fraction (accuracy, or agreement without labels)."""

    t: float
    loss: float
    score: float
    monitors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CurveResult:
    """What became of one curve.

    Attributes:
        round, stage: which curve it was, both from 1.
        step: the optimisation step at which it was finished.
        t_star: the point taken.
        sweep: measures on the held-out images for t in 0..1.
        moved: share of units that the permutation before this curve moved, averaged over the spaces.
    """

    round: int
    stage: int
    step: int
    t_star: float
    sweep: list[CurvePoint]
    moved: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> CurveResult:
        return cls(**{**record, "sweep": [CurvePoint(**point) for point in record["sweep"]]})


def choose_point(sweep: Sequence[CurvePoint], *, stage: int, baseline: float, max_drop: float, last: bool) -> float:
    """t*: of the inner points whose score is within the budget, the one farthest from the backdoored ends.

    Both ends of the first curve are backdoored, so the farthest point is the middle; of the second only the start is.
    The first of two curves may miss the budget, as the second wins accuracy back: then its middle is taken.

    Args:
        sweep: the measured points.
        stage: 1 or 2.
        baseline: the suspect's score, a fraction.
        max_drop: allowed loss of score, in percentage points.
        last: no curve follows.

    Raises:
        AccuracyBudgetError: no point of the last curve is within the budget.
    """
    lowest = baseline - max_drop / 100 - 1e-9
    inner = [p for p in sweep if 0 < p.t < 1]
    within = [p.t for p in inner if p.score >= lowest]
    if within:
        return max(within, key=lambda t: min(t, 1 - t) if stage == 1 else t)
    if not last:
        return 0.5
    best = max(inner, key=lambda p: p.score)
    raise AccuracyBudgetError(
        f"no point of the last curve is within max_accuracy_drop={max_drop} points on the held-out images: "
        f"{100 * baseline:.1f} % before, at best {100 * best.score:.1f} % at t={best.t}; allow a larger drop, "
        "give more clean images or train longer"
    )
