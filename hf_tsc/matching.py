"""From activation statistics to a permutation, by linear assignment.

    un-align:  argmax_P sum |x - P x|^2        = argmin_P of the summed inner products of x with itself
    align:     argmin_P sum |x(a) - P x(b)|^2  = argmax_P of the summed inner products of x(a) with x(b)

(hf.co/papers/2506.07467, section 4; assignment as in Git Re-Basin, hf.co/papers/2209.04836.) With out[i] =
in[perm[i]], row i of a similarity matrix is assigned to column perm[i]. Heads are matched as blocks: the inner
problems are solved for every pair of heads, and their optima are the similarities of the outer one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm.auto import tqdm

from hf_tsc.activations import TapStatistics
from hf_tsc.assignment import Array, assign
from hf_tsc.axes import positions
from hf_tsc.permutation import KINDS, Kind, PermutationSpec, Space, identity
from hf_tsc.processes import number_of_processes, of_all, rank, together

THREADS = 4  # more would wait for SciPy's solver, which holds the interpreter's lock
SILENT_SECONDS = 5.0  # no progress bar before


def match(
    spec: PermutationSpec,
    statistics: Sequence[TapStatistics],
    *,
    maximize: bool,
    method: str = "l2",
    kinds: Collection[Kind] = KINDS,
    workers: int | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Solve the assignment problem of every space; several processes each solve some, and tell the others.

    Args:
        spec: the spec whose `taps` the statistics were collected at.
        statistics: one a tap, in the order of `spec.taps`; the same in all processes.
        maximize: True aligns network b to network a (apply the result to b); False un-aligns.
        method: `l2` or `correlation`.
        kinds: the kinds of spaces that may move; the others get the identity.
        workers: threads, each for one space at a time and with three matrices of it; by default as many as torch uses,
            and at most 4. The result is the same whatever their number.
        progress: show a bar when it takes long.

    Returns:
        A permutation of every space, the same in all processes.
    """
    readings = _Readings(spec, statistics, method)

    def solve(space: Space) -> dict[str, Tensor]:
        if spec.children(space.name):
            return _solve_nested(spec, space, readings, maximize, set(kinds))
        if space.kind not in kinds:
            return {}
        return {space.name: torch.from_numpy(assign(readings.score(space), maximize=maximize))}

    own: dict[str, Tensor] = {}
    spaces = sorted(
        outer_spaces(spec), key=lambda space: space.size, reverse=True
    )  # no process, and no thread, is left with several long ones
    spaces = spaces[rank() :: number_of_processes()]
    threads = max(1, min(workers or min(torch.get_num_threads(), THREADS), len(spaces)))
    pool = ThreadPoolExecutor(threads)
    # one BLAS thread for each: a second one that has to wait for a processor holds up the first
    with together(), threadpool_limits(1, user_api="blas"):
        try:
            solved = [pool.submit(solve, space) for space in spaces]
            for one in tqdm(solved, "Matching", unit=" spaces", delay=SILENT_SECONDS, disable=not progress):
                own |= one.result()
        finally:
            pool.shutdown(cancel_futures=True)
    result = identity(spec)
    for part in of_all(own):
        result |= part
    return result


def outer_spaces(spec: PermutationSpec) -> list[Space]:
    """The spaces that are nested in none."""
    return [space for space in spec.spaces.values() if space.parent is None]


class _Readings:
    """The similarities at all taps; each is computed where it is needed, so that one is held at a time."""

    def __init__(self, spec: PermutationSpec, statistics: Sequence[TapStatistics], method: str):
        self.taps = list(zip(spec.taps, statistics, strict=True))
        self.method = method

    def at(self, space: Space) -> Iterator[tuple[Array, Array]]:
        """Every occurrence of a space: the similarities (n, n) of its tap, and its places (blocks, size) there."""
        for tap, one in self.taps:
            if occurrences := positions(tap.axis, space.name):
                similarity = one.similarity(self.method).cpu().numpy()
                for places in occurrences:
                    yield similarity, places.numpy()

    def score(self, space: Space) -> Array:
        """(n, n): the similarities of a space that is nested in none, summed over its taps and its places there."""
        total = np.zeros((space.size, space.size))
        for similarity, places in self.at(space):
            for row in places:
                total += similarity[row[:, None], row]
        return total

    def block_scores(self, space: Space, blocks: int) -> Array:
        """(h, h, d, d): the same for every pair of the parent's h blocks."""
        total = np.zeros((blocks, blocks, space.size, space.size))
        for similarity, where in self.at(space):  # where: (h, d)
            total += similarity[where[:, None, :, None], where[None, :, None, :]]
        return total


def _solve_nested(
    spec: PermutationSpec, space: Space, readings: _Readings, maximize: bool, kinds: set[Kind]
) -> dict[str, Tensor]:
    """The permutation of a space and of those nested in it."""
    children = spec.children(space.name)
    inner = {child: _solve_pairs(readings, child, space.size, maximize, child.kind in kinds) for child in children}
    optima = np.sum([values for values, _ in inner.values()], axis=0)  # (h, h)
    outer = assign(optima, maximize=maximize) if space.kind in kinds else np.arange(space.size)
    result = {space.name: torch.from_numpy(outer)}
    for child, (_, perms) in inner.items():
        result[child.name] = torch.from_numpy(perms[np.arange(space.size), outer])
    return result


def _solve_pairs(readings: _Readings, child: Space, heads: int, maximize: bool, free: bool) -> tuple[Array, Array]:
    """The inner problem for every pair of parent blocks: optima (h, h) and permutations (h, h, d)."""
    scores = readings.block_scores(child, heads)
    values, perms = np.zeros((heads, heads)), np.zeros((heads, heads, child.size), dtype=np.int64)
    rows = np.arange(child.size)
    for i, j in np.ndindex(heads, heads):
        perms[i, j] = assign(scores[i, j], maximize=maximize) if free else rows
        values[i, j] = scores[i, j][rows, perms[i, j]].sum()
    return values, perms
