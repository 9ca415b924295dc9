"""Linear maps: layers, convolutions, products of activations, attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import Node as GraphNode

from hf_tsc.derive.rules.base import Trace, Use, Value, argument, broadcast, optional, output_shape, rule
from hf_tsc.derive.trees import Free, Prod, Tree, factor, freeze, frozen, resolve, unify

STRIDE_AND_PADDING = ((3, "stride", 1), (4, "padding", 0))  # of a convolution


@rule("linear")
def linear(trace: Trace, node: GraphNode) -> list[Tree]:
    x_node, bias = node.args[0], argument(node, 2, "bias")
    x, weight = trace.value(x_node), trace.value(node.args[1])
    unify(x.axes[-1], weight.axes[1])
    if bias is not None:
        unify(weight.axes[0], trace.value(bias).axes[0])
    trace.uses += [Use(x_node, "input", -1, node), Use(node, "output", -1, node)]  # type: ignore[arg-type]
    return [*x.axes[:-1], weight.axes[0]]


@rule("addmm")
def addmm(trace: Trace, node: GraphNode) -> list[Tree]:
    """bias + x @ weight: the layer `Conv1D` of transformers."""
    bias, x_node, w_node = node.args[:3]
    x, weight = trace.value(x_node), trace.value(w_node)
    unify(x.axes[-1], weight.axes[0])
    trace.uses += [Use(x_node, "input", -1, node), Use(node, "output", -1, node)]  # type: ignore[arg-type]
    made = Value(output_shape(node), [x.axes[0], weight.axes[1]])
    return broadcast([made, trace.value(bias)], 2)


@rule("einsum")
def einsum(trace: Trace, node: GraphNode) -> list[Tree]:
    """Axes under the same letter are one; an ellipsis stands for leading axes, aligned from the right."""
    equation, operand_nodes = str(node.args[0]).replace(" ", ""), node.args[1]
    sources, _, target = equation.partition("->")
    values = [trace.value(n) for n in operand_nodes]  # type: ignore[union-attr]
    axes: dict[str, Tree] = {}
    for source, value in zip(sources.split(","), values, strict=True):
        for letter, axis in zip(_letters(source, len(value.axes)), value.axes, strict=True):
            if letter not in axes or axes[letter].size == 1 or isinstance(axes[letter], Free):
                axes[letter] = axis
            else:
                unify(axes[letter], axis)
    kept = _letters(target, len(output_shape(node)))
    if len(values) == 2 and all(value.from_input for value in values):
        first, second = (_letters(source, len(v.axes)) for source, v in zip(sources.split(","), values, strict=True))
        _mark_attention(trace, axes, first, second, kept)
    return [axes[letter] for letter in kept]


def _mark_attention(
    trace: Trace, axes: Mapping[str, Tree], first: list[str], second: list[str], kept: list[str]
) -> None:
    """A product of two activations, in the terms of attention: scores of queries and keys, or weights on values."""
    shared = [letter for letter in first if letter in second]
    trace.roles += [(axes[letter], "heads") for letter in shared[1:] if letter in kept]
    trace.roles += [(axes[letter], "qk") for letter in shared if letter not in kept]
    trace.roles += [(axes[letter], "vo") for letter in second if letter in kept and letter not in shared]


def _letters(subscripts: str, rank: int) -> list[str]:
    """One name an axis; the axes of an ellipsis are numbered from the right."""
    before, dots, after = subscripts.partition("...")
    hidden = rank - len(before) - len(after) if dots else 0
    return [*before, *(f"...{k}" for k in range(hidden, 0, -1)), *after]


@rule("conv1d", "conv2d", "conv3d")
def convolution(trace: Trace, node: GraphNode) -> list[Tree]:
    x_node, bias = node.args[0], argument(node, 2, "bias")
    groups = int(argument(node, 6, "groups", 1))
    x, weight = trace.value(x_node), trace.value(node.args[1])
    at = len(x.axes) - len(weight.axes) + 1  # the axis of the channels: the first where there is no batch
    channels = x.axes[at]
    if groups == 1:
        unify(channels, weight.axes[1])
        trace.uses.append(Use(x_node, "input", at, node))  # type: ignore[arg-type]
    elif groups == weight.shape[0] == channels.size:
        unify(channels, weight.axes[0])
    else:
        group, _ = factor(channels, [groups, channels.size // groups])
        out_group, _ = factor(weight.axes[0], [groups, weight.shape[0] // groups])
        unify(group, out_group)
        unify(channels, Prod([group, weight.axes[1]]))
    if bias is not None:
        unify(weight.axes[0], trace.value(bias).axes[0])
    trace.uses.append(Use(node, "output", at, node))
    return [*x.axes[:at], weight.axes[0], *_filtered(node, x.axes[at + 1 :], weight)]


def _filtered(node: GraphNode, places: Sequence[Tree], weight: Value) -> list[Tree]:
    """The axes of places after a convolution: those along which it sees a single place each are what they were."""
    for axis in weight.axes[2:]:
        freeze(axis, "kernel position")
    strides, paddings = (argument(node, position, name, fill) for position, name, fill in STRIDE_AND_PADDING)
    result = []
    for d, (axis, size) in enumerate(zip(places, output_shape(node)[-len(places) :], strict=True)):
        if weight.shape[2 + d] == 1 and _along(strides, d) == 1 and _along(paddings, d) in (0, "same", "valid"):
            result.append(axis)
        else:
            freeze(axis, "spatial position")
            result.append(frozen(size, "spatial position"))
    return result


def _along(option: Any, dim: int) -> Any:
    """An option of a convolution along one of its axes: a list of one stands for all."""
    return option[dim if len(option) > 1 else 0] if isinstance(option, list | tuple) else option


@rule("baddbmm")
def baddbmm(trace: Trace, node: GraphNode) -> list[Tree]:
    """A product of matrices, added to the first operand."""
    added, *factors = (trace.value(n) for n in node.args[:3])
    activations = _of_activations(trace, *node.args[1:3])  # type: ignore[arg-type]
    made = Value(output_shape(node), _product(trace, *factors, of_activations=activations))
    return broadcast([made, added], len(made.axes))


@rule("matmul", "bmm", "mm", "dot", "mv")
def matmul(trace: Trace, node: GraphNode) -> list[Tree]:
    a, b = (trace.value(n) for n in node.args[:2])
    return _product(trace, a, b, of_activations=_of_activations(trace, *node.args[:2]))  # type: ignore[arg-type]


def _product(trace: Trace, a: Value, b: Value, *, of_activations: bool) -> list[Tree]:
    unify(a.axes[-1], b.axes[-2] if len(b.axes) > 1 else b.axes[0])
    batch = broadcast([Value(v.shape[:-2], v.axes[:-2]) for v in (a, b)], max(len(a.axes), len(b.axes), 2) - 2)
    if of_activations:
        trace.roles.extend((axis, "heads") for axis in batch)
        trace.roles += [(a.axes[-1], "qk"), (b.axes[-1], "vo")]
    return [*batch, *a.axes[-2:-1], *(b.axes[-1:] if len(b.axes) > 1 else [])]


def _of_activations(trace: Trace, first: GraphNode, second: GraphNode) -> bool:
    """Whether a product is one of attention, in which a query may be learned; not a layer's with its weight."""
    return trace.value(second).from_input and (trace.value(first).from_input or first.op != "placeholder")


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(trace: Trace, node: GraphNode) -> list[Tree]:
    """The weight has the input channels first, and of the output channels those of one group."""
    x_node, bias = node.args[0], argument(node, 2, "bias")
    groups = int(argument(node, 6, "groups", 1))
    x, weight = trace.value(x_node), trace.value(node.args[1])
    at = len(x.axes) - len(weight.axes) + 1
    unify(x.axes[at], weight.axes[0])
    made = weight.axes[1]
    if groups == 1:
        trace.uses.append(Use(x_node, "input", at, node))  # type: ignore[arg-type]
    else:
        group, _ = factor(weight.axes[0], [groups, weight.shape[0] // groups])
        made = resolve(Prod([group, made]))
    if bias is not None:
        unify(made, trace.value(bias).axes[0])
    trace.uses.append(Use(node, "output", at, node))
    return [*x.axes[:at], made, *_filtered(node, x.axes[at + 1 :], weight)]


@rule("scaled_dot_product_attention")
def attention(trace: Trace, node: GraphNode) -> list[Tree]:
    q, k, v = (trace.value(a) for a in node.args[:3])
    mask = optional(trace, argument(node, 3, "attn_mask"))
    unify(q.axes[-1], k.axes[-1])
    unify(k.axes[-2], v.axes[-2])
    if argument(node, 5, "is_causal", False):
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
    trace.roles.extend((axis, "heads") for axis in batch)
    trace.roles += [(q.axes[-1], "qk"), (v.axes[-1], "vo")]
    return [*batch, q.axes[-2], v.axes[-1]]


@rule("embedding")
def embedding(trace: Trace, node: GraphNode) -> list[Tree]:
    weight, ids = trace.value(node.args[0]), trace.value(node.args[1])
    freeze(weight.axes[0], "looked up by index")
    return [*ids.axes, weight.axes[1]]
