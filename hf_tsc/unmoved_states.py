"""Which hidden states of a network stay as they are when its units are permuted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_tsc.derive.verify import Probe, tolerance
from hf_tsc.functional import call_at
from hf_tsc.objectives.hidden_states import states_of
from hf_tsc.permutation import Kind, Params, PermutationSpec, apply, identity, roll


def unmoved_states(
    model: nn.Module, spec: PermutationSpec, kinds: Collection[Kind], inputs: Mapping[str, Tensor]
) -> list[int]:
    """Indices of the hidden states that are the same in a network and in any copy with permuted units.

    Found by comparing the two, in float64 and at random weights, as the gate of a spec does.

    Args:
        model: gives its hidden states when asked to (`output_hidden_states`).
        spec: of the model.
        kinds: of the spaces that move.
        inputs: two different images or more: states that do not vary among them are left out.

    Raises:
        UsageError: the model gives no hidden states.
    """
    probe = Probe(model, inputs)
    moved, still = roll(spec), identity(spec)
    permutation = {name: (moved if space.kind in kinds else still)[name] for name, space in spec.spaces.items()}
    before = _states(probe, probe.params)
    after = _states(probe, apply(probe.params, spec, permutation))
    allowed = tolerance(spec)
    return [
        place
        for place, (one, other) in enumerate(zip(before, after, strict=True))
        if (one - other).abs().max() < allowed * one.abs().max() and not torch.equal(one[0], one[1])
    ]


def _states(probe: Probe, params: Params) -> list[Tensor]:
    inputs: dict[str, Any] = {**probe.inputs, "output_hidden_states": True}
    with torch.no_grad():
        return list(states_of(call_at(probe.model, params, inputs)))
