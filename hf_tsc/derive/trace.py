"""From a model to its PermutationSpec: export the graph, propagate axis trees through it, read the spaces off.

What stays fixed are the model's outputs (logits; joint embeddings; the last hidden state of a headless encoder), so
that a permuted model drops in for the original.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node as GraphNode

from hf_tsc.derive.builder import SpecBuilder, named_tensors
from hf_tsc.derive.export import export_graph
from hf_tsc.derive.rules import RULES, Trace, Value, output_shape, unknown
from hf_tsc.derive.trees import Node, Tree, collapse, freeze, frozen, leaves, markers
from hf_tsc.permutation import PermutationSpec

UNSAVED = "a buffer that is not saved, but made anew when the model is loaded"


def derive_spec(model: nn.Module, inputs: Mapping[str, Tensor]) -> PermutationSpec:
    """The permutation symmetries of a model, read off its own computation.

    Args:
        model: a model of any floating type; it is copied to the meta device, without weights, and not touched.
        inputs: example inputs by name (shapes matter, values do not).

    Returns:
        The spec; every floating parameter is listed, an axis that cannot move with its reason.

    Raises:
        PurificationError: the model's graph cannot be exported.
    """
    program = export_graph(model, inputs)
    program.graph.eliminate_dead_code()
    trace, tensors = _propagate(program, model)
    return SpecBuilder(model, trace, tensors).build()


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of that tensor: tied tensors are one."""
    everything = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in everything}


def _propagate(program: ExportedProgram, model: nn.Module) -> tuple[Trace, dict[GraphNode, str]]:
    """Run every rule once over the graph; returns the trace and the tensor name of each placeholder."""
    signature = program.graph_signature
    first_names, stored = _first_names(model), named_tensors(model)
    values: dict[str, Any] = {}
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    trace, tensors = Trace(), {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in names:
                name = tensors[node] = first_names[names[node.name].removeprefix("model.")]
                unsaved = names[node.name] in signature.non_persistent_buffers
                trace.values[node] = values.setdefault(name, _tensor_value(stored[name], unsaved=unsaved))
            elif isinstance(node.meta.get("val"), Tensor):
                is_input = node.name in signature.user_inputs
                reason = "model input" if is_input else "constant"
                axes: list[Tree] = [frozen(size, reason) for size in output_shape(node)]
                trace.values[node] = Value(output_shape(node), axes, from_input=is_input)
        elif node.op == "call_function":
            trace.values[node] = _call(trace, node)
        elif node.op == "output":
            for value in trace.operands(node):
                for axis in value.axes:
                    freeze(axis, "model output")
    return trace, tensors


def _tensor_value(tensor: Tensor, *, unsaved: bool) -> Value:
    """A parameter or buffer.

    What is made anew when the model is loaded must not move, except along axes on which all positions hold the same,
    as in a bias that is zero throughout.
    """
    axes: list[Tree] = []
    for dim, size in enumerate(tensor.shape):
        if size <= 1:
            axes.append(frozen(size, f"size {size}"))
        elif not tensor.is_floating_point():
            axes.append(frozen(size, "not floating"))
        elif unsaved and not _repeats(tensor, dim):
            axes.append(frozen(size, UNSAVED))
        else:
            axes.append(Node(size))
    return Value(tuple(tensor.shape), axes)


def _repeats(tensor: Tensor, dim: int) -> bool:
    """Whether all positions along an axis hold the same; unknown without values."""
    return not tensor.is_meta and bool((tensor == tensor.narrow(dim, 0, 1)).all())


def _call(trace: Trace, node: GraphNode) -> Any:
    if node.target is operator.getitem:
        return trace.values[node.args[0]][node.args[1]]  # type: ignore[index]
    made = node.meta.get("val")
    if not isinstance(made, Tensor | list | tuple):
        return None
    name = str(node.target).split(".")[1] if str(node.target).startswith("aten.") else str(node.target)
    in_place = name.endswith("_") and not name.startswith("__")
    axes = RULES.get(name.removesuffix("_") if in_place else name, unknown)(trace, node)
    from_input = any(v.from_input for v in trace.operands(node))
    if isinstance(made, Tensor) and from_input and made.dtype in (torch.float32, torch.float16, torch.bfloat16):
        trace.casts = True
    if isinstance(made, Tensor):
        value = Value(output_shape(node), _settled(axes), from_input)  # type: ignore[arg-type]
        assert value.shape == tuple(a.size for a in value.axes), (node, value.shape)
        if in_place:
            trace.values[node.args[0]] = value  # type: ignore[index]
        return value
    several = [_settled(one) for one in axes or []]  # type: ignore[arg-type]
    return [Value(tuple(a.size for a in one), one, from_input) for one in several]


def _settled(axes: Sequence[Tree]) -> list[Tree]:
    """The axes; a choice whose marker is no axis of the tensor any more is made one."""
    present = {leaf for axis in axes for leaf in leaves(axis)}
    return [axis if all(m in present for m in markers(axis)) else collapse(axis) for axis in axes]
