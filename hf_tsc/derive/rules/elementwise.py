"""Operators that act element by element, and constants."""

from __future__ import annotations

from torch.fx import Node as GraphNode

from hf_tsc.derive.rules.base import Trace, argument, broadcast, output_shape, rule
from hf_tsc.derive.trees import Node, Tree, cut, freeze, frozen, unify

POINTWISE = (
    "relu", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "relu6", "leaky_relu", "elu",
    "mish", "softplus", "exp", "log", "sqrt", "rsqrt", "square", "pow", "abs", "neg", "sin", "cos", "erf",
    "reciprocal", "clamp", "clamp_min", "clamp_max", "sub", "mul", "div", "maximum", "minimum", "where", "eq", "ne",
    "ge", "gt", "le", "lt", "logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not",
    "__and__", "__or__", "floor_divide", "remainder", "rsub", "masked_fill", "copy", "floor", "round",
    "dropout", "feature_dropout", "contiguous", "clone", "detach", "alias", "_to_copy", "lift_fresh_copy",
    "lift_fresh", "softmax", "_softmax", "log_softmax", "isnan", "isinf", "nan_to_num", "fill", "zero", "sign",
    "erfinv", "log1p", "expm1", "tan", "atan2", "logit", "selu", "celu", "hardshrink", "softshrink", "softsign",
    "logsigmoid", "log_sigmoid", "threshold", "rrelu", "addcmul", "addcdiv", "lerp", "fmod", "trunc", "ceil", "frac",
    "isfinite", "logical_xor", "xlogy", "alpha_dropout", "bernoulli", "log2", "exp2", "sinh", "cosh", "special_erf",
    "lift",
)  # fmt: skip


@rule(*POINTWISE)
def pointwise(trace: Trace, node: GraphNode) -> list[Tree]:
    return broadcast(trace.operands(node), len(output_shape(node)))


@rule("to", "type_as")
def cast(trace: Trace, node: GraphNode) -> list[Tree]:
    """Of a second tensor only the type is taken."""
    return list(trace.value(node.args[0]).axes)


@rule("add")
def addition(trace: Trace, node: GraphNode) -> list[Tree]:
    operands = trace.operands(node)
    axes = broadcast(operands, len(output_shape(node)))
    if len(operands) == 2 and all(v.from_input for v in operands):
        trace.roles.extend((axis, "residual") for axis in axes)
    return axes


@rule("glu")
def glu(trace: Trace, node: GraphNode) -> list[Tree]:
    """The first half of an axis, gated by the second."""
    axes = trace.value(node.args[0]).axes
    dim = int(argument(node, 1, "dim", -1)) % len(axes)
    half = axes[dim].size // 2
    value, gate = cut(axes[dim], [half, half])
    unify(value, gate)
    return [*axes[:dim], value, *axes[dim + 1 :]]


@rule("prelu")
def prelu(trace: Trace, node: GraphNode) -> list[Tree]:
    x, weight = trace.value(node.args[0]), trace.value(node.args[1])
    if len(x.axes) > 1:
        unify(x.axes[1], weight.axes[0])
    return list(x.axes)


@rule("arange", "eye", "linspace", "rand", "randn", "tril", "triu")
def constant(trace: Trace, node: GraphNode) -> list[Tree]:
    for value in trace.operands(node):
        for axis in value.axes:
            freeze(axis, "constant")
    return [frozen(size, "constant") for size in output_shape(node)]


@rule(
    "zeros", "ones", "full", "empty", "scalar_tensor", "zeros_like", "ones_like", "full_like", "empty_like",
    "new_zeros", "new_ones", "new_full", "new_empty",
)  # fmt: skip
def uniform(trace: Trace, node: GraphNode) -> list[Tree]:
    """The same value everywhere, or to be written into: the axes are what they are used as."""
    return [Node(size) if size > 1 else frozen(size, "size 1") for size in output_shape(node)]
