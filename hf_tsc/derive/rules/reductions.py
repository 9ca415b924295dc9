"""Normalisation, reductions, pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node as GraphNode

from hf_tsc.derive.rules.base import Trace, Value, argument, as_list, broadcast, output_shape, rule, unknown
from hf_tsc.derive.trees import Prod, Tree, factor, freeze, frozen, resolve


@rule("batch_norm")
def batch_norm(trace: Trace, node: GraphNode) -> list[Tree]:
    x, *others = trace.operands(node)
    return [x.axes[0], *_scaled(x.axes[1:2], others), *x.axes[2:]]


@rule("layer_norm", "rms_norm")
def layer_norm(trace: Trace, node: GraphNode) -> list[Tree]:
    x, *others = trace.operands(node)
    return _scaled(x.axes, others)


def _scaled(axes: Sequence[Tree], others: Sequence[Value]) -> list[Tree]:
    """The axes of a tensor that scales, shifts or statistics act on: an expanded axis becomes theirs."""
    return broadcast([Value(tuple(a.size for a in axes), list(axes)), *others], len(axes))


@rule("group_norm")
def group_norm(trace: Trace, node: GraphNode) -> list[Tree]:
    x, *others = trace.operands(node)
    groups = int(node.args[1])  # type: ignore[arg-type]
    (channels,) = _scaled(x.axes[1:2], others)
    if 1 < groups < x.shape[1]:
        factor(channels, [groups, x.shape[1] // groups])
    return [x.axes[0], channels, *x.axes[2:]]


@rule("mean", "sum", "amax", "amin", "var", "std", "any", "all", "norm", "linalg_vector_norm", "logsumexp", "prod")
def reduction(trace: Trace, node: GraphNode) -> list[Tree]:
    (x,) = trace.operands(node)
    dims = argument(node, 1, "dim")
    if str(node.target).startswith(("aten.norm.", "aten.linalg_vector_norm.")):
        dims = argument(node, 2, "dim")
    return _reduce(x, dims, output_shape(node))


@rule("linalg_norm")
def vector_norm(trace: Trace, node: GraphNode) -> list[Tree]:
    """Over one axis a norm of vectors; over two one of matrices, for which nothing is known here."""
    dims = argument(node, 2, "dim")
    if dims is None or len(as_list(dims)) != 1:
        return unknown(trace, node)  # type: ignore[return-value]
    (x,) = trace.operands(node)
    return _reduce(x, dims, output_shape(node))


@rule("max", "min")
def extremum(trace: Trace, node: GraphNode) -> list[Tree] | list[list[Tree]]:
    """Over one axis (values and their indices), over everything, or of two tensors."""
    operands = trace.operands(node)
    if len(operands) == 2:
        return broadcast(operands, len(output_shape(node)))
    dim = argument(node, 1, "dim")
    if dim is None:
        return []
    (x,) = operands
    if any(user.args[1] == 1 for user in node.users):
        freeze(x.axes[dim], "an index into it is taken")
    reduced = _reduce(x, dim, tuple(node.meta["val"][0].shape))
    return [reduced, reduced]


@rule("cumsum", "cumprod", "logcumsumexp", "flip", "roll")
def ordered(trace: Trace, node: GraphNode) -> list[Tree]:
    """What depends on the order along some axes: those cannot move."""
    axes = list(trace.value(node.args[0]).axes)
    position = 2 if str(node.target).startswith("aten.roll") else 1
    dims = as_list(argument(node, position, "dims" if position == 2 else "dim", []))
    for dim in dims or range(len(axes)):
        freeze(axes[dim], "an operator depends on its order")
        axes[dim] = frozen(axes[dim].size, "an operator depends on its order")
    return axes


@rule("argmax", "argmin")
def arg_reduction(trace: Trace, node: GraphNode) -> list[Tree]:
    (x,) = trace.operands(node)
    dim = argument(node, 1, "dim")
    for axis in x.axes if dim is None else [x.axes[dim]]:
        freeze(axis, "an index into it is taken")
    return _reduce(x, dim, output_shape(node))


def _reduce(x: Value, dims: Any, shape: tuple[int, ...]) -> list[Tree]:
    rank = len(x.axes)
    gone = set(range(rank)) if dims is None or dims == [] else {int(d) % rank for d in as_list(dims)}
    if len(shape) == rank:
        return [frozen(1, "size 1") if d in gone else axis for d, axis in enumerate(x.axes)]
    return [axis for d, axis in enumerate(x.axes) if d not in gone]


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
    "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa",
)  # fmt: skip
def pooling(trace: Trace, node: GraphNode) -> list[Tree] | list[list[Tree]]:
    """Over the last axes, as many as the name says; some also return where the largest values are."""
    name, made = str(node.target), node.meta["val"]
    rank = next(n for n in (1, 2, 3) if f"{n}d" in name)
    axes = trace.value(node.args[0]).axes
    for axis in axes[-rank:]:
        freeze(axis, "spatial position")
    shape = (made if isinstance(made, Tensor) else made[0]).shape
    pooled = [*axes[:-rank], *(frozen(int(size), "spatial position") for size in shape[-rank:])]
    return pooled if isinstance(made, Tensor) else [pooled, pooled]


@rule("im2col")
def unfold(trace: Trace, node: GraphNode) -> list[Tree]:
    """(batch, channels, height, width) -> (batch, channels x kernel positions, places)."""
    x = trace.value(node.args[0])
    for axis in x.axes[2:]:
        freeze(axis, "spatial position")
    _, columns, places = output_shape(node)
    kernel = frozen(columns // x.shape[1], "kernel position")
    return [x.axes[0], resolve(Prod([x.axes[1], kernel])), frozen(places, "spatial position")]


@rule("col2im")
def fold(trace: Trace, node: GraphNode) -> list[Tree]:
    x, shape = trace.value(node.args[0]), output_shape(node)
    channels, kernel = factor(x.axes[1], [shape[1], x.shape[1] // shape[1]])
    freeze(kernel, "kernel position")
    freeze(x.axes[2], "spatial position")
    return [x.axes[0], channels, *(frozen(size, "spatial position") for size in shape[2:])]


@rule("pixel_shuffle")
def pixel_shuffle(trace: Trace, node: GraphNode) -> list[Tree]:
    x, shape = trace.value(node.args[0]), output_shape(node)
    channels, inside = factor(x.axes[1], [shape[1], x.shape[1] // shape[1]])
    for axis in (inside, *x.axes[2:]):
        freeze(axis, "spatial position")
    return [x.axes[0], channels, *(frozen(size, "spatial position") for size in shape[2:])]
