"""The units of a network that a defence prunes, and its linear head: found in the network, not by its name.

A unit's *factor* multiplies what it passes on: of a BatchNorm channel its entry of the scale γ, of a hidden unit (of
an MLP, say) its column in the layer that reads it. A factor of 0 prunes the unit, and the architecture stays.

Letters: n units of one layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from hf_tsc.activations import Batch
from hf_tsc.axes import Atom
from hf_tsc.derive import example_inputs
from hf_tsc.errors import UsageError
from hf_tsc.functional import forget_caches
from hf_tsc.objectives import logits_of
from hf_tsc.permutation import Params
from hf_tsc.specs import spec_of


@dataclass(frozen=True)
class Units:
    """The n units of one layer.

    Attributes:
        weight, dim: the tensor and its axis that hold the factors' entries.
        biases: vectors (n,) that belong to the units.
        size: n.
        module: the layer that has the weight.
        channel: the axis of the units in that layer's input.
    """

    weight: str
    dim: int
    biases: tuple[str, ...]
    size: int
    module: str
    channel: int

    def scaled(self, tensors: Mapping[str, Tensor], factors: Tensor) -> Tensor:
        """The weight with each unit's entries multiplied by its factor; `factors` (n,)."""
        weight = tensors[self.weight]
        shape = [1] * weight.ndim
        shape[self.dim] = self.size
        return weight * factors.view(shape)


def units_of(model: PreTrainedModel) -> list[Units]:
    """Channels of all BatchNorm layers; of a network without, the hidden units of its MLPs.

    A LayerNorm's channel is no such unit: one of them feeds all that reads the residual stream, and its bias is passed
    on even when its scale is 0.

    Raises:
        UsageError: there are neither.
    """
    found = batch_norm_units(model) or hidden_units(model)
    if not found:
        raise UsageError(
            f"{type(model).__name__} has neither BatchNorm layers nor hidden units that one layer makes and another "
            "reads: nothing to prune; use another method"
        )
    return found


def batch_norm_units(model: nn.Module) -> list[Units]:
    """The channels of each BatchNorm layer that has a scale."""
    return [
        Units(f"{name}.weight", 0, (f"{name}.bias",), module.num_features, name, 1)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.affine
    ]


def hidden_units(model: PreTrainedModel) -> list[Units]:
    """Of each hidden space of the permutation spec, in the network's order; by the layer that reads it.

    A space that several layers read, or one that is part of a larger axis, is left out.
    """
    here = on_cpu(model)
    spec = spec_of(here, example_inputs(here))
    parameters = dict(here.named_parameters())
    found = []
    for space in spec.spaces.values():
        members = [(name, dim) for name, dim in spec.members(space.name) if name in parameters]
        weights = [name for name, dim in members if dim == 1 and name.endswith(".weight")]  # of the layers that read
        taps = [
            tap
            for tap in spec.taps  # one a tensor: where several layers read it, the first of them alone
            if tap.side == "input" and tap.axis == Atom(space.name, space.size) and f"{tap.module}.weight" in weights
        ]
        if space.kind == "hidden" and len(weights) == len(taps) == 1:
            biases = {name for name, _ in members if name.endswith(".bias") and parameters[name].ndim == 1}
            found.append(Units(weights[0], 1, tuple(sorted(biases)), space.size, taps[0].module, taps[0].dim))
    return found


def head_units(model: PreTrainedModel) -> Units:
    """The features that the linear head reads.

    Raises:
        UsageError: the model has no linear head.
    """
    name = linear_head(model)
    head = model.get_submodule(name)
    assert isinstance(head, nn.Linear)
    return Units(f"{name}.weight", 1, (), head.in_features, name, -1)


@torch.no_grad()
def linear_head(model: PreTrainedModel) -> str:
    """The name of the linear layer whose output is the logits.

    Raises:
        UsageError: there is none, or no single one.
    """
    here = on_cpu(model)
    outputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output))
        for name, module in here.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        logits = logits_of(here, example_inputs(here)["pixel_values"])
    finally:
        for hook in hooks:
            hook.remove()
    for name, output in reversed(outputs.items()):
        if output.numel() == logits.numel() and torch.equal(output.reshape(logits.shape), logits):
            return name
    raise UsageError(
        f"{type(model).__name__} has no linear layer whose output is its logits: this method works on the head; use "
        "another one"
    )


def prune(tensors: Params, pruned: Iterable[tuple[Units, Tensor]]) -> Params:
    """Zero the factors' entries of some units.

    Args:
        tensors: parameters and buffers; not written to.
        pruned: layers of units, and which of each are pruned, bool (n,).
    """
    result = dict(tensors)
    for units, mask in pruned:
        result[units.weight] = units.scaled(result, (~mask).to(result[units.weight]))
    return result


@torch.no_grad()
def mean_activations(model: nn.Module, layers: Sequence[Units], batches: Iterable[Batch]) -> list[Tensor]:
    """Mean |activation| of each unit over all images and positions, (n,) float64 on the CPU for each layer."""
    sums = [torch.zeros(units.size, dtype=torch.float64) for units in layers]
    counts = [0] * len(layers)

    def reader(place: int) -> object:
        def read(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            activations = inputs[0].movedim(layers[place].channel, -1).flatten(0, -2)  # (m, n)
            sums[place] += activations.abs().sum(0).cpu().double()
            counts[place] += len(activations)

        return read

    hooks = [
        model.get_submodule(units.module).register_forward_pre_hook(reader(place))  # type: ignore[arg-type]
        for place, units in enumerate(layers)
    ]
    try:
        for batch in batches:
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [total / count for total, count in zip(sums, counts, strict=True)]


def on_cpu(model: PreTrainedModel) -> PreTrainedModel:
    """Where examples are; a copy, if the model is elsewhere."""
    if model.device.type == "cpu":
        forget_caches(model)
        return model
    moved: PreTrainedModel = copy.deepcopy(model).to(torch.device("cpu"))  # type: ignore[arg-type]
    return moved
