"""The gate: a spec is used only after it has been seen to keep the function of the very model at hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_tsc.axes import index
from hf_tsc.derive.export import fixed_outputs
from hf_tsc.errors import PurificationError
from hf_tsc.functional import call_at
from hf_tsc.permutation import Params, PermutationSpec, apply, identity, roll

TOLERANCE = 1e-10  # relative, in float64
CASTING_TOLERANCE = 1e-5  # where the network casts to float32 inside


@dataclass(frozen=True)
class Verification:
    """What the gate measured.

    Attributes:
        error: largest absolute output change over the largest absolute output, all spaces moved at once.
        control: the same with one member of a space left behind; it must be large. None where nothing moves.
    """

    error: float
    control: float | None


def verify(model: nn.Module, spec: PermutationSpec, inputs: Mapping[str, Tensor], *, seed: int = 0) -> Verification:
    """Check numerically that a spec keeps the function of a model's architecture.

    Weights and statistics are randomised first, in float64: at usual values (unit scales, zero biases) about half of
    all mistakes cannot be seen.

    Raises:
        PurificationError: the outputs change; names the spaces that fail alone.
    """
    probe = Probe(model, inputs, seed=seed)
    permutation = roll(spec)
    error = probe.error(apply(probe.params, spec, permutation))
    allowed = tolerance(spec)
    if not error < allowed:
        raise PurificationError(
            f"the permutation spec of {type(model).__name__} does not keep its function: relative error {error:.1e}, "
            f"allowed {allowed:.0e}; spaces that fail alone: {', '.join(failing_spaces(probe, spec)) or 'none'}"
        )
    return Verification(error, _control(probe, spec))


def tolerance(spec: PermutationSpec) -> float:
    """The relative error that rounding alone may cause."""
    return CASTING_TOLERANCE if spec.casts else TOLERANCE


def failing_spaces(probe: Probe, spec: PermutationSpec) -> list[str]:
    """The spaces that change the output when only they move."""
    moved, still, failing = roll(spec), identity(spec), []
    for name in spec.spaces:
        if not probe.error(apply(probe.params, spec, {**still, name: moved[name]})) < tolerance(spec):
            failing.append(name)
    return failing


def _control(probe: Probe, spec: PermutationSpec) -> float | None:
    """The error with one member axis left behind: shows that the probe can see a mistake."""
    if not spec.spaces:
        return None
    name, dim = next((n, d) for n, d in spec.moved() if len(spec.axes[n]) > 1)
    return probe.error(apply_without(probe.params, spec, name, dim))


def apply_without(params: Params, spec: PermutationSpec, name: str, dim: int) -> Params:
    """All spaces moved, except along axis `dim` of the tensor `name`."""
    moved = apply(params, spec, roll(spec))
    back = index(spec.axes[name][dim], roll(spec)).argsort()
    return {**moved, name: moved[name].index_select(dim, back)}


class Probe:
    """A randomised float64 copy of a model that tells how far its outputs are from the original ones."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor], *, seed: int = 0):
        self.model = copy.deepcopy(model).to("cpu", torch.float64).eval()
        self.inputs = {k: v.to("cpu", torch.float64) if v.is_floating_point() else v.cpu() for k, v in inputs.items()}
        self.params = randomised(self.model, seed=seed)
        self.reference = self._run(self.params)

    def error(self, params: Params) -> float:
        """Largest relative deviation over the fixed outputs."""
        outputs = self._run(params)
        pairs = zip(outputs, self.reference, strict=True)
        return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)

    def _run(self, params: Params) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return fixed_outputs(call_at(self.model, params, self.inputs))


def randomised(model: nn.Module, *, seed: int) -> Params:
    """Random values for every floating tensor: U(0.5, 1.5) for vectors and buffers (scales, statistics), for other
    parameters N(0, 1/fan-in)."""
    generator = torch.Generator().manual_seed(seed)
    result: Params = {}
    buffers = dict(model.named_buffers())
    for name, tensor in {**dict(model.named_parameters()), **buffers}.items():
        if not tensor.is_floating_point() or tensor.ndim == 0:
            continue
        if tensor.ndim == 1 or name in buffers:
            result[name] = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
        else:
            fan_in = max(tensor.numel() // tensor.shape[0], 1)
            result[name] = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / fan_in**0.5
    return result
