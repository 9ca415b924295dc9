"""What a rule sees of a graph and returns; rules are registered by the operator's name.

A rule takes the trace and the node and returns the axis trees of the result (or a list of them for several results).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node as GraphNode

from hf_tsc.derive.trees import Free, Tree, freeze, frozen, leaves, unify
from hf_tsc.permutation import Side


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
    side: Side
    dim: int
    call: GraphNode


@dataclass
class Trace:
    """The state of one derivation; `casts`: whether activations are cast below float64."""

    values: dict[GraphNode, Any] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    roles: list[tuple[Tree, str]] = field(default_factory=list)
    unknown_ops: set[str] = field(default_factory=set)
    casts: bool = False

    def value(self, node: Any) -> Value:
        found = self.values[node]
        assert isinstance(found, Value)
        return found

    def operands(self, node: GraphNode) -> list[Value]:
        """All tensor operands, those inside lists included."""
        return [v for n in node.all_input_nodes for v in as_list(self.values.get(n)) if isinstance(v, Value)]


Rule = Callable[[Trace, GraphNode], "list[Tree] | list[list[Tree]] | None"]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def argument(node: GraphNode, position: int, name: str, default: Any = None) -> Any:
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def output_shape(node: GraphNode) -> tuple[int, ...]:
    return tuple(int(s) for s in node.meta["val"].shape)


def optional(trace: Trace, argument: Any) -> Value | None:
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


def unknown(trace: Trace, node: GraphNode) -> list[Tree] | list[list[Tree]]:
    """An operator without a rule: nothing that it touches may move."""
    name = str(node.target)
    touched = [leaf for value in trace.operands(node) for axis in value.axes for leaf in leaves(axis)]
    if any(leaf.reason is None for leaf in touched):
        trace.unknown_ops.add(name)
    for leaf in touched:
        freeze(leaf, f"operator {name} has no rule")
    made = node.meta.get("val")
    shapes = [tuple(int(s) for s in v.shape) for v in as_list(list(made) if isinstance(made, tuple) else made)]
    results: list[list[Tree]] = [[frozen(size, f"operator {name}") for size in shape] for shape in shapes]
    return results if isinstance(made, list | tuple) else results[0]
