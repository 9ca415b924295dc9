"""A permutation spec in words: spaces with their taps, the axes of every tensor, and what is frozen and why."""

from __future__ import annotations

from collections import defaultdict

from hf_tsc.axes import Atom, Axis, Concat, Frozen, Product, atoms
from hf_tsc.derive.verify import Verification
from hf_tsc.permutation import PermutationSpec

LEGEND = (
    "in the axes: `a b` a product, `a + b` a concatenation, `_n` n frozen positions,\n"
    "`x@y` a permutation of x for each unit of y; a space is named from where its path leaves that of the tensor"
)


def describe_spec(spec: PermutationSpec, verification: Verification, architecture: str) -> str:
    """The spec as text for a terminal."""
    count, error = len(spec.spaces), verification.error
    head = f"{architecture}: {count} spaces; all moved at once, the output changes by {error:.0e} (relative)"
    parts = [head, "\nspaces (name, size, kind, read at)", *_spaces(spec), "\ntensors (axes)", *_tensors(spec), LEGEND]
    if spec.unknown_ops:
        parts += ["\noperators without a rule, whose axes are frozen", *(f"  {name}" for name in spec.unknown_ops)]
    return "\n".join([*parts, "\nfrozen axes, by reason", *_frozen(spec)])


def _spaces(spec: PermutationSpec) -> list[str]:
    lines = []
    for space in spec.spaces.values():
        size = f"{spec.spaces[space.parent].size} x {space.size}" if space.parent else str(space.size)
        nested = ", one permutation a head" if space.parent else ""
        lines.append(f"  {space.name}  {size}  {space.kind}{nested}")
        for tap in spec.taps:
            if any(atom.space == space.name for atom in atoms(tap.axis)):
                lines.append(f"      {tap.side} of {tap.module}")
    return lines


def _tensors(spec: PermutationSpec) -> list[str]:
    width = max((len(name) for name in spec.axes), default=0)
    return [
        f"  {name:<{width}}  {' | '.join(_text(axis, name) for axis in axes)}"
        for name, axes in spec.axes.items()
        if axes
    ]


def _text(axis: Axis, tensor: str) -> str:
    """The axis as `str(axis)` writes it, with the names of spaces relative to the tensor's module."""
    if isinstance(axis, Atom):
        own = _relative(axis.space, tensor)
        return f"{own}@{_relative(axis.parent, axis.space)}" if axis.parent else own
    if isinstance(axis, Product):
        return "(" + " ".join(_text(f, tensor) for f in axis.factors) + ")"
    if isinstance(axis, Concat):
        return "(" + " + ".join(_text(p, tensor) for p in axis.parts) + ")"
    return str(axis)


def _relative(space: str, other: str) -> str:
    own, path = space.split("."), other.split(".")
    shared = next((i for i, (a, b) in enumerate(zip(own, path, strict=False)) if a != b), min(len(own), len(path)))
    return ".".join(own[min(shared, len(own) - 1) :])


def _frozen(spec: PermutationSpec) -> list[str]:
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, axes in spec.axes.items():
        for dim, axis in enumerate(axes):
            if isinstance(axis, Frozen) and axis.size > 1:
                reasons[axis.reason].append(f"{name} axis {dim}")
    lines = []
    for reason, places in reasons.items():
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        lines.append(f"  {reason}: {', '.join(places[:3])}{more}")
    return lines or ["  none"]
