"""The permutation spec of a model: the registered one, else the derived one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from hf_tsc.derive import derive_spec
from hf_tsc.permutation import PermutationSpec
from hf_tsc.signatures import registered_spec


def spec_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> PermutationSpec:
    """The spec registered for a model's class or type, else the one that its own graph gives; not verified yet.

    Args:
        model: any model.
        inputs: example inputs by name.

    Raises:
        UsageError: a registered spec does not fit the model.
        PurificationError: the graph cannot be exported.
    """
    registered = registered_spec(model)
    return derive_spec(model, inputs) if registered is None else registered
