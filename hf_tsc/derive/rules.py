"""What each aten operator asks of the axes of its operands, and which axes its result has.

A rule takes the tracer and the node and returns the axis trees of the result (or a list of them for several results).
An operator without a rule freezes everything it touches: sound, and reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.fx import Node as GraphNode

from hf_tsc.derive.trees import Cat, Free, Prod, Tree, cut, factor, freeze, frozen, resolve, unify


@dataclass
class Value:
    """A traced tensor: its shape, one tree a dimension, and whether it depends on the model's input."""

    shape: tuple[int, ...]
    axes: list[Tree]
    from_input: bool = False


@dataclass(frozen=True)
class Use:
    """The linear map `call` reads (`side` input) or makes (output) the axis `dim` of a graph node's tensor."""

    node: GraphNode
    weight: GraphNode
    side: str
    dim: int
    call: GraphNode


@dataclass
class Trace:
    """The state of one derivation."""

    values: dict[GraphNode, Any] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    roles: list[tuple[Tree, str]] = field(default_factory=list)
    unknown_ops: set[str] = field(default_factory=set)

    def value(self, node: Any) -> Value:
        found = self.values[node]
        assert isinstance(found, Value)
        return found

    def operands(self, node: GraphNode) -> list[Value]:
        """All tensor operands, those inside lists included."""
        return [v for n in node.all_input_nodes for v in _as_list(self.values.get(n)) if isinstance(v, Value)]


Rule = Callable[[Trace, GraphNode], "list[Tree] | list[list[Tree]] | None"]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _arg(node: GraphNode, position: int, name: str, default: Any = None) -> Any:
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def output_shape(node: GraphNode) -> tuple[int, ...]:
    return tuple(int(s) for s in node.meta["val"].shape)


def _tensor(trace: Trace, argument: Any) -> Value | None:
    return trace.value(argument) if isinstance(argument, GraphNode) else None


def broadcast(values: Sequence[Value], rank: int) -> list[Tree]:
    """Unify right-aligned axes; size-1 and expanded axes ask for nothing."""
    result: list[Tree] = []
    for dim in range(-rank, 0):
        axes = [v.axes[dim] for v in values if len(v.axes) >= -dim]
        real = [a for a in axes if a.size != 1 and not isinstance(a, Free)]
        for other in real[1:]:
            unify(real[0], other)
        result.append(real[0] if real else max(axes, key=lambda a: a.size))
    return result


# --- element by element -------------------------------------------------------------------------------------------

POINTWISE = (
    "relu", "relu_", "gelu", "silu", "silu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "hardswish", "hardswish_",
    "hardsigmoid", "hardtanh", "hardtanh_", "relu6", "leaky_relu", "elu", "mish", "softplus", "exp", "log", "sqrt",
    "rsqrt", "square", "pow", "abs", "neg", "sin", "cos", "erf", "reciprocal", "clamp", "clamp_min", "clamp_max",
    "sub", "mul", "mul_", "div", "div_", "sub_", "maximum", "minimum", "where", "eq", "ne", "ge", "gt", "le", "lt",
    "logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not", "__and__", "__or__",
    "floor_divide", "remainder", "rsub", "masked_fill", "masked_fill_", "copy_", "type_as", "floor", "round",
    "dropout", "dropout_", "feature_dropout", "contiguous", "clone", "detach", "detach_", "alias", "to",
    "_to_copy", "lift_fresh_copy", "lift_fresh", "softmax", "_softmax", "log_softmax", "isnan", "isinf",
    "nan_to_num", "fill_", "zero_", "sign",
)  # fmt: skip


@rule(*POINTWISE)
def pointwise(trace: Trace, node: GraphNode) -> list[Tree]:
    return broadcast(trace.operands(node), len(output_shape(node)))


@rule("add", "add_")
def addition(trace: Trace, node: GraphNode) -> list[Tree]:
    operands = trace.operands(node)
    axes = broadcast(operands, len(output_shape(node)))
    if len(operands) == 2 and all(v.from_input for v in operands):
        trace.roles.extend((axis, "residual") for axis in axes)
    return axes


# --- linear maps --------------------------------------------------------------------------------------------------


@rule("linear")
def linear(trace: Trace, node: GraphNode) -> list[Tree]:
    x_node, w_node, bias = node.args[0], node.args[1], _arg(node, 2, "bias")
    x, weight = trace.value(x_node), trace.value(w_node)
    unify(x.axes[-1], weight.axes[1])
    if bias is not None:
        unify(weight.axes[0], trace.value(bias).axes[0])
    trace.uses += [Use(x_node, w_node, "input", -1, node), Use(node, w_node, "output", -1, node)]  # type: ignore[arg-type]
    return [*x.axes[:-1], weight.axes[0]]


@rule("conv1d", "conv2d", "conv3d")
def convolution(trace: Trace, node: GraphNode) -> list[Tree]:
    x_node, w_node, bias = node.args[0], node.args[1], _arg(node, 2, "bias")
    groups = int(_arg(node, 6, "groups", 1))
    x, weight = trace.value(x_node), trace.value(w_node)
    for axis in weight.axes[2:]:
        freeze(axis, "kernel position")
    for axis in x.axes[2:]:
        freeze(axis, "spatial position")
    if groups == 1:
        unify(x.axes[1], weight.axes[1])
        trace.uses.append(Use(x_node, w_node, "input", 1, node))  # type: ignore[arg-type]
    elif groups == weight.shape[0] == x.shape[1]:
        unify(x.axes[1], weight.axes[0])
    else:
        group, _ = factor(x.axes[1], [groups, x.shape[1] // groups])
        out_group, _ = factor(weight.axes[0], [groups, weight.shape[0] // groups])
        unify(group, out_group)
        unify(x.axes[1], Prod([group, weight.axes[1]]))
    if bias is not None:
        unify(weight.axes[0], trace.value(bias).axes[0])
    trace.uses.append(Use(node, w_node, "output", 1, node))  # type: ignore[arg-type]
    spatial = [frozen(size, "spatial position") for size in output_shape(node)[2:]]
    return [x.axes[0], weight.axes[0], *spatial]


@rule("matmul", "bmm", "mm")
def matmul(trace: Trace, node: GraphNode) -> list[Tree]:
    a, b = trace.value(node.args[0]), trace.value(node.args[1])
    unify(a.axes[-1], b.axes[-2] if len(b.axes) > 1 else b.axes[0])
    batch = broadcast([Value(v.shape[:-2], v.axes[:-2]) for v in (a, b)], max(len(a.axes), len(b.axes), 2) - 2)
    if a.from_input and b.from_input:
        trace.roles.extend((axis, "heads") for axis in batch[1:])
        trace.roles.append((a.axes[-1], "qk"))
        trace.roles.append((b.axes[-1], "vo"))
    return [*batch, *a.axes[-2:-1], *(b.axes[-1:] if len(b.axes) > 1 else [])]


@rule("scaled_dot_product_attention")
def attention(trace: Trace, node: GraphNode) -> list[Tree]:
    q, k, v = (trace.value(a) for a in node.args[:3])
    mask = _tensor(trace, _arg(node, 3, "attn_mask"))
    unify(q.axes[-1], k.axes[-1])
    unify(k.axes[-2], v.axes[-2])
    if _arg(node, 5, "is_causal", False):
        freeze(q.axes[-2], "causal order")
        freeze(k.axes[-2], "causal order")
    if node.kwargs.get("enable_gqa", False):
        for value in (q, k, v):
            freeze(value.axes[1], "grouped-query attention")
        batch = q.axes[:-2]
    else:
        batch = broadcast([Value(t.shape[:-2], t.axes[:-2]) for t in (q, k, v)], len(q.axes) - 2)
    if mask is not None:
        scores = Value((*q.shape[:-1], k.shape[-2]), [*batch, q.axes[-2], k.axes[-2]])
        broadcast([scores, mask], len(scores.axes))
    trace.roles.extend((axis, "heads") for axis in batch[1:])
    trace.roles += [(q.axes[-1], "qk"), (v.axes[-1], "vo")]
    return [*batch, q.axes[-2], v.axes[-1]]


@rule("embedding")
def embedding(trace: Trace, node: GraphNode) -> list[Tree]:
    weight, ids = trace.value(node.args[0]), trace.value(node.args[1])
    freeze(weight.axes[0], "looked up by index")
    return [*ids.axes, weight.axes[1]]


# --- normalisation ------------------------------------------------------------------------------------------------


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


# --- reductions and pooling ---------------------------------------------------------------------------------------


@rule("mean", "sum", "amax", "amin", "var", "std", "any", "all", "norm", "linalg_vector_norm", "logsumexp", "prod")
def reduction(trace: Trace, node: GraphNode) -> list[Tree]:
    (x,) = trace.operands(node)
    dims = _arg(node, 1, "dim")
    if str(node.target).startswith(("aten.norm.", "aten.linalg_vector_norm.")):
        dims = _arg(node, 2, "dim")
    return _reduce(x, dims, output_shape(node))


@rule("argmax", "argmin")
def arg_reduction(trace: Trace, node: GraphNode) -> list[Tree]:
    (x,) = trace.operands(node)
    dim = _arg(node, 1, "dim")
    for axis in x.axes if dim is None else [x.axes[dim]]:
        freeze(axis, "an index into it is taken")
    return _reduce(x, dim, output_shape(node))


def _reduce(x: Value, dims: Any, shape: tuple[int, ...]) -> list[Tree]:
    rank = len(x.axes)
    gone = set(range(rank)) if dims is None or dims == [] else {int(d) % rank for d in _as_list(dims)}
    if len(shape) == rank:
        return [frozen(1, "size 1") if d in gone else axis for d, axis in enumerate(x.axes)]
    return [axis for d, axis in enumerate(x.axes) if d not in gone]


@rule(
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "avg_pool1d", "adaptive_avg_pool1d",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest2d", "_upsample_bicubic2d_aa",
    "_upsample_bilinear2d_aa",
)  # fmt: skip
def pooling(trace: Trace, node: GraphNode) -> list[Tree]:
    x = trace.value(node.args[0])
    for axis in x.axes[2:]:
        freeze(axis, "spatial position")
    return [*x.axes[:2], *(frozen(size, "spatial position") for size in output_shape(node)[2:])]


# --- shape changes ------------------------------------------------------------------------------------------------


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
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
        pieces = factor(group_in[0] if len(group_in) == 1 else Prod(group_in), [shape[i] for i in group_out])
        for i, piece in zip(group_out, pieces, strict=True):
            result[i] = piece
    return result


@rule("transpose", "permute", "t", "movedim", "swapaxes")
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


@rule("repeat")
def repeat(trace: Trace, node: GraphNode) -> list[Tree]:
    axes, times = trace.value(node.args[0]).axes, node.args[1]
    padded: list[Tree] = [frozen(1, "size 1")] * (len(times) - len(axes)) + list(axes)  # type: ignore[arg-type]
    pairs = zip(padded, times, strict=True)  # type: ignore[arg-type]
    return [resolve(Prod([frozen(int(n), "order of copies"), axis])) if n != 1 else axis for axis, n in pairs]


@rule("cat")
def concatenate(trace: Trace, node: GraphNode) -> list[Tree]:
    from_nodes = [trace.value(n) for n in node.args[0]]  # type: ignore[union-attr]
    values = [v for v in from_nodes if prod(v.shape) > 0]
    dim = int(_arg(node, 1, "dim", 0)) % len(values[0].axes)
    result = []
    for d in range(len(values[0].axes)):
        if d == dim:
            result.append(_joined([v.axes[d] for v in values]))
        else:
            result.extend(broadcast([Value((v.shape[d],), [v.axes[d]]) for v in values], 1))
    return result


def _joined(parts: list[Tree]) -> Tree:
    return resolve(Cat([frozen(1, "single position") if p.size == 1 else p for p in parts]))


@rule("stack")
def stack(trace: Trace, node: GraphNode) -> list[Tree]:
    values = [trace.value(n) for n in node.args[0]]  # type: ignore[union-attr]
    axes = broadcast(values, len(values[0].axes))
    dim = int(_arg(node, 1, "dim", 0)) % (len(axes) + 1)
    return [*axes[:dim], frozen(len(values), "order of a stack"), *axes[dim:]]


@rule("split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split", "tensor_split")
def split(trace: Trace, node: GraphNode) -> list[list[Tree]]:
    axes = trace.value(node.args[0]).axes
    dim = int(_arg(node, 2, "dim", 0)) % len(axes)
    sizes = [int(v.shape[dim]) for v in node.meta["val"]]
    return [[*axes[:dim], piece, *axes[dim + 1 :]] for piece in cut(axes[dim], sizes)]


@rule("unbind")
def unbind(trace: Trace, node: GraphNode) -> list[list[Tree]]:
    axes = trace.value(node.args[0]).axes
    dim = int(_arg(node, 1, "dim", 0)) % len(axes)
    freeze(axes[dim], "taken apart by index")
    return [[*axes[:dim], *axes[dim + 1 :]] for _ in node.meta["val"]]


@rule("select")
def select(trace: Trace, node: GraphNode) -> list[Tree]:
    axes = trace.value(node.args[0]).axes
    dim = int(node.args[1]) % len(axes)  # type: ignore[arg-type]
    freeze(axes[dim], "taken apart by index")
    return [*axes[:dim], *axes[dim + 1 :]]


@rule("slice", "narrow")
def slice_(trace: Trace, node: GraphNode) -> list[Tree]:
    axes, shape = list(trace.value(node.args[0]).axes), output_shape(node)
    dim = int(_arg(node, 1, "dim", 0)) % len(axes)
    full = axes[dim].size
    if shape[dim] == full:
        return axes
    start = min(max(s + full if (s := int(_arg(node, 2, "start", 0) or 0)) < 0 else s, 0), full)
    if _arg(node, 4, "step", 1) != 1:
        freeze(axes[dim], "strided slice")
        axes[dim] = frozen(shape[dim], "strided slice")
        return axes
    sizes = [start, shape[dim], full - start - shape[dim]]
    pieces = cut(axes[dim], [s for s in sizes if s])
    axes[dim] = pieces[1 if start else 0]
    return axes


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


@rule("constant_pad_nd", "pad")
def pad(trace: Trace, node: GraphNode) -> list[Tree]:
    axes, shape = trace.value(node.args[0]).axes, output_shape(node)
    result = []
    for axis, size in zip(axes, shape, strict=True):
        if axis.size != size:
            freeze(axis, "padded")
        result.append(axis if axis.size == size else frozen(size, "padded"))
    return result


# --- constants ----------------------------------------------------------------------------------------------------


@rule(
    "arange", "zeros", "ones", "full", "empty", "scalar_tensor", "zeros_like", "ones_like", "full_like", "empty_like",
    "new_zeros", "new_ones", "new_full", "new_empty", "eye", "linspace", "rand", "randn", "tril", "triu",
)  # fmt: skip
def constant(trace: Trace, node: GraphNode) -> list[Tree]:
    for value in trace.operands(node) if str(node.target).startswith(("aten.tril", "aten.triu")) else []:
        for axis in value.axes:
            freeze(axis, "constant")
    return [frozen(size, "constant") for size in output_shape(node)]


def unknown(trace: Trace, node: GraphNode) -> list[Tree] | list[list[Tree]]:
    """An operator without a rule: nothing that it touches may move."""
    name = str(node.target)
    trace.unknown_ops.add(name)
    for value in trace.operands(node):
        for axis in value.axes:
            freeze(axis, f"operator {name} has no rule")
    made = node.meta.get("val")
    shapes = [tuple(int(s) for s in v.shape) for v in _as_list(list(made) if isinstance(made, tuple) else made)]
    results: list[list[Tree]] = [[frozen(size, f"operator {name}") for size in shape] for shape in shapes]
    return results if isinstance(made, list | tuple) else results[0]
