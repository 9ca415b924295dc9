"""Names with stars."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches


def matches_of(pattern: str, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The names that a pattern fits, each with what its stars stand for."""
    expression = re.compile("([^.]+)".join(re.escape(piece) for piece in pattern.split("*")))
    return {name: match.groups() for name in names if (match := expression.fullmatch(name))}


def closest(pattern: str, names: Collection[str]) -> str:
    found = get_close_matches(pattern, names, n=1, cutoff=0)
    return f'; the closest name is "{found[0]}"' if found else ""
