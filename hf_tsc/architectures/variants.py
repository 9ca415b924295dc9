"""A tiny model of every architecture that hf_tsc is proven on, each config switch that changes the spec apart.

The models are made from configurations with random weights: nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Variant:
    """One architecture under one setting of the switches that change its symmetry.

    Attributes:
        name: model type, and in parentheses the switch, e.g. `beit(abs)`.
        build: makes the model, at its default initialisation.
    """

    name: str
    build: Callable[[], PreTrainedModel]


VARIANTS: dict[str, Variant] = {}

Builder = Callable[[], PreTrainedModel]


def variant(name: str) -> Callable[[Builder], Builder]:
    """Register a function that makes a tiny model."""

    def register(build: Builder) -> Builder:
        if name in VARIANTS:
            raise ValueError(f"the variant {name!r} is registered twice")
        VARIANTS[name] = Variant(name, build)
        return build

    return register
