"""Axis trees while they are being solved for: union-find nodes that can later be refined.

Every tensor axis of a traced graph carries a tree. `unify` states that two axes must move together. A node that meets
a finer tree (a product or concatenation) is *bound* to it, and every axis that shares the node sees the refinement.
Where two trees cannot be matched both are frozen: that loses a symmetry, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import TypeAlias

Tree: TypeAlias = "Node | Prod | Cat | Free | Choice"


class Node:
    """A set of `size` units that move as one; `reason` is None while it may move, else why it is frozen.

    Attributes:
        bound: what it has been refined to.
        roles: what the graph uses it for ("heads", "qk", ...).
        inner: for a part of an axis that a view has split, the parts on its right; None for a whole axis.
        joined: whether a part has been unified with another tree by itself.
    """

    __slots__ = ("bound", "inner", "joined", "reason", "roles", "size")

    def __init__(self, size: int, reason: str | None = None):
        self.size = size
        self.reason = reason
        self.bound: Tree | None = None
        self.roles: set[str] = set()
        self.inner: tuple[Node, ...] | None = None
        self.joined = False


class Prod:
    """Row-major product."""

    __slots__ = ("factors",)

    def __init__(self, factors: Sequence[Tree]):
        self.factors = tuple(factors)

    @property
    def size(self) -> int:
        return prod(f.size for f in self.factors)


class Cat:
    """Concatenation."""

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[Tree]):
        self.parts = tuple(parts)

    @property
    def size(self) -> int:
        return sum(p.size for p in self.parts)


class Free:
    """An axis along which the values repeat (an expanded one): it constrains nothing."""

    __slots__ = ("size",)

    def __init__(self, size: int):
        self.size = size


class Choice:
    """An axis that is another one for every position of the axis `marker`: a fused qkv seen as (3, heads, d)."""

    __slots__ = ("marker", "options")

    def __init__(self, marker: Node, options: Sequence[Tree]):
        self.marker = marker
        self.options = tuple(options)

    @property
    def size(self) -> int:
        return self.options[0].size


TRIVIAL_REASONS = (
    "size 1",
    "single position",
    "order of copies",
    "order of parts",
    "order of a stack",
)  # others tell more


def frozen(size: int, reason: str) -> Node:
    return Node(size, reason)


def resolve(tree: Tree) -> Tree:
    """The tree as known by now, flattened: no bound nodes, size-1 factors or adjacent frozen neighbours left in it."""
    if isinstance(tree, Node):
        return resolve(tree.bound) if tree.bound is not None else tree
    if isinstance(tree, Free | Choice):
        return tree
    if isinstance(tree, Prod):
        factors = [c for f in tree.factors for c in _flat(resolve(f), Prod) if c.size != 1]
        merged = _merge_frozen(factors, lambda a, b: a * b)
        return merged[0] if len(merged) == 1 else Prod(merged) if merged else frozen(1, "size 1")
    parts = [c for p in tree.parts for c in _flat(resolve(p), Cat) if c.size != 0]
    merged = _merge_frozen(parts, lambda a, b: a + b)
    return merged[0] if len(merged) == 1 else Cat(merged) if merged else frozen(0, "empty")


def _flat(tree: Tree, kind: type) -> tuple[Tree, ...]:
    if isinstance(tree, Prod) and kind is Prod:
        return tree.factors
    if isinstance(tree, Cat) and kind is Cat:
        return tree.parts
    return (frozen(tree.size, "expanded"),) if isinstance(tree, Free) else (tree,)


def _merge_frozen(trees: list[Tree], combine: Callable[[int, int], int]) -> list[Tree]:
    merged: list[Tree] = []
    for child in trees:
        reason = _frozen_reason(merged[-1]) if merged else None
        if reason is not None and (other := _frozen_reason(child)) is not None:
            told = reason if other in TRIVIAL_REASONS else other if reason in TRIVIAL_REASONS else reason
            merged[-1] = frozen(combine(merged[-1].size, child.size), told)
        else:
            merged.append(child)
    return merged


def _frozen_reason(tree: Tree) -> str | None:
    return tree.reason if isinstance(tree, Node) and tree.bound is None else None


def leaves(tree: Tree) -> Iterator[Node]:
    """All unbound nodes of a tree."""
    tree = resolve(tree)
    if isinstance(tree, Node):
        yield tree
    else:
        for child in children(tree):
            yield from leaves(child)


def children(tree: Tree) -> tuple[Tree, ...]:
    """What a resolved tree is made of; nothing for a leaf."""
    if isinstance(tree, Prod):
        return tree.factors
    if isinstance(tree, Cat):
        return tree.parts
    return tree.options if isinstance(tree, Choice) else ()


def freeze(tree: Tree, reason: str) -> None:
    """Nothing in this tree may move."""
    for node in leaves(tree):
        if node.reason is None:
            node.reason = reason


def unify(a: Tree, b: Tree, reason: str = "axes that do not match") -> None:
    """The two axes move together (sizes equal; a size-1 or expanded axis asks for nothing)."""
    a, b = resolve(a), resolve(b)
    if a is b or isinstance(a, Free) or isinstance(b, Free) or a.size == 1 or b.size == 1:
        return
    if a.size != b.size:
        raise ValueError(f"axes of size {a.size} and {b.size} cannot be one: a rule of the tracer is wrong")
    if isinstance(a, Choice) or isinstance(b, Choice):
        _unify_choices(a, b, reason)
    elif isinstance(a, Node) and isinstance(b, Node):
        _union(a, b)
    elif isinstance(a, Node):
        assert not isinstance(b, Node)
        _bind(a, b, reason)
    elif isinstance(b, Node):
        _bind(b, a, reason)
    elif isinstance(a, Prod) and isinstance(b, Prod):
        _unify_products(a, b, reason)
    elif isinstance(a, Cat) and isinstance(b, Cat):
        for x, y in zip(*_common_cuts(a, b), strict=True):
            unify(x, y, reason)
    elif isinstance(a, Prod) and isinstance(b, Cat):
        _unify_copies(a, b, reason)
    elif isinstance(a, Cat) and isinstance(b, Prod):
        _unify_copies(b, a, reason)


def _union(a: Node, b: Node) -> None:
    keep, drop = (a, b) if a.reason is not None or b.reason is None else (b, a)
    keep.roles |= drop.roles
    keep.joined = True
    drop.bound = keep


def _bind(node: Node, tree: Prod | Cat, reason: str) -> None:
    if node.reason is not None:
        freeze(tree, node.reason)
        return
    inside = list(leaves(tree))
    if node in inside:
        freeze(tree, reason)
        return
    for leaf in inside:
        leaf.joined = True
    node.bound = tree


def _unify_choices(a: Tree, b: Tree, reason: str) -> None:
    if isinstance(a, Choice) and isinstance(b, Choice) and resolve(a.marker) is resolve(b.marker):
        for x, y in zip(a.options, b.options, strict=True):
            unify(x, y, reason)
    else:
        unify(collapse(a), collapse(b), reason)


def collapse(tree: Tree) -> Tree:
    """The tree with all options of every choice made one."""
    tree = resolve(tree)
    if isinstance(tree, Choice):
        for other in tree.options[1:]:
            unify(tree.options[0], other)
        return collapse(tree.options[0])
    if isinstance(tree, Prod):
        return resolve(Prod([collapse(f) for f in tree.factors]))
    return resolve(Cat([collapse(p) for p in tree.parts])) if isinstance(tree, Cat) else tree


def choose(tree: Tree, marker: Tree, position: int) -> Tree:
    """The tree at one position of the marker."""
    tree = resolve(tree)
    if isinstance(tree, Choice):
        return choose(tree.options[position], marker, position) if resolve(tree.marker) is resolve(marker) else tree
    if isinstance(tree, Prod):
        return resolve(Prod([choose(f, marker, position) for f in tree.factors]))
    return resolve(Cat([choose(p, marker, position) for p in tree.parts])) if isinstance(tree, Cat) else tree


def spelled_out(tree: Tree) -> Tree:
    """The tree with every marker and its choices written as a concatenation."""
    tree = resolve(tree)
    if isinstance(tree, Cat):
        return resolve(Cat([spelled_out(p) for p in tree.parts]))
    if not isinstance(tree, Prod):
        return collapse(tree)
    for i, marker in enumerate(tree.factors):
        rest = Prod(tree.factors[i + 1 :])
        if any(m is marker for m in markers(rest)):
            parts = [spelled_out(choose(rest, marker, k)) for k in range(marker.size)]
            return resolve(Prod([*tree.factors[:i], Cat(parts)]))
    return resolve(Prod([spelled_out(f) for f in tree.factors]))


def markers(tree: Tree) -> Iterator[Tree]:
    """The markers of all choices in a tree."""
    tree = resolve(tree)
    if isinstance(tree, Choice):
        yield resolve(tree.marker)
    for child in children(tree):
        yield from markers(child)


def take_apart(axis: Tree, reason: str) -> None:
    """Positions of this axis are picked one by one, so it cannot move.

    Where it is a factor of a split axis of which nothing else is known yet, as the 3 of a fused qkv, what lies inside
    need not be the same for all positions: it becomes a `Choice`.
    """
    axis = resolve(axis)
    if isinstance(axis, Node) and axis.reason is None and axis.inner:
        parts = [leaf for tree in axis.inner for leaf in leaves(tree)]
        if not any(part.reason or part.joined for part in parts):
            for part in parts:
                part.bound = Choice(axis, [Node(part.size) for _ in range(axis.size)])
    freeze(axis, reason)


def _unify_products(a: Prod, b: Prod, reason: str) -> None:
    left, right = list(a.factors), list(b.factors)
    while left and right:
        x, y = resolve(left.pop(0)), resolve(right.pop(0))
        if x.size == y.size:
            unify(x, y, reason)
            continue
        (big, small), rest = ((x, y), left) if x.size > y.size else ((y, x), right)
        if isinstance(big, Cat):  # a product and a concatenation: it keeps its order, what comes after it may move
            freeze(big, reason)
            big = resolve(big)
        if isinstance(big, Node) and big.size % small.size == 0:
            head, tail = _split_node(big, [small.size, big.size // small.size])
            unify(head, small, reason)
            rest.insert(0, tail)
        else:
            for tree in (big, small, *left, *right):
                freeze(tree, reason)
            return


def _split_node(node: Node, sizes: Sequence[int]) -> list[Node]:
    """Refine a node to a product of the given sizes."""
    parts = [Node(size, node.reason) for size in sizes]
    if node.reason is None:
        node.bound = Prod(parts)
    for i, part in enumerate(parts):
        part.inner = (*parts[i + 1 :], *(node.inner or ()))
        part.joined = node.joined and node.inner is not None
    return parts


def _unify_copies(product: Prod, concat: Cat, reason: str) -> None:
    """k parts against a product (k rest): the leading factor freezes and every part is the rest."""
    parts, first = concat.parts, resolve(product.factors[0])
    rest = resolve(Prod(product.factors[1:]))
    if first.size == len(parts) and all(p.size == rest.size for p in parts):
        freeze(first, "order of copies")
        for i, part in enumerate(parts):
            unify(part, choose(rest, first, i), reason)
    else:
        freeze(product, reason)
        freeze(concat, reason)


def _common_cuts(a: Cat, b: Cat) -> tuple[list[Tree], list[Tree]]:
    edges = sorted(_edges(a) | _edges(b))
    sizes = [end - start for start, end in zip([0, *edges], edges, strict=False)]
    return cut(a, sizes), cut(b, sizes)


def _edges(concat: Cat) -> set[int]:
    total, edges = 0, set()
    for part in concat.parts:
        total += part.size
        edges.add(total)
    return edges


def cut(tree: Tree, sizes: Sequence[int]) -> list[Tree]:
    """The consecutive pieces of an axis (split, chunk, slice), refining it where that is possible."""
    tree = resolve(tree)
    if len(sizes) == 1:
        return [tree]
    if isinstance(tree, Free):
        return [Free(size) for size in sizes]
    if isinstance(tree, Choice):
        return _each_option(tree, lambda option: cut(option, sizes))
    if isinstance(tree, Node):
        parts: list[Tree] = [Node(size, tree.reason) for size in sizes]
        if tree.reason is None:
            tree.bound = Cat(parts)
        return parts
    if isinstance(tree, Cat):
        return _cut_concat(tree, sizes)
    first, rest = resolve(tree.factors[0]), resolve(Prod(tree.factors[1:]))
    if all(size % rest.size == 0 for size in sizes):
        counts = [size // rest.size for size in sizes]
        if max(counts) == 1:
            freeze(first, "order of slices")
        return [resolve(Prod([piece, rest])) for piece in cut(first, counts)]
    freeze(tree, "cut across a product")
    return [frozen(size, "cut across a product") for size in sizes]


def _cut_concat(tree: Cat, sizes: Sequence[int]) -> list[Tree]:
    queue, pieces = list(tree.parts), []
    for size in sizes:
        taken: list[Tree] = []
        while sum(t.size for t in taken) < size:
            part = queue.pop(0)
            missing = size - sum(t.size for t in taken)
            if part.size > missing:
                part, remainder = cut(part, [missing, part.size - missing])
                queue.insert(0, remainder)
            taken.append(part)
        pieces.append(resolve(Cat(taken)))
    return pieces


def factor(tree: Tree, sizes: Sequence[int]) -> list[Tree]:
    """The axis seen as a product of the given sizes (view, unflatten), refining it where that is possible."""
    tree = resolve(tree)
    if len(sizes) == 1:
        return [tree]
    if isinstance(tree, Free):
        return [Free(size) for size in sizes]
    if isinstance(tree, Node):
        return list(_split_node(tree, sizes))
    if isinstance(tree, Choice):
        return _each_option(tree, lambda option: factor(option, sizes))
    return _factor_concat(tree, sizes) if isinstance(tree, Cat) else _factor_product(tree, sizes)


def _factor_concat(tree: Cat, sizes: Sequence[int]) -> list[Tree]:
    """A view of a concatenation, whose parts may have a number of leading positions each.

    What lies inside may differ between parts of equal size, and is one for the others.
    """
    count, inner = len(tree.parts), prod(sizes[1:])
    if any(part.size % inner for part in tree.parts):
        freeze(tree, "view across a concatenation")
        return [frozen(size, "view across a concatenation") for size in sizes]
    if len({part.size for part in tree.parts}) == 1:
        choice = Choice(frozen(count, "order of parts"), tree.parts)
        if sizes[0] == count:
            return [choice.marker, *factor(choice, sizes[1:])]
        first, *rest = factor(choice, [sizes[0] // count, *sizes[1:]])
        return [Prod([choice.marker, first]), *rest]
    pieces = [factor(part, [part.size // inner, *sizes[1:]]) for part in tree.parts]
    for others in pieces[1:]:
        for one, other in zip(pieces[0][1:], others[1:], strict=True):
            unify(one, other)
    return [resolve(Cat([piece[0] for piece in pieces])), *pieces[0][1:]]


def _each_option(choice: Choice, work: Callable[[Tree], list[Tree]]) -> list[Tree]:
    """The pieces of a choice: choices among the options' pieces."""
    return [Choice(choice.marker, pieces) for pieces in zip(*map(work, choice.options), strict=True)]


def _factor_product(tree: Prod, sizes: Sequence[int]) -> list[Tree]:
    queue, result = list(tree.factors), []
    for size in sizes:
        taken: list[Tree] = []
        while (have := prod(t.size for t in taken)) < size:
            part = resolve(queue.pop(0))
            need = size // have
            if part.size > need:
                if size % have or part.size % need:
                    freeze(tree, "view across factors")
                    return [frozen(s, "view across factors") for s in sizes]
                head, *tail = factor(part, [need, part.size // need])
                queue[:0] = tail
                part = head
            taken.append(part)
        if prod(t.size for t in taken) != size:
            freeze(tree, "view across factors")
            return [frozen(s, "view across factors") for s in sizes]
        result.append(resolve(Prod(taken)))
    return result
