"""From activation statistics to a permutation, by linear assignment.

    un-align:  argmax_P sum |x - P x|^2        = argmin_P of the summed inner products of x with itself
    align:     argmin_P sum |x(a) - P x(b)|^2  = argmax_P of the summed inner products of x(a) with x(b)

(hf.co/papers/2506.07467, section 4; assignment as in Git Re-Basin, hf.co/papers/2209.04836.) With out[i] =
in[perm[i]], row i of a similarity matrix is assigned to column perm[i]. Heads are matched as blocks: the inner
problems are solved for every pair of heads, and their optima are the similarities of the outer one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_tsc.activations import Batch, TapStatistics, collect_statistics, matrix_bytes
from hf_tsc.assignment import Array, assign
from hf_tsc.axes import atoms, positions
from hf_tsc.permutation import KINDS, Kind, Params, PermutationSpec, Space, identity

THREADS = 4  # more would wait for SciPy's solver, which holds the interpreter's lock
SILENT_SECONDS = 5.0  # no progress bar before


def match_networks(
    model: nn.Module,
    spec: PermutationSpec,
    batches: Callable[[], Iterable[Batch]],
    *,
    points: Sequence[Params],
    maximize: bool,
    method: str = "l2",
    kinds: Collection[Kind] = KINDS,
    max_positions: int | None = None,
    seed: int = 0,
    memory_limit: int | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Collect the statistics of the spaces that may move, and match: in several passes where memory is short.

    Args:
        model, points, max_positions, seed: as in `collect_statistics`.
        spec: the model's spec.
        batches: gives the same model inputs at every call; it is called once a pass.
        maximize, method, kinds, workers, progress: as in `match`.
        memory_limit: bytes of matrices, and of activations of the first of two networks, that may be held at once.

    Returns:
        A permutation of every space.

    Raises:
        PurificationError: a tap was not read.
        UsageError: the taps of one space alone take more than `memory_limit`.
    """
    # of two networks, as much again for the activations
    matrices = None if memory_limit is None else memory_limit // len(points)
    result = identity(spec)
    for part in parts(spec, kinds, matrices):
        reading: dict[str, Any] = {"max_positions": max_positions, "seed": seed, "memory_limit": memory_limit}
        statistics = collect_statistics(model, part.taps, batches(), points=points, **reading)
        solving: dict[str, Any] = {"method": method, "kinds": kinds, "workers": workers, "progress": progress}
        result |= match(part, statistics, maximize=maximize, **solving)
    return result


def parts(spec: PermutationSpec, kinds: Collection[Kind], limit: int | None = None) -> list[PermutationSpec]:
    """Cut a spec into parts that can be matched one after the other: spaces and taps, without tensors.

    Spaces that share a tap or are nested in each other stay together. Left out is what cannot move.

    Args:
        spec: the spec.
        kinds: the kinds of spaces that may move.
        limit: bytes of matrices in a part; exceeded only by what has to stay together.
    """
    whole = [_part(spec, group) for group in _groups(spec)]
    movable = [part for part in whole if part.taps and any(s.kind in kinds for s in part.spaces.values())]
    packed: list[list[PermutationSpec]] = []
    for part in sorted(
        movable, key=lambda part: matrix_bytes(part.taps), reverse=True
    ):  # large ones first: few passes
        for others in packed:
            if limit is None or sum(matrix_bytes(one.taps) for one in (*others, part)) <= limit:
                others.append(part)
                break
        else:
            packed.append([part])
    return [_part(spec, {name for part in together for name in part.spaces}) for together in packed]


def _groups(spec: PermutationSpec) -> list[set[str]]:
    """The names of spaces that share a tap or are nested in each other, directly or by way of others."""
    groups = [{space.name, *(child.name for child in spec.children(space.name))} for space in _outer(spec)]
    for tap in spec.taps:
        found = {atom.space for atom in atoms(tap.axis)}
        joined: set[str] = set().union(*(group for group in groups if group & found))
        groups = [group for group in groups if not group & found] + ([joined] if joined else [])
    return groups


def _part(spec: PermutationSpec, names: Collection[str]) -> PermutationSpec:
    taps = tuple(tap for tap in spec.taps if any(atom.space in names for atom in atoms(tap.axis)))
    return PermutationSpec({name: space for name, space in spec.spaces.items() if name in names}, {}, taps)


def _outer(spec: PermutationSpec) -> list[Space]:
    """The spaces that are nested in none."""
    return [space for space in spec.spaces.values() if space.parent is None]


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
    """Solve the assignment problem of every space.

    Args:
        spec: the spec whose `taps` the statistics were collected at.
        statistics: one a tap, in the order of `spec.taps`.
        maximize: True aligns network b to network a (apply the result to b); False un-aligns.
        method: `l2` or `correlation`.
        kinds: the kinds of spaces that may move; the others get the identity.
        workers: threads, each for one space at a time and with three matrices of it; by default as many as torch uses,
            and at most 4. The result is the same whatever their number.
        progress: show a bar when it takes long.

    Returns:
        A permutation of every space.
    """
    readings = _Readings(spec, statistics, method)

    def solve(space: Space) -> dict[str, Tensor]:
        if spec.children(space.name):
            return _solve_nested(spec, space, readings, maximize, set(kinds))
        if space.kind not in kinds:
            return {}
        return {space.name: torch.from_numpy(assign(readings.score(space), maximize=maximize))}

    result = identity(spec)
    spaces = sorted(_outer(spec), key=lambda space: space.size, reverse=True)  # no thread is left with a long one
    threads = max(1, min(workers or min(torch.get_num_threads(), THREADS), len(spaces)))
    # one thread for each product: a second one that has to wait for a processor holds up the first
    with (
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(threads) as pool,
        closing(pool.map(solve, spaces)) as solved,
    ):
        for found in tqdm(solved, "Matching", len(spaces), unit=" spaces", delay=SILENT_SECONDS, disable=not progress):
            result |= found
    return result


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
