"""From activation statistics to a permutation, by linear assignment.

    un-align:  argmax_P sum |x - P x|^2        = argmin_P of the summed inner products of x with itself
    align:     argmin_P sum |x(a) - P x(b)|^2  = argmax_P of the summed inner products of x(a) with x(b)

(hf.co/papers/2506.07467, section 4; assignment as in Git Re-Basin, hf.co/papers/2209.04836.) With out[i] =
in[perm[i]], row i of a similarity matrix is assigned to column perm[i]. Heads are matched as blocks: the inner
problems are solved for every pair of heads, and their optima are the similarities of the outer one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hf_tsc.activations import TapStatistics
from hf_tsc.axes import atoms, positions
from hf_tsc.permutation import KINDS, Kind, PermutationSpec, Space, identity

Array = np.ndarray


def match(
    spec: PermutationSpec,
    statistics: Sequence[TapStatistics],
    *,
    maximize: bool,
    method: str = "l2",
    kinds: Collection[Kind] = KINDS,
) -> dict[str, Tensor]:
    """Solve the assignment problem of every space.

    Args:
        spec: the spec whose `taps` the statistics were collected at.
        statistics: one a tap, in the order of `spec.taps`.
        maximize: True aligns network b to network a (apply the result to b); False un-aligns.
        method: `l2` or `correlation`.
        kinds: the kinds of spaces that may move; the others get the identity.

    Returns:
        A permutation of every space.
    """
    similarities = [s.similarity(method).cpu().numpy() for s in statistics]
    result = identity(spec)
    for space in spec.spaces.values():
        if space.parent is None:
            result.update(_solve(spec, space, similarities, maximize, set(kinds)))
    return result


def _solve(
    spec: PermutationSpec, space: Space, similarities: list[Array], maximize: bool, kinds: set[Kind]
) -> dict[str, Tensor]:
    """The permutation of a space and of those nested in it."""
    children = spec.children(space.name)
    if not children:
        score = _own_score(spec, space, similarities)
        return {space.name: _assign(score, maximize)} if space.kind in kinds else {}
    inner = {child: _solve_pairs(spec, child, similarities, maximize, child.kind in kinds) for child in children}
    score = np.sum([value for value, _ in inner.values()], axis=0)  # (h, h)
    outer = _assign(score, maximize) if space.kind in kinds else torch.arange(space.size)
    result = {space.name: outer}
    for child, (_, perms) in inner.items():
        result[child.name] = torch.from_numpy(perms[np.arange(space.size), outer.numpy()])
    return result


def _own_score(spec: PermutationSpec, space: Space, similarities: list[Array]) -> Array:
    """(n, n): the similarities of a space that is nested in none, summed over its taps and its places there."""
    total = np.zeros((space.size, space.size))
    for tap, similarity in zip(spec.taps, similarities, strict=True):
        if any(atom.space == space.name for atom in atoms(tap.axis)):
            for places in positions(tap.axis, space.name):
                for row in places.numpy():
                    total += similarity[np.ix_(row, row)]
    return total


def _solve_pairs(
    spec: PermutationSpec, child: Space, similarities: list[Array], maximize: bool, free: bool
) -> tuple[Array, Array]:
    """The inner problem for every pair of parent blocks: optima (h, h) and permutations (h, h, d)."""
    assert child.parent is not None
    heads = spec.spaces[child.parent].size
    blocks = np.zeros((heads, heads, child.size, child.size))
    for tap, similarity in zip(spec.taps, similarities, strict=True):
        if any(atom.space == child.name for atom in atoms(tap.axis)):
            for places in positions(tap.axis, child.name):
                where = places.numpy()  # (h, d)
                blocks += similarity[where[:, None, :, None], where[None, :, None, :]]
    values, perms = np.zeros((heads, heads)), np.zeros((heads, heads, child.size), dtype=np.int64)
    for i in range(heads):
        for j in range(heads):
            rows = np.arange(child.size)
            columns = linear_sum_assignment(blocks[i, j], maximize=maximize)[1] if free else rows
            values[i, j], perms[i, j] = blocks[i, j][rows, columns].sum(), columns
    return values, perms


def _assign(score: Array, maximize: bool) -> Tensor:
    return torch.from_numpy(linear_sum_assignment(score, maximize=maximize)[1].astype(np.int64))
