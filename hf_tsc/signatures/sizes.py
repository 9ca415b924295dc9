"""Solving for the sizes of spaces from the lengths of the axes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from hf_tsc.axes import Atom, Axis, Frozen, Product
from hf_tsc.errors import UsageError
from hf_tsc.signatures.notation import Description, Group, Leaf, leaves_of
from hf_tsc.signatures.taps import WRITTEN


@dataclass(frozen=True)
class Written:
    """What stands for axis `dim`, of length `size`, of a tensor; names in the description are full."""

    tensor: str
    dim: int
    size: int
    text: str
    description: Description

    def __str__(self) -> str:
        return f"axis {self.dim} of {self.tensor}"

    def open_spaces(self, sizes: Mapping[str, int]) -> list[str]:
        names = [leaf.space for leaf in leaves_of(self.description) if leaf.space and leaf.space not in sizes]
        return list(dict.fromkeys(names))

    def open_positions(self) -> int:
        """How many `_` without a number there are."""
        return sum(leaf == Leaf("") for leaf in leaves_of(self.description))


class Sizes:
    """The sizes of all spaces, solved from the lengths of the axes, and where each was found."""

    def __init__(self, written: Sequence[Written]):
        self.known: dict[str, int] = {}
        self.origins: dict[str, Written] = {}
        for axis in written:
            for leaf in leaves_of(axis.description):
                if leaf.space and leaf.size is not None:
                    self._state(leaf.space, leaf.size, axis)
        while pairs := [(axis, names[0]) for axis in written if len(names := self._unknowns(axis)) == 1]:
            for axis, name in pairs:
                if name not in self.known:
                    self._state(name, self._fit(axis, name), axis)
        for axis in written:
            if names := axis.open_spaces(self.known):
                raise UsageError(
                    f'the size of {" and of ".join(names)} is open: {axis}, "{axis.text}", has {axis.size} positions '
                    f'in all; write a size at one place, as in "{names[0]}:N"'
                )

    def axis(self, written: Written) -> Axis:
        """The axis in its final form.

        Raises:
            UsageError: its length is not that of the tensor.
        """
        if written.open_positions() > 1:
            raise UsageError(f'{written}, "{written.text}", has several "_": write their lengths, as in "_3"')
        sizes = self.known | ({"": self._fit(written, "")} if written.open_positions() else {})
        if (made := _length(written.description, sizes)) != written.size:
            raise UsageError(
                f'{written} has {written.size} positions, "{written.text}" makes {made} of them{self._why(written)}'
            )
        return _built(written.description, sizes)

    def _unknowns(self, axis: Written) -> list[str]:
        """The spaces that this axis can give the size of, once there is only one."""
        return [] if axis.open_positions() else axis.open_spaces(self.known)

    def _state(self, space: str, size: int, axis: Written) -> None:
        if self.known.setdefault(space, size) != size:
            raise UsageError(f"{axis} states {space}:{size}, {self.origins[space]} {space}:{self.known[space]}")
        self.origins.setdefault(space, axis)

    def _fit(self, axis: Written, unknown: str) -> int:
        """The size of one space, or of `_` (""), that gives the axis its length; the length grows with the size."""

        def length(size: int) -> int:
            return _length(axis.description, {**self.known, unknown: size})

        size = 1 + bisect_left(range(1, axis.size + 1), axis.size, key=length)
        if length(size) != axis.size:
            what = f'no size of "{unknown or "_"}" makes "{axis.text}" that long'
            raise UsageError(f"{axis} has {axis.size} positions, and {what}{self._why(axis)}")
        return size

    def _why(self, axis: Written) -> str:
        """The known sizes that an axis rests on, with the places they come from."""
        names = dict.fromkeys(leaf.space for leaf in leaves_of(axis.description) if leaf.space in self.known)
        known = [f"{name} = {self.known[name]} by {self.origins[name]}" for name in names]
        return f" ({', '.join(known)})" if known else ""


def _length(node: Description, sizes: Mapping[str, int]) -> int:
    """The length of an axis; `sizes[""]` is that of an open `_`."""
    if isinstance(node, Leaf):
        return node.size if not node.space and node.size is not None else sizes[node.space]
    lengths = [_length(child, sizes) for child in node.children]
    return prod(lengths) if node.join is Product else sum(lengths)


def _built(node: Description, sizes: Mapping[str, int]) -> Axis:
    if isinstance(node, Group):
        return node.join(tuple(_built(child, sizes) for child in node.children))
    size = _length(node, sizes)
    if not node.space or size == 1:
        return Frozen(size, WRITTEN if not node.space else "size 1")
    # what is nested in one block only is not nested
    return Atom(node.space, size, node.parent if node.parent and sizes[node.parent] > 1 else None)
