"""Assignment: the optimum, whatever the potentials that the solver starts from."""

from itertools import permutations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from hf_tsc import assignment
from hf_tsc.assignment import LARGE, assign, potentials

RNG = np.random.default_rng(0)
ACTIVE = np.maximum(RNG.standard_normal((300, 120)), 0)
SPREAD = np.exp(2 * RNG.standard_normal(120))
RARE = ACTIVE * (RNG.random(ACTIVE.shape) < 0.02)
DEAD = ACTIVE * (np.arange(120) % 3 > 0)
# (n, n) inner products of units, and what else may come
MATRICES = {
    "activations": ACTIVE.T @ ACTIVE,
    "two networks": ACTIVE.T @ (ACTIVE[:, RNG.permutation(120)] + RNG.standard_normal((300, 120))),
    "few positions": ACTIVE[:7].T @ ACTIVE[:7],
    "very different units": (ACTIVE * SPREAD).T @ (ACTIVE * SPREAD),
    "rarely active units": RARE.T @ RARE,
    "dead units": DEAD.T @ DEAD,
    "uniform": RNG.random((120, 120)),
    "an outlier": RNG.random((120, 120)) + 1e12 * np.eye(120)[::-1] * (np.arange(120) == 5),
    "very small": 1e-150 * (ACTIVE.T @ ACTIVE),
    "very large": 1e150 * (ACTIVE.T @ ACTIVE),
    "zeros": np.zeros((120, 120)),
    "equal columns": np.repeat(RNG.random((120, 1)), 120, 1),
    "equal rows": np.repeat(RNG.random((1, 120)), 120, 0),
}


@pytest.fixture
def all_large(monkeypatch):
    """Potentials for matrices of every size."""
    monkeypatch.setattr(assignment, "LARGE", 1)


def total(score: np.ndarray, columns: np.ndarray) -> float:
    return score[np.arange(len(score)), columns].sum()


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("name", MATRICES)
def test_as_good_as_the_solver_alone(name, maximize, all_large):
    score = MATRICES[name]
    before = score.copy()
    found = assign(score, maximize=maximize)
    assert (score == before).all()
    assert found.dtype == np.int64
    assert sorted(found) == list(range(120))
    expected = total(score, linear_sum_assignment(score, maximize=maximize)[1])
    assert total(score, found) == pytest.approx(expected, rel=1e-13, abs=0)


@pytest.mark.parametrize("maximize", [True, False])
def test_the_best_of_all_permutations(maximize, all_large):
    for seed in range(5):
        score = np.random.default_rng(seed).standard_normal((5, 5))
        totals = [total(score, np.array(p)) for p in permutations(range(5))]
        best = max(totals) if maximize else min(totals)
        assert total(score, assign(score, maximize=maximize)) == pytest.approx(best, abs=1e-12)


def test_a_large_one():
    units = np.maximum(np.random.default_rng(1).standard_normal((2 * LARGE, LARGE)), 0)
    score = units.T @ units
    found = total(score, assign(score, maximize=False))
    assert found == pytest.approx(total(score, linear_sum_assignment(score)[1]), rel=1e-13)


@pytest.mark.parametrize(
    "name", ["activations", "two networks", "few positions", "very different units", "very small"]
)
def test_potentials_are_near_the_dual_optimum(name):
    """Weak duality: the sum of potentials without negative reduced costs bounds the optimum from below."""
    cost = MATRICES[name]
    u, v = potentials(cost)
    v = v + (cost - u[:, None] - v).min(0)
    optimum = total(cost, linear_sum_assignment(cost)[1])
    trivial = cost.min(1).sum()
    assert u.sum() + v.sum() <= optimum + 1e-12 * abs(optimum)
    assert optimum - u.sum() - v.sum() < 0.02 * (optimum - trivial)


@pytest.mark.parametrize("name", ["rarely active units", "dead units"])
def test_equal_costs_stay_equal(name):
    """Ties are easy for the solver, and differences of 1e-17 in their place are not."""
    cost = MATRICES[name]
    u, v = potentials(cost)
    reduced = (cost - u[:, None] - v)[cost == 0]
    assert len(reduced) > 1000
    assert len(np.unique(reduced)) < 0.02 * len(reduced)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(value, all_large):
    score = np.ones((4, 4))
    score[1, 2] = value
    with pytest.raises(ValueError, match="matrix contains invalid numeric entries"):
        assign(score, maximize=True)
