"""Axis trees while they are being solved for: union-find nodes that can later be refined.

Every tensor axis of a traced graph carries a tree. `unify` states that two axes must move together. A node that meets
a finer tree (a product or concatenation) is *bound* to it, and every axis that shares the node sees the refinement.
Where two trees cannot be matched both are frozen: that loses a symmetry, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import TypeAlias

Tree: TypeAlias = "Node | Prod | Cat | Free"


class Node:
    """A set of `size` units that move as one; `reason` is None while it may move, else why it is frozen."""

    __slots__ = ("bound", "reason", "roles", "size")

    def __init__(self, size: int, reason: str | None = None):
        self.size = size
        self.reason = reason
        self.bound: Node | Prod | Cat | None = None
        self.roles: set[str] = set()


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


def frozen(size: int, reason: str) -> Node:
    return Node(size, reason)


def resolve(tree: Tree) -> Tree:
    """The tree as known by now, flattened: no bound nodes, size-1 factors or adjacent frozen neighbours left in it."""
    if isinstance(tree, Node):
        return resolve(tree.bound) if tree.bound is not None else tree
    if isinstance(tree, Free):
        return tree
    if isinstance(tree, Prod):
        children = [c for f in tree.factors for c in _flat(resolve(f), Prod) if c.size != 1]
        merged = _merge_frozen(children, lambda a, b: a * b)
        return merged[0] if len(merged) == 1 else Prod(merged) if merged else frozen(1, "size 1")
    children = [c for p in tree.parts for c in _flat(resolve(p), Cat) if c.size != 0]
    merged = _merge_frozen(children, lambda a, b: a + b)
    return merged[0] if len(merged) == 1 else Cat(merged) if merged else frozen(0, "empty")


def _flat(tree: Tree, kind: type) -> tuple[Tree, ...]:
    if isinstance(tree, Prod) and kind is Prod:
        return tree.factors
    if isinstance(tree, Cat) and kind is Cat:
        return tree.parts
    return (frozen(tree.size, "expanded"),) if isinstance(tree, Free) else (tree,)


def _merge_frozen(children: list[Tree], combine: Callable[[int, int], int]) -> list[Tree]:
    merged: list[Tree] = []
    for child in children:
        reason = _frozen_reason(merged[-1]) if merged else None
        if reason is not None and _frozen_reason(child) is not None:
            merged[-1] = frozen(combine(merged[-1].size, child.size), reason)
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
    elif isinstance(tree, Prod | Cat):
        for child in tree.factors if isinstance(tree, Prod) else tree.parts:
            yield from leaves(child)


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
    if isinstance(a, Node) and isinstance(b, Node):
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
    drop.bound = keep


def _bind(node: Node, tree: Prod | Cat, reason: str) -> None:
    if node.reason is not None:
        freeze(tree, node.reason)
        return
    if any(leaf is node for leaf in leaves(tree)):
        freeze(tree, reason)
        return
    node.bound = tree


def _unify_products(a: Prod, b: Prod, reason: str) -> None:
    left, right = list(a.factors), list(b.factors)
    while left and right:
        x, y = resolve(left.pop(0)), resolve(right.pop(0))
        if x.size == y.size:
            unify(x, y, reason)
            continue
        (big, small), rest = ((x, y), left) if x.size > y.size else ((y, x), right)
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
    return parts


def _unify_copies(product: Prod, concat: Cat, reason: str) -> None:
    """k parts against a product (k rest): the leading factor freezes and every part is the rest."""
    parts, first = concat.parts, resolve(product.factors[0])
    rest = resolve(Prod(product.factors[1:]))
    if first.size == len(parts) and all(p.size == rest.size for p in parts):
        freeze(first, "order of copies")
        for part in parts:
            unify(part, rest, reason)
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
    if isinstance(tree, Node):
        parts: list[Tree] = [Node(size, tree.reason) for size in sizes]
        if tree.reason is None:
            tree.bound = Cat(parts)
        return parts
    if isinstance(tree, Cat):
        return _cut_concat(tree, sizes)
    first, rest = resolve(tree.factors[0]), resolve(Prod(tree.factors[1:]))
    if all(size % rest.size == 0 for size in sizes):
        freeze(first, "order of slices")
        return [Prod([frozen(size // rest.size, "order of slices"), rest]) for size in sizes]
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
    if isinstance(tree, Cat):
        freeze(tree, "view across a concatenation")
        return [frozen(size, "view across a concatenation") for size in sizes]
    return _factor_product(tree, sizes)


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
