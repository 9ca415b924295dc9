"""Specs for kinds of models, registered by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

from torch import nn

from hf_tsc.permutation import PermutationSpec

SpecFunction = Callable[[Any], PermutationSpec]
F = TypeVar("F", bound=SpecFunction)

_SPECS: dict[str, SpecFunction] = {}


@overload
def register_spec(name: str) -> Callable[[F], F]: ...
@overload
def register_spec(name: str, function: F) -> F: ...
def register_spec(name: str, function: F | None = None) -> F | Callable[[F], F]:
    """Register the function that makes the spec of a kind of model; without `function`, a decorator.

    Args:
        name: a class name (`MyNet`) or a model type (`config.model_type`). What was registered under it is replaced.
        function: takes the model, returns its spec.
    """
    if function is None:
        return lambda decorated: register_spec(name, decorated)
    _SPECS[name] = function
    return function


def registered_spec(model: nn.Module) -> PermutationSpec | None:
    """The spec registered for the model's class name, else for its `config.model_type`, else None."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for name in (type(model).__name__, model_type):
        if name in _SPECS:
            return _SPECS[name](model)
    return None
