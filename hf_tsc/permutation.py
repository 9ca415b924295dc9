"""PermutationSpec: which spaces of a network act on which axes of its tensors, and the group they form.

A *space* is a set of interchangeable units (the channels of a residual stream, the hidden units of an MLP, the heads
of an attention, the dimensions inside a head). A permutation assigns to every space a reordering; applied to all axes
at once it leaves the function of the network unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_tsc.axes import Atom, Axis, Frozen, Permutation, atoms, index, is_frozen

Params = dict[str, Tensor]
Kind = Literal["residual", "hidden", "heads", "qk", "vo"]
Side = Literal["input", "output", "query", "key", "value"]
PROJECTIONS: tuple[Side, ...] = ("query", "key", "value")
KINDS: tuple[Kind, ...] = ("residual", "hidden", "heads", "qk", "vo")


@dataclass(frozen=True)
class Space:
    """Interchangeable units.

    Attributes:
        name: unique, made of the common module path and the kind.
        size: number of units (inside one block of the parent, for a nested space).
        kind: `residual` stream, `hidden` units of an MLP or convolution, attention `heads`, and inside a head the
            query/key (`qk`) and value/output (`vo`) dimensions.
        parent: the space in whose blocks this one is nested: every block has its own permutation.
    """

    name: str
    size: int
    kind: Kind
    parent: str | None = None


@dataclass(frozen=True)
class Tap:
    """Where activations are read: axis `dim` (from the end when negative) of a module's first input or output.

    For an `nn.MultiheadAttention`, whose layers call no hooks, `query`, `key` and `value` are its projections.
    """

    module: str
    side: Side
    dim: int
    axis: Axis

    def __str__(self) -> str:
        return f"{self.side} of {self.module}, axis {self.dim}: {self.axis}"


@dataclass(frozen=True)
class PermutationSpec:
    """The permutation symmetry of one network.

    Attributes:
        spaces: name -> `Space`.
        axes: tensor name (as in `named_parameters` and `named_buffers`) -> one `Axis` a dimension. Every floating
            parameter is listed; an axis that cannot move is a `Frozen` with its reason.
        taps: where each space's activations are read.
        unknown_ops: operators without a rule (the axes they touch are frozen).
        casts: whether the network casts activations to float32 or less inside, whatever its own type.
    """

    spaces: dict[str, Space]
    axes: dict[str, tuple[Axis, ...]]
    taps: tuple[Tap, ...]
    unknown_ops: tuple[str, ...] = ()
    casts: bool = False

    def __post_init__(self) -> None:
        for name, tensor_axes in self.axes.items():
            for dim, axis in enumerate(tensor_axes):
                _check_axis(f"axis {dim} of {name}", axis, self.spaces)
        for tap in self.taps:
            _check_axis(f"the tap at {tap.module}", tap.axis, self.spaces)

    def children(self, space: str) -> list[Space]:
        """The spaces nested in `space`."""
        return [child for child in self.spaces.values() if child.parent == space]

    def members(self, space: str) -> Iterator[tuple[str, int]]:
        """All (tensor name, dim) on which a space acts."""
        for name, tensor_axes in self.axes.items():
            for dim, axis in enumerate(tensor_axes):
                if any(atom.space == space for atom in atoms(axis)):
                    yield name, dim

    def moved(self) -> Iterator[tuple[str, int]]:
        """All (tensor name, dim) on which some space acts."""
        for name, tensor_axes in self.axes.items():
            for dim, axis in enumerate(tensor_axes):
                if not is_frozen(axis):
                    yield name, dim

    def shape(self, space: str) -> tuple[int, ...]:
        """Shape of the permutation of a space: (size,), or (parent size, size) when nested."""
        entry = self.spaces[space]
        return (self.spaces[entry.parent].size, entry.size) if entry.parent else (entry.size,)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {
            "spaces": {
                s.name: {
                    "size": s.size,
                    "kind": s.kind,
                    "parent": s.parent,
                    "taps": [str(tap) for tap in self.taps if any(a.space == s.name for a in atoms(tap.axis))],
                }
                for s in self.spaces.values()
            },
            "tensors": {
                name: [
                    {"axis": str(a), "size": a.size, **({"frozen": a.reason} if isinstance(a, Frozen) else {})}
                    for a in ax
                ]
                for name, ax in self.axes.items()
            },
            "unknown_ops": list(self.unknown_ops),
            "casts": self.casts,
        }


def _check_axis(where: str, axis: Axis, spaces: Mapping[str, Space]) -> None:
    for atom in atoms(axis):
        space = spaces.get(atom.space)
        if space is None:
            raise ValueError(f"{where} names the space {atom.space!r}, which is not declared")
        if (space.size, space.parent) != (atom.size, atom.parent):
            raise ValueError(f"{where} has {atom} of size {atom.size}, but the space is declared as {space}")
    index(axis, _Identity(spaces))


class _Identity(dict[str, Tensor]):
    """The identity permutation, made on demand; indexing with it checks that nested atoms stand in their parents."""

    def __init__(self, spaces: Mapping[str, Space]):
        super().__init__()
        self.spaces = spaces

    def __missing__(self, name: str) -> Tensor:
        space = self.spaces[name]
        eye = torch.arange(space.size)
        self[name] = eye if space.parent is None else eye.expand(self.spaces[space.parent].size, -1)
        return self[name]


def identity(spec: PermutationSpec) -> dict[str, Tensor]:
    """The permutation that moves nothing."""
    made = _Identity(spec.spaces)
    return {name: made[name].clone() for name in spec.spaces}


def roll(spec: PermutationSpec) -> dict[str, Tensor]:
    """No fixed points and (for sizes above 2) not its own inverse; every block of a nested space rolls differently."""
    result = {}
    for name, eye in identity(spec).items():
        shifts = range(1, eye.shape[0] + 1) if eye.ndim == 2 else [1]
        rows = [
            row.roll(s % max(row.numel(), 1) or 1) for row, s in zip(eye.view(-1, eye.shape[-1]), shifts, strict=True)
        ]
        result[name] = torch.stack(rows).view(eye.shape)
    return result


def apply(params: Mapping[str, Tensor], spec: PermutationSpec, permutation: Permutation) -> Params:
    """π(θ, P): every axis permuted as `out[i] = in[index[i]]`; tensors that the spec does not list are passed through.

    Args:
        params: tensor name -> tensor. Not written to.
        spec: the network's spec.
        permutation: one entry for every space of the spec.

    Raises:
        ValueError: a tensor's shape differs from the spec's, or a space has no permutation.
    """
    _check_permutation(spec, permutation)
    cache: dict[Axis, Tensor] = {}
    result: Params = {}
    for name, tensor in params.items():
        tensor_axes = spec.axes.get(name, ())
        if name in spec.axes and tuple(a.size for a in tensor_axes) != tuple(tensor.shape):
            expected = tuple(a.size for a in tensor_axes)
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the spec was made for {expected}")
        for dim, axis in enumerate(tensor_axes):
            if not is_frozen(axis):
                if axis not in cache:
                    cache[axis] = index(axis, permutation)
                tensor = tensor.index_select(dim, cache[axis].to(tensor.device))
        result[name] = tensor
    return result


def _check_permutation(spec: PermutationSpec, permutation: Permutation) -> None:
    for name in spec.spaces:
        if name not in permutation:
            raise ValueError(
                f"the permutation has no entry for the space {name!r}; give one for every space of the spec"
            )
        if tuple(permutation[name].shape) != spec.shape(name):
            raise ValueError(f"{name}: shape {tuple(permutation[name].shape)} given, {spec.shape(name)} expected")


def compose(spec: PermutationSpec, first: Permutation, second: Permutation) -> dict[str, Tensor]:
    """First `first`, then `second`: apply(apply(x, first), second) = apply(x, compose(first, second))."""
    result = {}
    for name, space in spec.spaces.items():
        if space.parent is None:
            result[name] = first[name][second[name]]
        else:
            moved = first[name][second[space.parent]]  # row i: the block that `second` puts at place i
            result[name] = moved.gather(1, second[name])
    return result


def invert(spec: PermutationSpec, permutation: Permutation) -> dict[str, Tensor]:
    """The permutation that undoes: compose(p, invert(p)) is the identity."""
    result = {}
    for name, space in spec.spaces.items():
        inverse = permutation[name].argsort(dim=-1)
        result[name] = inverse if space.parent is None else inverse[permutation[space.parent].argsort()]
    return result


def moved_fraction(permutation: Permutation) -> dict[str, float]:
    """Share of units that leave their place, a space."""
    return {name: (perm != torch.arange(perm.shape[-1])).double().mean().item() for name, perm in permutation.items()}


__all__ = [
    "KINDS",
    "Atom",
    "Kind",
    "Params",
    "PermutationSpec",
    "Space",
    "Tap",
    "apply",
    "compose",
    "identity",
    "invert",
]
