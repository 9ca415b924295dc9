"""From solved axis trees to a spec: names, nesting, taps."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx import Node as GraphNode

from hf_tsc.axes import Atom, Axis, Concat, Frozen, Product
from hf_tsc.derive.rules import Trace, Use
from hf_tsc.derive.trees import Cat, Free, Node, Prod, Tree, children, cut, freeze, leaves, resolve, spelled_out
from hf_tsc.layers import LAYERS
from hf_tsc.permutation import PROJECTIONS, Kind, PermutationSpec, Side, Space, Tap


@dataclass(frozen=True)
class _Place:
    """Where a hook can read an axis; `source` is the same for all places that read the same tensor."""

    module: str
    side: Side
    dim: int
    tree: Tree
    source: object


class SpecBuilder:
    """Turns solved trees into named spaces, axes and taps."""

    def __init__(self, model: nn.Module, trace: Trace, tensors: dict[GraphNode, str]):
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
        floating = [n for n, t in named_tensors(self.model).items() if t.is_floating_point()]
        axes = {name: self._tensor_axes(name) for name in floating}
        unknown_ops = tuple(sorted(self.trace.unknown_ops))
        return PermutationSpec(spaces, axes, tuple(self._taps()), unknown_ops, self.trace.casts)

    def _tensor_axes(self, name: str) -> tuple[Axis, ...]:
        if name in self.trees:
            return tuple(self._axis(tree) for tree in self.trees[name])
        shape = named_tensors(self.model)[name].shape
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


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
