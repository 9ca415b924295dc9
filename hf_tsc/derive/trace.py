"""From a model to its PermutationSpec: export the graph, propagate axis trees through it, read the spaces off.

What stays fixed are the model's outputs (logits; joint embeddings; the last hidden state of a headless encoder), so
that a permuted model drops in for the original.
"""

from __future__ import annotations

import copy
import logging
import operator
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node as GraphNode

from hf_tsc.axes import Atom, Axis, Concat, Frozen, Product
from hf_tsc.derive.rules import RULES, Trace, Use, Value, output_shape, unknown
from hf_tsc.derive.trees import (
    Cat,
    Free,
    Node,
    Prod,
    Tree,
    children,
    collapse,
    cut,
    freeze,
    frozen,
    leaves,
    markers,
    resolve,
    spelled_out,
)
from hf_tsc.errors import PurificationError
from hf_tsc.functional import forget_caches
from hf_tsc.layers import LAYERS
from hf_tsc.permutation import PROJECTIONS, Kind, PermutationSpec, Side, Space, Tap

# The outputs that must not change, by what the model returns: the first line that is there in full.
FIXED_OUTPUTS = (
    ("logits",),
    ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"),
    ("logits_per_video", "logits_per_text", "video_embeds", "text_embeds"),
    ("itm_score",),
    ("last_hidden_state", "pooler_output"),
    ("last_hidden_state",),
    ("feature_maps",),
)

EXPORT_LOGGER = "torch._subclasses.fake_tensor"
UNSAVED = "a buffer that is not saved, but made anew when the model is loaded"
SIZE_INPUTS = ("spatial_shapes",)  # shapes inside of the model depend on their values, which a tensor hides


class _FixedOutputs(nn.Module):
    """The model reduced to the outputs that must not change; inputs that set sizes are written into its graph."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor]):
        super().__init__()
        self.model = model
        self.sizes = {name: inputs[name].cpu().numpy() for name in SIZE_INPUTS if name in inputs}

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        return fixed_outputs(self.model(**inputs, **self.sizes))


def fixed_outputs(output: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The tensors of a model's output that every permutation keeps.

    Raises:
        PurificationError: the output has none of the known kinds.
    """
    for names in FIXED_OUTPUTS:
        if all(isinstance(output.get(name), Tensor | tuple) for name in names):
            found = [output[name] for name in names]
            return tuple(tensor for one in found for tensor in (one if isinstance(one, tuple) else (one,)))
    raise PurificationError(
        f"the model returns {sorted(output)}: expected logits, image and text embeddings or a last hidden state"
    )


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
    program = _export(model, inputs)
    program.graph.eliminate_dead_code()
    trace, tensors = _propagate(program, _first_names(model))
    return _SpecBuilder(model, program, trace, tensors).build()


def _export(model: nn.Module, inputs: Mapping[str, Tensor]) -> ExportedProgram:
    wrapped = _FixedOutputs(_meta_copy(model), inputs).eval()
    meta = {name: _on_meta(tensor) for name, tensor in inputs.items() if name not in SIZE_INPUTS}
    try:
        with torch.no_grad(), _whole_attention(), _silent(EXPORT_LOGGER), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The tensor attributes? ")  # caches: they are forgotten
            return torch.export.export(wrapped, (), meta, strict=False)
    except Exception as error:  # torch.export raises many types; each means the same here
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PurificationError(
            f"the graph of {type(model).__name__} cannot be exported, so its symmetries are unknown: {line}"
        ) from error


def _meta_copy(model: nn.Module) -> nn.Module:
    """A float64 copy without weights: what is float32 in its graph has been cast."""
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {id(tensor): _on_meta(tensor) for tensor in tensors}
    memo |= {id(p): nn.Parameter(memo[id(p)], requires_grad=False) for p in model.parameters()}
    duplicate = copy.deepcopy(model, memo)
    forget_caches(duplicate)
    return duplicate


def _on_meta(tensor: Tensor) -> Tensor:
    dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
    return torch.empty_like(tensor, device="meta", dtype=dtype)


@contextmanager
def _whole_attention() -> Iterator[None]:
    """Keep `nn.MultiheadAttention` from calling its fused kernel, whose axes cannot be followed."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Keep a logger from printing the pages that come before the exception, which says it all."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


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
            if node.name in names:
                name = tensors[node] = first_names[names[node.name].removeprefix("model.")]
                reason = UNSAVED if names[node.name] in signature.non_persistent_buffers else None
                trace.values[node] = values.setdefault(name, _tensor_value(node, reason))
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


def _tensor_value(node: GraphNode, reason: str | None) -> Value:
    """A parameter or buffer; `reason` says why it cannot move, if it cannot."""
    if not node.meta["val"].is_floating_point():
        reason = "not floating"
    shape = output_shape(node)
    return Value(shape, [Node(size, reason) if size > 1 else frozen(size, f"size {size}") for size in shape])


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


@dataclass(frozen=True)
class _Place:
    """Where a hook can read an axis; `source` is the same for all places that read the same tensor."""

    module: str
    side: Side
    dim: int
    tree: Tree
    source: object


class _SpecBuilder:
    """Turns solved trees into named spaces, axes and taps."""

    def __init__(self, model: nn.Module, program: ExportedProgram, trace: Trace, tensors: dict[GraphNode, str]):
        self.model, self.trace, self.tensors = model, trace, tensors
        self.trees = {name: [spelled_out(a) for a in trace.value(node).axes] for node, name in tensors.items()}
        for tree, role in trace.roles:
            for node in leaves(tree):
                node.roles.add(role)
        self.modules = dict(model.named_modules())
        self.places = self._find_places()
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
        unknown_ops = tuple(sorted(self.trace.unknown_ops))
        return PermutationSpec(spaces, axes, tuple(self._taps()), unknown_ops, self.trace.casts)

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
        parts = tuple(self._axis(child) for child in children(tree))
        return Product(parts) if isinstance(tree, Prod) else Concat(parts)

    def _find_places(self) -> list[_Place]:
        """Where hooks can read: before and after every linear layer, and the projections inside MultiheadAttention."""
        places = []
        for use in self.trace.uses:
            module = _calling_module(use)
            if isinstance(self.modules.get(module), tuple(LAYERS)):
                tree = spelled_out(self.trace.value(use.node).axes[use.dim])
                places.append(_Place(module, use.side, use.dim, tree, (use.node, use.dim)))
        for path, module in self.modules.items():
            packed = f"{path}.in_proj_weight"
            if isinstance(module, nn.MultiheadAttention) and packed in self.trees:
                thirds = cut(self.trees[packed][0], [module.embed_dim] * 3)
                for side, tree in zip(PROJECTIONS, thirds, strict=True):
                    places.append(_Place(path, side, -1, tree, (path, side)))
        return places

    def _freeze_unread(self) -> None:
        """Freeze what the forward pass never uses, and what no linear layer reads or makes (it has no tap)."""
        used = {name for node, name in self.tensors.items() if node.users}
        for name in self.trees.keys() - used:
            for tree in self.trees[name]:
                freeze(tree, "not used in the forward pass")
        mapped = {leaf for place in self.places for leaf in leaves(place.tree)}
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
        """Nested spaces: d never appears without h, in parameters always as a factor to the right of h.

        One level: a space may be nested in one that is not nested itself, the nearest such on its left.
        """
        outers: dict[Node, list[Node]] = {}
        for trees in self.trees.values():
            for tree in trees:
                _outer_factors(tree, [], outers)
        company: dict[Node, set[Node]] = {}
        for value in self.trace.values.values():
            for one in value if isinstance(value, list) else [value]:
                present = {leaf for axis in one.axes for leaf in leaves(axis)} if one is not None else set()
                for leaf in present & outers.keys():
                    company[leaf] = company.get(leaf, present) & present
        moving = {node: [o for o in outer if o in company[node]] for node, outer in outers.items() if not node.reason}
        tops = {node: [o for o in outer if not moving[o]] for node, outer in moving.items()}
        return {node: outer[0] for node, outer in tops.items() if outer}

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
        seen: set[object] = set()
        read: set[Node] = set()
        inputs = [place for place in self.places if place.side == "input"]
        outputs = [place for place in self.places if place.side != "input"]
        for places in (inputs, outputs):
            for place in places:
                moving = {n for n in leaves(place.tree) if n.reason is None}
                # a layer that is called twice is one tap
                here: set[object] = {place.source, (place.module, place.side)}
                if here & seen or not moving - read:
                    continue
                seen |= here
                taps.append(Tap(place.module, place.side, place.dim, self._axis(place.tree)))
            read |= {node for place in places for node in leaves(place.tree)}
        return taps


def _calling_module(use: Use) -> str:
    """The path of the innermost module whose forward pass calls the map (the wrapper's own name taken off)."""
    path, _ = list(use.call.meta["nn_module_stack"].values())[-1]
    return path.partition("@")[0].partition(".")[2]


def _outer_factors(tree: Tree, outer: list[Node], found: dict[Node, list[Node]]) -> None:
    """Record for every leaf the moving factors that are on its left wherever it stands, the nearest first."""
    tree = resolve(tree)
    if isinstance(tree, Node):
        found[tree] = [node for node in found.get(tree, outer) if node in outer]
    elif isinstance(tree, Cat):
        for part in tree.parts:
            _outer_factors(part, outer, found)
    elif isinstance(tree, Prod):
        for child in tree.factors:
            _outer_factors(child, outer, found)
            child = resolve(child)
            if isinstance(child, Node) and child.reason is None:
                outer = [child, *outer]


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
