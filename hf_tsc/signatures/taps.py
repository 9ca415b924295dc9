"""Where activations are read: around the layers that read or make a space."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from operator import mul

from torch import nn

from hf_tsc.axes import Axis, Concat, Frozen, Product, atoms, is_frozen
from hf_tsc.errors import UsageError
from hf_tsc.layers import LAYERS
from hf_tsc.permutation import PROJECTIONS, Tap
from hf_tsc.signatures.patterns import closest, matches_of

WRITTEN = "frozen in the registered spec"


def taps_of(places: Mapping[str, Tap], untapped: Collection[str]) -> tuple[Tap, ...]:
    """The inputs of all layers that read a space; where none reads it, the outputs of those that make it."""
    left_out: set[str] = set()
    for pattern in untapped:
        if not (matches := matches_of(pattern, places)):
            raise UsageError(f'untapped: "{pattern}" is the input or output of no layer{closest(pattern, places)}')
        left_out |= matches.keys()
    taps = [tap for place, tap in places.items() if place not in left_out]
    reads = [tap for tap in taps if tap.side == "input" and not is_frozen(tap.axis)]
    read = {atom.space for tap in reads for atom in atoms(tap.axis)}
    return (*reads, *(tap for tap in taps if tap.side != "input" and {a.space for a in atoms(tap.axis)} - read))


def places_of(
    model: nn.Module, first_names: Mapping[str, str], axes: Mapping[str, tuple[Axis, ...]]
) -> dict[str, Tap]:
    """Where hooks can read, e.g. `input of fc1`: around all layers, and the projections in `nn.MultiheadAttention`."""

    def weight(path: str, name: str) -> tuple[Axis, ...]:
        return axes.get(first_names.get(f"{path}.{name}".removeprefix("."), ""), ())

    taps: list[Tap] = []
    uncalled: set[str] = set()  # MultiheadAttention uses the weight of this layer without calling it
    for path, module in model.named_modules():
        row = next((row for kind, row in LAYERS.items() if isinstance(module, kind)), None)
        if isinstance(module, nn.MultiheadAttention):
            uncalled.add(f"{path}.out_proj".removeprefix("."))
            thirds = _thirds(weight(path, "in_proj_weight")[:1])
            taps += [Tap(path, side, -1, axis) for side, axis in zip(PROJECTIONS, thirds, strict=False)]
        elif row is not None and path not in uncalled and weight(path, "weight"):
            whole, part = weight(path, "weight")[:2]
            units = ([whole], _all_groups(whole, part, getattr(module, "groups", 1)))
            taps += [Tap(path, "input", row.dim, axis) for axis in units[row.input]]
            taps += [Tap(path, "output", row.dim, axis) for axis in units[row.output]]
    return {f"{tap.side} of {tap.module}": tap for tap in taps}


def _thirds(rows: Sequence[Axis]) -> Sequence[Axis]:
    """The rows of q, k and v in a packed projection, nothing where they cannot be told apart."""
    for axis in rows:
        if isinstance(axis, Concat) and [part.size for part in axis.parts] == [axis.size // 3] * 3:
            return axis.parts
        if isinstance(axis, Product) and axis.factors[0] == Frozen(3):
            return 3 * [_product(axis.factors[1:])]
    return []


def _all_groups(whole: Axis, part: Axis, groups: int) -> list[Axis]:
    """The units of all groups of a convolution, nothing where they cannot be told.

    Axis 0 of its weight (`whole`) has the channels of all groups, axis 1 those of one (`part`): all of these are the
    product of the group, which is what `whole` begins with, and `part`.
    """
    if groups == 1:
        return [part]
    factors = whole.factors if isinstance(whole, Product) else (whole,)
    ends = list(accumulate((factor.size for factor in factors), mul))
    if groups in ends:
        group = factors[: ends.index(groups) + 1]
    elif is_frozen(whole):
        group = (Frozen(groups, WRITTEN),)
    else:
        return []
    return [_product([*group, *(part.factors if isinstance(part, Product) else [part])])]


def _product(factors: Sequence[Axis]) -> Axis:
    """The product of the factors that are longer than 1."""
    kept = tuple(factor for factor in factors if factor.size > 1)
    return kept[0] if len(kept) == 1 else Product(kept)
