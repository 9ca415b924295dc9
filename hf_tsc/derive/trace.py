"""From a model to its PermutationSpec: export the graph, propagate axis trees through it, read the spaces off.

What stays fixed are the model's outputs (logits; joint embeddings; the last hidden state of a headless encoder), so
that a permuted model drops in for the original.
"""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node as GraphNode

from hf_tsc.axes import Atom, Axis, Concat, Frozen, Product
from hf_tsc.derive.rules import RULES, Trace, Use, Value, output_shape, unknown
from hf_tsc.derive.trees import Cat, Free, Node, Prod, Tree, freeze, frozen, leaves, resolve
from hf_tsc.errors import PurificationError
from hf_tsc.permutation import Kind, PermutationSpec, Space, Tap

# The outputs that must not change, by what the model returns: the first line that is there in full.
FIXED_OUTPUTS = (
    ("logits",),
    ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"),
    ("last_hidden_state", "pooler_output"),
    ("last_hidden_state",),
)


class _FixedOutputs(nn.Module):
    """The model reduced to the outputs that must not change."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        return fixed_outputs(self.model(**inputs))


def fixed_outputs(output: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The tensors of a model's output that every permutation keeps.

    Raises:
        PurificationError: the output has none of the known kinds.
    """
    for names in FIXED_OUTPUTS:
        if all(isinstance(output.get(name), Tensor) for name in names):
            return tuple(output[name] for name in names)
    raise PurificationError(
        f"the model returns {sorted(output)}: expected logits, image and text embeddings or a last hidden state"
    )


def derive_spec(model: nn.Module, inputs: Mapping[str, Tensor]) -> PermutationSpec:
    """The permutation symmetries of a model, read off its own computation.

    Args:
        model: a model in float32 or float64; it is copied to the meta device and not touched.
        inputs: example inputs by name (shapes matter, values do not).

    Returns:
        The spec; every floating parameter is listed, an axis that cannot move with its reason.

    Raises:
        PurificationError: the model's graph cannot be exported.
    """
    program = _export(model, inputs)
    trace, tensors = _propagate(program, _first_names(model))
    return _SpecBuilder(model, program, trace, tensors).build()


def _export(model: nn.Module, inputs: Mapping[str, Tensor]) -> ExportedProgram:
    wrapped = _FixedOutputs(copy.deepcopy(model)).to("meta").eval()
    meta = {name: tensor.to("meta") for name, tensor in inputs.items()}
    try:
        return torch.export.export(wrapped, (), meta, strict=False)
    except Exception as error:  # torch.export raises many types; each means the same here
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PurificationError(
            f"the graph of {type(model).__name__} cannot be exported, so its symmetries are unknown: {line}"
        ) from error


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of that tensor: tied tensors are one."""
    everything = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in everything}


def _propagate(program: ExportedProgram, first_names: Mapping[str, str]) -> tuple[Trace, dict[GraphNode, str]]:
    """Run every rule once over the graph; returns the trace and the tensor name of each placeholder."""
    signature = program.graph_signature
    values: dict[str, Any] = {}
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    trace, tensors = Trace(), {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            trace.values[node] = _placeholder(
                node, is_tensor=node.name in names, is_input=node.name in signature.user_inputs
            )
            if node.name in names:
                name = tensors[node] = first_names[names[node.name].removeprefix("model.")]
                trace.values[node] = values.setdefault(name, trace.values[node])
        elif node.op == "call_function":
            trace.values[node] = _call(trace, node)
        elif node.op == "output":
            for value in trace.operands(node):
                for axis in value.axes:
                    freeze(axis, "model output")
    return trace, tensors


def _placeholder(node: GraphNode, *, is_tensor: bool, is_input: bool) -> Value | None:
    if not isinstance(node.meta.get("val"), Tensor):
        return None
    shape = output_shape(node)
    floating = node.meta["val"].is_floating_point()
    if is_tensor and floating:
        return Value(shape, [Node(size) if size > 1 else frozen(1, "size 1") for size in shape])
    reason = "model input" if is_input else "constant"
    return Value(shape, [frozen(size, reason) for size in shape], from_input=is_input)


def _call(trace: Trace, node: GraphNode) -> Any:
    if node.target is operator.getitem:
        return trace.values[node.args[0]][node.args[1]]  # type: ignore[index]
    made = node.meta.get("val")
    if not isinstance(made, Tensor | list | tuple):
        return None
    name = str(node.target).split(".")[1] if str(node.target).startswith("aten.") else str(node.target)
    axes = RULES.get(name, unknown)(trace, node)
    from_input = any(v.from_input for v in trace.operands(node))
    if isinstance(made, Tensor):
        value = Value(output_shape(node), axes, from_input)  # type: ignore[arg-type]
        assert value.shape == tuple(a.size for a in value.axes), (node, value.shape)
        if name.endswith("_") and not name.startswith("__"):
            trace.values[node.args[0]] = value  # type: ignore[index]
        return value
    return [Value(tuple(a.size for a in one), one, from_input) for one in axes or []]  # type: ignore[union-attr, arg-type]


class _SpecBuilder:
    """Turns solved trees into named spaces, axes and taps."""

    def __init__(self, model: nn.Module, program: ExportedProgram, trace: Trace, tensors: dict[GraphNode, str]):
        self.model, self.trace, self.tensors = model, trace, tensors
        self.trees = {name: trace.value(node).axes for node, name in tensors.items()}
        for tree, role in trace.roles:
            for node in leaves(tree):
                node.roles.add(role)
        self.modules = dict(model.named_modules())
        self.uses = [use for use in trace.uses if use.weight in tensors and self._is_layer(use)]
        self._freeze_unread()
        self.parents = self._find_parents()
        self.names = self._name_spaces()

    def build(self) -> PermutationSpec:
        spaces = {}
        for node, name in self.names.items():
            parent = self.parents.get(node)
            spaces[name] = Space(name, node.size, self._kind(node), self.names[parent] if parent else None)
        floating = [n for n, t in _named_tensors(self.model).items() if t.is_floating_point()]
        axes = {name: self._tensor_axes(name) for name in floating}
        return PermutationSpec(spaces, axes, tuple(self._taps()), tuple(sorted(self.trace.unknown_ops)))

    def _tensor_axes(self, name: str) -> tuple[Axis, ...]:
        if name in self.trees:
            return tuple(self._axis(tree) for tree in self.trees[name])
        shape = _named_tensors(self.model)[name].shape
        return tuple(Frozen(size, "not used in the forward pass") for size in shape)

    def _axis(self, tree: Tree) -> Axis:
        tree = resolve(tree)
        if isinstance(tree, Node):
            if tree.reason is not None:
                return Frozen(tree.size, tree.reason)
            parent = self.parents.get(tree)
            return Atom(self.names[tree], tree.size, self.names[parent] if parent else None)
        if isinstance(tree, Free):
            return Frozen(tree.size, "expanded")
        children = tuple(self._axis(child) for child in (tree.factors if isinstance(tree, Prod) else tree.parts))
        return Product(children) if isinstance(tree, Prod) else Concat(children)

    def _is_layer(self, use: Use) -> bool:
        """Whether the linear map is the forward pass of a layer of its own, so that a hook sees it."""
        return isinstance(self.modules[_calling_module(use)], nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)

    def _freeze_unread(self) -> None:
        """Freeze what the forward pass never uses, and what no linear layer reads or makes (it has no tap)."""
        used = {name for node, name in self.tensors.items() if node.users}
        for name in self.trees.keys() - used:
            for tree in self.trees[name]:
                freeze(tree, "not used in the forward pass")
        mapped = {leaf for use in self.uses for leaf in leaves(self.trace.value(use.node).axes[use.dim])}
        for trees in self.trees.values():
            for tree in trees:
                for leaf in leaves(tree):
                    if leaf.reason is None and leaf.size == 1:
                        leaf.reason = "size 1"
                    elif leaf.reason is None and leaf not in mapped:
                        leaf.reason = "no linear layer reads or makes it"

    def _moving(self) -> dict[Node, list[tuple[str, int]]]:
        """Every node that may move, with the tensor axes it acts on."""
        members: dict[Node, list[tuple[str, int]]] = defaultdict(list)
        for name, trees in self.trees.items():
            for dim, tree in enumerate(trees):
                for leaf in leaves(tree):
                    if leaf.reason is None:
                        members[leaf].append((name, dim))
        return members

    def _find_parents(self) -> dict[Node, Node]:
        """Nested spaces: d never appears without h, in parameters always as a factor to the right of h."""
        candidates: dict[Node, Node | None] = {}
        for trees in self.trees.values():
            for tree in trees:
                _outer_factors(resolve(tree), None, candidates)
        parents = {inner: outer for inner, outer in candidates.items() if outer is not None and inner.reason is None}
        for value in self.trace.values.values():
            for one in value if isinstance(value, list) else [value]:
                present = {leaf for axis in one.axes for leaf in leaves(axis)} if one is not None else set()
                for inner in present & parents.keys():
                    if parents[inner] not in present:
                        del parents[inner]
        # one level: what is nested in a nested space has one permutation for all blocks
        return {inner: outer for inner, outer in parents.items() if outer not in parents}

    def _kind(self, node: Node) -> Kind:
        for role in ("heads", "qk", "vo", "residual"):
            if role in node.roles:
                return role
        return "hidden"

    def _name_spaces(self) -> dict[Node, str]:
        names: dict[Node, str] = {}
        taken: dict[str, int] = defaultdict(int)
        for node, members in self._moving().items():
            base = _main_prefix([name for name, _ in members])
            stem = f"{base}.{self._kind(node)}" if base else self._kind(node)
            taken[stem] += 1
            names[node] = stem if taken[stem] == 1 else f"{stem}_{taken[stem]}"
        return names

    def _taps(self) -> list[Tap]:
        """Inputs of the maps that read a space, once per traced tensor; outputs of its makers where none reads it."""
        taps: list[Tap] = []
        seen: set[tuple[object, object]] = set()
        read: set[Node] = set()
        for side in ("input", "output"):
            for use in self.uses:
                module = _calling_module(use)
                moving = {n for n in leaves(self.trace.value(use.node).axes[use.dim]) if n.reason is None}
                places: set[tuple[object, object]] = {(use.node, use.dim), (module, side)}
                # a layer that is called twice is one tap
                if use.side != side or places & seen or not moving - read:
                    continue
                seen |= places
                taps.append(self._tap(use, module))
            read |= {n for t in self.uses if t.side == side for n in leaves(self.trace.value(t.node).axes[t.dim])}
        return taps

    def _tap(self, use: Use, module: str) -> Tap:
        axis = self._axis(self.trace.value(use.node).axes[use.dim])
        return Tap(module, use.side, use.dim, axis)  # type: ignore[arg-type]


def _calling_module(use: Use) -> str:
    """The path of the innermost module whose forward pass calls the map (the wrapper's own name taken off)."""
    path, _ = list(use.call.meta["nn_module_stack"].values())[-1]
    return path.partition("@")[0].partition(".")[2]


def _outer_factors(tree: Tree, outer: Node | None, found: dict[Node, Node | None]) -> None:
    """Record for every leaf the nearest moving factor on its left; None when it has several, or stands without."""
    tree = resolve(tree)
    if isinstance(tree, Node):
        found[tree] = outer if found.get(tree, outer) is outer else None
    elif isinstance(tree, Cat):
        for part in tree.parts:
            _outer_factors(part, outer, found)
    elif isinstance(tree, Prod):
        for child in tree.factors:
            _outer_factors(child, outer, found)
            child = resolve(child)
            if isinstance(child, Node) and child.reason is None:
                outer = child


def _main_prefix(names: list[str]) -> str:
    """The longest module path under which at least three quarters of the tensors lie."""
    counts: dict[str, int] = defaultdict(int)
    for name in names:
        parts = name.split(".")[:-1]
        for depth in range(1, len(parts) + 1):
            counts[".".join(parts[:depth])] += 1
    shared = [path for path, count in counts.items() if count >= 0.75 * len(names)]
    return max(shared, key=lambda path: path.count("."), default="")


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
