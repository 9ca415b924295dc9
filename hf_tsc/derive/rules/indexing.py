"""Operators that take tensors apart or pick positions."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node as GraphNode

from hf_tsc.derive.rules.base import Trace, argument, output_shape, rule
from hf_tsc.derive.trees import Tree, choose, cut, freeze, frozen, take_apart, unify


@rule("split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split", "tensor_split")
def split(trace: Trace, node: GraphNode) -> list[list[Tree]]:
    axes = trace.value(node.args[0]).axes
    dim = int(argument(node, 2, "dim", 0)) % len(axes)
    sizes = [int(v.shape[dim]) for v in node.meta["val"]]
    if all(size == 1 for size in sizes):
        single = frozen(1, "size 1")
        apart = [_at(axes, dim, position) for position in range(len(sizes))]
        return [[*others[:dim], single, *others[dim:]] for others in apart]
    return [[*axes[:dim], piece, *axes[dim + 1 :]] for piece in cut(axes[dim], sizes)]


@rule("unbind")
def unbind(trace: Trace, node: GraphNode) -> list[list[Tree]]:
    axes = trace.value(node.args[0]).axes
    dim = int(argument(node, 1, "dim", 0)) % len(axes)
    return [_at(axes, dim, position) for position in range(len(node.meta["val"]))]


@rule("select")
def select(trace: Trace, node: GraphNode) -> list[Tree]:
    axes = trace.value(node.args[0]).axes
    dim = int(node.args[1]) % len(axes)  # type: ignore[arg-type]
    return _at(axes, dim, int(node.args[2]) % axes[dim].size)  # type: ignore[arg-type]


def _at(axes: Sequence[Tree], dim: int, position: int) -> list[Tree]:
    """The other axes at one position of the axis `dim`."""
    take_apart(axes[dim], "taken apart by index")
    return [choose(axis, axes[dim], position) for d, axis in enumerate(axes) if d != dim]


@rule("slice", "narrow")
def slice_(trace: Trace, node: GraphNode) -> list[Tree]:
    axes, shape = list(trace.value(node.args[0]).axes), output_shape(node)
    dim = int(argument(node, 1, "dim", 0)) % len(axes)
    full = axes[dim].size
    if shape[dim] == full:
        return axes
    start = min(max(s + full if (s := int(argument(node, 2, "start", 0) or 0)) < 0 else s, 0), full)
    if argument(node, 4, "step", 1) != 1:
        freeze(axes[dim], "strided slice")
        axes[dim] = frozen(shape[dim], "strided slice")
        return axes
    if shape[dim] == 0:
        axes[dim] = frozen(0, "empty")
        return axes
    sizes = [start, shape[dim], full - start - shape[dim]]
    pieces = cut(axes[dim], [s for s in sizes if s])
    axes[dim] = pieces[1 if start else 0]
    return axes


@rule("unfold")
def sliding_windows(trace: Trace, node: GraphNode) -> list[Tree]:
    """Windows of one axis; the positions in a window become the last axis."""
    axes, shape = list(trace.value(node.args[0]).axes), output_shape(node)
    dim = int(node.args[1]) % len(axes)  # type: ignore[arg-type]
    freeze(axes[dim], "windows of it are taken")
    axes[dim] = frozen(shape[dim], "order of windows")
    return [*axes, frozen(shape[-1], "position in a window")]


@rule("index")
def advanced_index(trace: Trace, node: GraphNode) -> list[Tree]:
    axes, picks = trace.value(node.args[0]).axes, list(node.args[1])  # type: ignore[arg-type]
    indexed = [d for d, pick in enumerate(picks) if pick is not None]
    for d in indexed:
        freeze(axes[d], "looked up by index")
    kept = [axis for d, axis in enumerate(axes) if d not in indexed]
    count = len(output_shape(node)) - len(kept)
    contiguous = indexed == list(range(indexed[0], indexed[-1] + 1))
    where = indexed[0] if contiguous else 0
    new = [frozen(size, "picked positions") for size in output_shape(node)[where : where + count]]
    return [*kept[:where], *new, *kept[where:]]


@rule("index_select", "gather")
def gather(trace: Trace, node: GraphNode) -> list[Tree]:
    """Positions of one axis are looked up; in `gather` the index is a tensor of the result's shape."""
    x, index = trace.value(node.args[0]), trace.value(node.args[2])
    dim = int(node.args[1]) % len(x.axes)  # type: ignore[arg-type]
    freeze(x.axes[dim], "looked up by index")
    if len(index.axes) == len(x.axes):
        for d, (axis, other) in enumerate(zip(x.axes, index.axes, strict=True)):
            if d != dim and axis.size == other.size:
                unify(axis, other)
            elif d != dim:
                freeze(axis, "looked up by index")
    picked = frozen(output_shape(node)[dim], "picked positions")
    kept = zip(x.axes, output_shape(node), strict=True)
    same = [axis if axis.size == size else frozen(size, "picked positions") for axis, size in kept]
    return [*same[:dim], picked, *same[dim + 1 :]]
