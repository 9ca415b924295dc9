"""One linear assignment problem, exactly; for thousands of units in seconds.

SciPy's solver finds the optimum along shortest paths, and their length depends on where it starts. Subtracting any
potentials u and v from the rows and columns of the costs leaves the optimal permutation what it is,

    sum_i (c[i, p[i]] - u[i] - v[p[i]]) = sum_i c[i, p[i]] - sum(u) - sum(v)        for every permutation p,

and near the dual optimum, where no c[i, j] - u[i] - v[j] is negative and those of the optimal pairs are 0, the paths
are short. Such potentials come from entropic optimal transport: Sinkhorn's iteration with a regularisation that is
lowered step by step (Schmitzer 2019, arXiv:1610.06519) and with overrelaxation (Thibault et al. 2021,
arXiv:1711.01851). How good they are changes the time, and not the optimum (`recipes/benchmark_matching.py`).
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

Array = np.ndarray

LARGE = 1024  # units from which the potentials take less time than they save
REGULARISATIONS = [10 ** (-k / 2) for k in range(2, 11)]  # in units of the mean reduced cost
ITERATIONS = 30  # at each of them
OVERRELAXATION = 1.5


def assign(score: Array, *, maximize: bool) -> Array:
    """The permutation that maximises or minimises the sum of the chosen entries.

    Args:
        score: (n, n).

    Returns:
        int64 (n,): row i is assigned to column `result[i]`.

    Raises:
        ValueError: an entry is not finite.
    """
    if len(score) >= LARGE:
        cost = -score if maximize else score.copy()
        u, v = potentials(cost)
        cost -= u[:, None]
        cost -= v
        columns = linear_sum_assignment(cost)[1]
    else:
        columns = linear_sum_assignment(score, maximize=maximize)[1]
    return columns.astype(np.int64)


def potentials(cost: Array) -> tuple[Array, Array]:
    """u and v, each (n,), near the dual optimum of the assignment problem with costs (n, n)."""
    with np.errstate(invalid="ignore"):
        scale = cost.mean() - cost.min(1).mean()
    if not 0 < scale < np.inf:  # rows of equal costs, for which zeros are optimal; or what the solver refuses
        return np.zeros(len(cost)), np.zeros(len(cost))
    costs = np.divide(cost, scale, out=np.empty(cost.shape, np.float32), casting="same_kind")
    u = costs.min(1)
    v = (costs - u[:, None]).min(0)
    kernel = np.empty_like(costs)
    for regularisation in REGULARISATIONS:
        np.subtract(u[:, None], costs, out=kernel)
        kernel += v
        kernel /= regularisation
        with np.errstate(over="ignore"):
            rows, columns = _scalings(np.exp(kernel, out=kernel))
        u += regularisation * np.log(rows)
        v += regularisation * np.log(columns)
    # On a grid, so that equal costs (zeros, between units that are never active together) stay equal: where the solver
    # finds small differences in the place of ties, it has to settle them, which can take it hundreds of times as long.
    grid = 2.0 ** np.round(np.log2(scale * REGULARISATIONS[-1]))
    return np.round(u * (scale / grid)) * grid, np.round(v * (scale / grid)) * grid


def _scalings(kernel: Array) -> tuple[Array, Array]:
    """Factors of the rows and of the columns, each (n,), that bring the sums of both close to 1."""
    rows = columns = np.ones(len(kernel), np.float32)
    for _ in range(ITERATIONS):
        rows = _relaxed(rows, kernel @ columns)
        columns = _relaxed(columns, rows @ kernel)
    return rows, columns


def _relaxed(factors: Array, sums: Array) -> Array:
    """Half the way past 1 / sums, on a logarithmic scale; within what float32 holds, as a kernel may overflow it."""
    relaxed = factors ** (1 - OVERRELAXATION) * sums.clip(1e-20, 1e20) ** -OVERRELAXATION
    return relaxed.clip(1e-18, 1e18)
