"""Matching a network with itself or another one, in as many passes over the images as memory asks for.

The matrices of all taps together take gigabytes for a large model (docs/matching.json). Spaces that share no tap can
be matched one after the other, each with a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from hf_tsc.activations import Batch, collect_statistics, matrix_bytes
from hf_tsc.axes import atoms
from hf_tsc.matching import match, outer_spaces
from hf_tsc.permutation import KINDS, Kind, Params, PermutationSpec, identity


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
    groups = [restrict(spec, group) for group in _groups(spec)]
    movable = [part for part in groups if part.taps and any(s.kind in kinds for s in part.spaces.values())]
    movable.sort(key=lambda part: matrix_bytes(part.taps), reverse=True)  # large ones first: fewer parts
    packed: list[list[PermutationSpec]] = []
    for part in movable:
        for others in packed:
            if limit is None or sum(matrix_bytes(one.taps) for one in (*others, part)) <= limit:
                others.append(part)
                break
        else:
            packed.append([part])
    return [restrict(spec, {name for part in together for name in part.spaces}) for together in packed]


def _groups(spec: PermutationSpec) -> list[set[str]]:
    """The names of spaces that share a tap or are nested in each other, directly or by way of others."""
    groups = [{space.name, *(child.name for child in spec.children(space.name))} for space in outer_spaces(spec)]
    for tap in spec.taps:
        found = {atom.space for atom in atoms(tap.axis)}
        joined: set[str] = set().union(*(group for group in groups if group & found))
        groups = [group for group in groups if not group & found] + ([joined] if joined else [])
    return groups


def restrict(spec: PermutationSpec, names: Collection[str]) -> PermutationSpec:
    """Some of the spaces, and what of the taps concerns them; no tensors."""
    taps = tuple(tap for tap in spec.taps if any(atom.space in names for atom in atoms(tap.axis)))
    return PermutationSpec({name: space for name, space in spec.spaces.items() if name in names}, {}, taps)
