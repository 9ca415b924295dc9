"""What a tensor axis is made of: atoms, products, concatenations, frozen stretches; and the index vectors of it all.

An axis of size n is a small tree. Written out, in the notation of einops where there is one:

    hidden              the units of one space
    (heads vo@heads)    a row-major product; `@heads` says that every head has a permutation of its own
    a + b               a concatenation
    (_4 stream)         four copies of the stream, in fixed order
    _3                  three positions that must not move

Conventions. A permutation of a space of size n is an int64 tensor `p` of shape (n,), and acts as `out[i] = in[p[i]]`.
For a space nested in a parent of size m it has shape (m, n): row i belongs to the *new* block i, so that
`out[i, j] = in[parent[i], p[i, j]]` (an element of the wreath product of the two symmetric groups).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

Permutation = Mapping[str, Tensor]


@dataclass(frozen=True)
class Frozen:
    """`size` positions that keep their places; `reason` says why."""

    size: int
    reason: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"_{self.size}"


@dataclass(frozen=True)
class Atom:
    """All units of the space named `space`; `parent` names the space whose blocks it is nested in, if any."""

    space: str
    size: int
    parent: str | None = None

    def __str__(self) -> str:
        return f"{self.space}@{self.parent}" if self.parent else self.space


@dataclass(frozen=True)
class Product:
    """Row-major product: index = ((i0 * n1) + i1) * n2 + ..."""

    factors: tuple[Axis, ...]

    @property
    def size(self) -> int:
        return prod(factor.size for factor in self.factors)

    def __str__(self) -> str:
        return "(" + " ".join(str(f) if not isinstance(f, Concat) else f"({f})" for f in self.factors) + ")"


@dataclass(frozen=True)
class Concat:
    """One part after the other."""

    parts: tuple[Axis, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def __str__(self) -> str:
        return " + ".join(str(part) for part in self.parts)


Axis = Frozen | Atom | Product | Concat


def atoms(axis: Axis) -> Iterator[Atom]:
    """All atoms of an axis, from left to right, with repetitions."""
    if isinstance(axis, Atom):
        yield axis
    elif isinstance(axis, Product | Concat):
        for child in axis.factors if isinstance(axis, Product) else axis.parts:
            yield from atoms(child)


def is_frozen(axis: Axis) -> bool:
    """Whether no part of the axis can move."""
    return next(atoms(axis), None) is None


def index(axis: Axis, permutation: Permutation) -> Tensor:
    """The index vector of an axis under a permutation of its spaces.

    Args:
        axis: the tree of an axis of size n.
        permutation: space name -> (size,) or, for a nested space, (parent size, size).

    Returns:
        int64 (n,): the axis moves as `out[i] = in[index[i]]`.

    Raises:
        ValueError: an inner space stands outside its parent.
    """
    return _index(axis, permutation, (), ())


def _index(axis: Axis, permutation: Permutation, names: tuple[str, ...], sizes: tuple[int, ...]) -> Tensor:
    """Index vectors of `axis` for every combination of the enclosing blocks `names`: (*sizes, axis.size)."""
    if isinstance(axis, Frozen):
        return torch.arange(axis.size).expand(*sizes, axis.size)
    if isinstance(axis, Atom):
        return _atom_index(axis, permutation, names, sizes)
    if isinstance(axis, Concat):
        offset, pieces = 0, []
        for part in axis.parts:
            pieces.append(_index(part, permutation, names, sizes) + offset)
            offset += part.size
        return torch.cat(pieces, dim=-1)
    first, rest = axis.factors[0], axis.factors[1:]
    outer = _index(first, permutation, names, sizes)  # (*sizes, n0)
    if not rest:
        return outer
    name = first.space if isinstance(first, Atom) else ""
    inner = _index(Product(rest), permutation, (*names, name), (*sizes, first.size))  # (*sizes, n0, n1...)
    return (outer.unsqueeze(-1) * inner.shape[-1] + inner).flatten(-2)


def _atom_index(atom: Atom, permutation: Permutation, names: tuple[str, ...], sizes: tuple[int, ...]) -> Tensor:
    perm = permutation[atom.space]
    if atom.parent is None:
        return perm.expand(*sizes, atom.size)
    if atom.parent not in names:
        raise ValueError(f"space {atom.space!r} is nested in {atom.parent!r} but stands outside of it")
    where = names.index(atom.parent)
    shape = [1] * len(sizes) + [atom.size]
    shape[where] = sizes[where]
    return perm.reshape(shape).expand(*sizes, atom.size)


def positions(axis: Axis, space: str) -> list[Tensor]:
    """Where the units of a space lie along an axis: one tensor an occurrence.

    Args:
        axis: the tree of an axis of size n.
        space: the name of a space of size s.

    Returns:
        int64 tensors of shape (b, s): row r holds the positions of units 0..s-1 in the r-th enclosing block
        (b = 1 for a space in no product; for a space nested in heads, row r is head r).
    """
    return _positions(axis, space, torch.arange(axis.size).unsqueeze(0), {})


def _positions(axis: Axis, space: str, where: Tensor, blocks: Mapping[str, Tensor]) -> list[Tensor]:
    """`where`: (b, axis.size), the positions of this sub-axis in each of its b enclosing blocks; `blocks`: for every
    enclosing space (b,), the unit of it that each of them belongs to."""
    if all(atom.space != space for atom in atoms(axis)):
        return []
    if isinstance(axis, Atom):
        if axis.parent is None:
            return [where]
        unit = blocks[axis.parent]
        rows = where[unit.argsort(stable=True)].unflatten(0, (int(unit.max()) + 1, -1))  # (parent size, copies, s)
        return list(rows.unbind(1))
    if isinstance(axis, Concat):
        splits = where.split([part.size for part in axis.parts], dim=1)
        pairs = zip(axis.parts, splits, strict=True)
        return [found for part, piece in pairs for found in _positions(part, space, piece, blocks)]
    assert isinstance(axis, Product)
    first, rest = axis.factors[0], Product(axis.factors[1:])
    grid = where.unflatten(1, (first.size, rest.size))  # (b, n0, n_rest)
    inside = {name: unit.repeat_interleave(first.size) for name, unit in blocks.items()}
    if isinstance(first, Atom):
        inside[first.space] = torch.arange(first.size).repeat(where.shape[0])
    in_first = [f for k in range(rest.size) for f in _positions(first, space, grid[:, :, k], blocks)]
    return in_first + _positions(rest, space, grid.flatten(0, 1), inside)
