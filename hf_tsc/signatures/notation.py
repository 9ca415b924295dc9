"""The notation of one axis, as written: parsed, with its sizes left open."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from hf_tsc.axes import Concat, Product
from hf_tsc.errors import UsageError
from hf_tsc.permutation import KINDS


@dataclass(frozen=True)
class Leaf:
    """One space as written, or frozen positions (`space` is empty); `size` is None where it is left open."""

    space: str
    size: int | None = None
    parent: str | None = None

    def __str__(self) -> str:
        if not self.space:
            return f"_{self.size or ''}"
        return self.space + (f":{self.size}" if self.size else "") + (f"@{self.parent}" if self.parent else "")


@dataclass(frozen=True)
class Group:
    """A product or concatenation as written."""

    join: type[Product] | type[Concat]
    children: tuple[Description, ...]


Description = Leaf | Group

_TOKEN = re.compile(r"[()+,]|[^\s()+,]+")
_POSITIONS = re.compile(r"_([1-9]\d*)?")
_SPACE = re.compile(r"([^:@]+)(?::([1-9]\d*))?(?:@([^:@]+))?")
KIND = re.compile(rf"(?:.*\.)?({'|'.join(KINDS)})(?:_\d+)?")


def parse_axis(text: str) -> Description:
    """One axis in the notation of `hf_tsc.axes`, its sizes left open.

    Raises:
        UsageError: the text is no axis.
    """
    if text.count("(") != text.count(")"):
        raise UsageError(f'"{text}" has unbalanced parentheses: {text.count("(")} "(" and {text.count(")")} ")"')
    tokens = deque(_TOKEN.findall(text))
    description = _parse_items(tokens, text, inside=False)
    if tokens:
        raise UsageError(f'"{text}": the axis ends before {tokens[0]!r}; give one axis')
    return description


def _parse_items(tokens: deque[str], text: str, *, inside: bool) -> Description:
    """Items joined by blanks (a product) or by `+` (a concatenation), up to the end or a closing parenthesis."""
    items, joins = [_parse_item(tokens, text)], set()
    while tokens and tokens[0] not in (")", ","):
        joins.add(Concat if tokens[0] == "+" else Product)
        if tokens[0] == "+":
            tokens.popleft()
        items.append(_parse_item(tokens, text))
    if len(joins) > 1:
        raise UsageError(f'"{text}" has both "+" and blanks in one place: put parentheses round the inner ones')
    if Product in joins and not inside:
        raise UsageError(
            f'"{text}" has blanks outside of parentheses: write "(a b)" for a product, "a, b" for two axes'
        )
    if not joins:
        return items[0]
    join = joins.pop()
    flat = [c for item in items for c in (item.children if isinstance(item, Group) and item.join is join else [item])]
    return Group(join, tuple(flat))


def _parse_item(tokens: deque[str], text: str) -> Description:
    token = tokens.popleft() if tokens else ""
    if token == "(":
        inner = _parse_items(tokens, text, inside=True)
        if not tokens or tokens.popleft() != ")":
            raise UsageError(f'"{text}" has a comma inside of parentheses: blanks separate the factors of a product')
        return inner
    if match := _POSITIONS.fullmatch(token):
        return Leaf("", int(match[1]) if match[1] else None)
    if match := _SPACE.fullmatch(token) if token not in (")", "+", ",") else None:
        return Leaf(match[1], int(match[2]) if match[2] else None, match[3])
    raise UsageError(
        f'"{text}": expected a space ("hidden", "heads:12", "vo@heads"), positions ("_", "_3") or "(", '
        f"got {repr(token) if token else 'nothing'}"
    )


def parse_signature(pattern: str, text: str) -> list[tuple[str, Description]]:
    """The axes of a signature, each as written and parsed."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    try:
        return [(piece.strip(), parse_axis(piece.strip())) for piece in pieces]
    except UsageError as error:
        raise UsageError(f'the signature of "{pattern}": {error}') from None


def leaves_of(node: Description) -> Iterator[Leaf]:
    if isinstance(node, Leaf):
        yield node
    else:
        for child in node.children:
            yield from leaves_of(child)
