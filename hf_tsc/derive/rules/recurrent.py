"""Recurrent layers."""

from __future__ import annotations

from torch.fx import Node as GraphNode

from hf_tsc.derive.rules.base import Trace, Value, rule, unknown
from hf_tsc.derive.trees import Cat, Tree, factor, freeze, frozen, resolve, unify

GATES = 4  # input, forget, cell, output


@rule("lstm")
def lstm(trace: Trace, node: GraphNode) -> list[Tree] | list[list[Tree]]:
    """(input, [h_0, c_0], weights, has_biases, layers, dropout, train, bidirectional, batch_first).

    Each direction of a layer has hidden units of its own; the next layer reads those of both.
    """
    plain = str(node.target) == "aten.lstm.input" and len(trace.value(node.args[0]).axes) == 3
    each = 4 if node.args[3] else 2  # weights of a direction; there are more where the output is projected
    directions = 2 if node.args[7] else 1
    layers = int(node.args[4])  # type: ignore[arg-type]
    weights = [trace.value(weight) for weight in node.args[2]]  # type: ignore[union-attr]
    if not plain or len(weights) != each * directions * layers or not _starts_and_ends_apart(node):
        return unknown(trace, node)
    x = trace.value(node.args[0])
    features, places = x.axes[2], list(x.axes[:2])
    sequence = 1 if node.args[8] else 0
    freeze(places[sequence], "order of a sequence")
    places[sequence] = frozen(x.shape[sequence], "order of a sequence")
    for layer in range(layers):
        first = layer * directions * each
        hidden = [_hidden(features, weights[first + d * each :][:each]) for d in range(directions)]
        features = resolve(Cat(hidden))
    states: list[Tree] = [frozen(size, "state of a recurrent layer") for size in node.meta["val"][1].shape]
    return [[*places, features], states, states]


def _starts_and_ends_apart(node: GraphNode) -> bool:
    """Whether the layer starts from zeros that are nothing else's, and its last states are not read."""
    zeros = [s for s in node.args[1] if str(s.target) == "aten.zeros.default" and len(s.users) == 1]  # type: ignore[union-attr]
    return len(zeros) == 2 and all(user.args[1] == 0 for user in node.users)


def _hidden(features: Tree, weights: list[Value]) -> Tree:
    """The hidden units of one direction: every gate has a row for each of them."""
    from_input, from_hidden, *_ = weights
    units = from_hidden.axes[1]
    unify(features, from_input.axes[1])
    for weight in weights:
        gates, rows = factor(weight.axes[0], [GATES, units.size])
        freeze(gates, "order of gates")
        unify(rows, units)
    return units
