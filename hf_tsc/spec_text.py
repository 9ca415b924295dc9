"""A permutation spec in words: spaces with their taps, the axes of every tensor, and what is frozen and why."""

from __future__ import annotations

from collections import defaultdict

from hf_tsc.axes import Frozen, atoms
from hf_tsc.derive.verify import Verification
from hf_tsc.permutation import PermutationSpec


def describe_spec(spec: PermutationSpec, verification: Verification, architecture: str) -> str:
    """The spec as text for a terminal."""
    head = (
        f"{architecture}: {len(spec.spaces)} spaces; all moved at once, the output changes by {verification.error:.0e}"
    )
    parts = [head, "\nspaces (name, size, kind, read at)", *_spaces(spec), "\ntensors (axes)", *_tensors(spec)]
    if spec.unknown_ops:
        parts += ["\noperators without a rule, whose axes are frozen", *(f"  {name}" for name in spec.unknown_ops)]
    return "\n".join([*parts, "\nfrozen axes, by reason", *_frozen(spec)])


def _spaces(spec: PermutationSpec) -> list[str]:
    lines = []
    for space in spec.spaces.values():
        size = f"{spec.spaces[space.parent].size} x {space.size}" if space.parent else str(space.size)
        lines.append(
            f"  {space.name}  {size}  {space.kind}" + (f", one for each of {space.parent}" if space.parent else "")
        )
        for tap in spec.taps:
            if any(atom.space == space.name for atom in atoms(tap.axis)):
                lines.append(f"      {tap.side} of {tap.module}")
    return lines


def _tensors(spec: PermutationSpec) -> list[str]:
    width = max((len(name) for name in spec.axes), default=0)
    return [f"  {name:<{width}}  {' | '.join(str(axis) for axis in axes)}" for name, axes in spec.axes.items() if axes]


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
