"""Operators that change the shape, the order of axes, or join tensors."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch.fx import Node as GraphNode

from hf_tsc.derive.rules.base import Trace, Value, argument, broadcast, output_shape, rule, unknown
from hf_tsc.derive.trees import Cat, Free, Node, Prod, Tree, factor, freeze, frozen, resolve


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "reshape_as", "view_as")
def reshape(trace: Trace, node: GraphNode) -> list[Tree]:
    return regroup(trace.value(node.args[0]).axes, output_shape(node))


def regroup(axes: Sequence[Tree], shape: Sequence[int]) -> list[Tree]:
    """Axes of a row-major reshape: the smallest groups of equal size are merged and factored anew."""
    sources = [a for a in axes if a.size != 1]
    result: list[Tree] = [frozen(1, "size 1") for _ in shape]
    targets = [i for i, size in enumerate(shape) if size != 1]
    while targets:
        group_in, group_out = [sources.pop(0)], [targets.pop(0)]
        while (n := prod(a.size for a in group_in)) != (m := prod(shape[i] for i in group_out)):
            if n < m:
                group_in.append(sources.pop(0))
            else:
                group_out.append(targets.pop(0))
        merged = group_in[0] if len(group_in) == 1 else Prod([_definite(axis) for axis in group_in])
        pieces = factor(merged, [shape[i] for i in group_out])
        for i, piece in zip(group_out, pieces, strict=True):
            result[i] = piece
    return result


def _definite(axis: Tree) -> Tree:
    """An expanded axis as one of its own, that it can be part of another: what it is follows from its use."""
    return Node(axis.size) if isinstance(axis, Free) else axis


@rule("transpose", "permute", "t", "movedim", "swapaxes", "numpy_T", "swapdims", "moveaxis", "mT")
def reorder(trace: Trace, node: GraphNode) -> list[Tree]:
    axes = trace.value(node.args[0]).axes
    probe = torch.empty([2 + d for d in range(len(axes))], device="meta")
    moved = node.target(probe, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return [axes[size - 2] for size in moved.shape]


@rule("expand", "expand_as")
def expand(trace: Trace, node: GraphNode) -> list[Tree]:
    axes, shape = trace.value(node.args[0]).axes, output_shape(node)
    padded: list[Tree] = [frozen(1, "size 1")] * (len(shape) - len(axes)) + list(axes)
    return [Free(size) if axis.size == 1 and size != 1 else axis for axis, size in zip(padded, shape, strict=True)]


@rule("repeat", "tile")
def repeat(trace: Trace, node: GraphNode) -> list[Tree]:
    axes, times = trace.value(node.args[0]).axes, list(node.args[1])  # type: ignore[arg-type]
    rank = max(len(axes), len(times))
    padded: list[Tree] = [frozen(1, "size 1")] * (rank - len(axes)) + list(axes)
    pairs = zip(padded, [1] * (rank - len(times)) + times, strict=True)
    return [_copies(axis, int(n)) for axis, n in pairs]


@rule("repeat_interleave")
def repeat_positions(trace: Trace, node: GraphNode) -> list[Tree]:
    """Every position of one axis the same number of times in a row."""
    times, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
    if not isinstance(times, int) or dim is None:
        return unknown(trace, node)  # type: ignore[return-value]
    axes = list(trace.value(node.args[0]).axes)
    single = axes[dim].size == 1
    axes[dim] = Free(times) if single else resolve(Prod([axes[dim], frozen(times, "order of copies")]))
    return axes


def _copies(axis: Tree, times: int) -> Tree:
    """An axis repeated as a whole; of a single position, an expanded one."""
    if times == 1:
        return axis
    return Free(times) if axis.size == 1 else resolve(Prod([frozen(times, "order of copies"), axis]))


@rule("cat")
def concatenate(trace: Trace, node: GraphNode) -> list[Tree]:
    from_nodes = [trace.value(n) for n in node.args[0]]  # type: ignore[union-attr]
    values = [v for v in from_nodes if prod(v.shape) > 0]
    dim = int(argument(node, 1, "dim", 0)) % len(values[0].axes)
    result = []
    for d in range(len(values[0].axes)):
        if d == dim:
            result.append(_joined([v.axes[d] for v in values]))
        else:
            result.extend(broadcast([Value((v.shape[d],), [v.axes[d]]) for v in values], 1))
    return result


def _joined(parts: list[Tree]) -> Tree:
    return resolve(Cat([frozen(1, "single position") if p.size == 1 else _definite(p) for p in parts]))


@rule("constant_pad_nd", "pad")
def pad(trace: Trace, node: GraphNode) -> list[Tree]:
    """Constants before and after an axis are joined to it; anything else there depends on its order.

    The widths are those before and after the last axis, then the one before it, and so on.
    """
    axes, widths = list(trace.value(node.args[0]).axes), list(node.args[1])  # type: ignore[arg-type]
    constant = "constant" in str(node.target) or argument(node, 2, "mode", "constant") == "constant"
    for k, (before, after) in enumerate(zip(widths[::2], widths[1::2], strict=True)):
        axis = axes[-1 - k]
        if constant and min(before, after) >= 0:
            around = [frozen(width, "padding") for width in (before, after)]
            axes[-1 - k] = _joined([around[0], axis, around[1]]) if before or after else axis
        else:
            freeze(axis, "padded")
            axes[-1 - k] = frozen(axis.size + before + after, "padded")
    return axes


@rule("stack")
def stack(trace: Trace, node: GraphNode) -> list[Tree]:
    values = [trace.value(n) for n in node.args[0]]  # type: ignore[union-attr]
    axes = broadcast(values, len(values[0].axes))
    dim = int(argument(node, 1, "dim", 0)) % (len(axes) + 1)
    return [*axes[:dim], frozen(len(values), "order of a stack"), *axes[dim:]]
