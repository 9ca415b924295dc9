"""A quadratic Bezier curve through weight space, over the parameters of any module.

    γ(t) = (1-t)² start + 2t(1-t) bend + t² end,        t in [0, 1]

(Garipov et al. 2018, hf.co/papers/1802.10026.) Start and end are frozen, the bend is trained. The mixing happens layer
by layer with `torch.nn.utils.parametrize`, so that DDP and `fully_shard` see ordinary parameters: with all three sets
of weights sharded alike, each layer mixes its own shards.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_tsc.errors import UsageError
from hf_tsc.functional import forget_caches
from hf_tsc.permutation import Params


def bezier_weights(t: float) -> tuple[float, float, float]:
    """Weights of start, bend and end at t; they sum to 1."""
    return (1 - t) ** 2, 2 * t * (1 - t), t**2


def mix(start: Tensor, bend: Tensor, end: Tensor, *, t: float) -> Tensor:
    """γ(t) of three tensors of one shape, as a new tensor; exactly `start` at t = 0 and `end` at t = 1.

    As the weights sum to 1, two interpolations do: between the ends, then, in place, towards the bend. The weighted
    sum would take two temporaries and one more pass over memory.
    """
    a, c, b = bezier_weights(t)
    return torch.lerp(start, end, b / (a + b)).lerp_(bend, c)  # a + b = 1 - c >= 1/2


class _Position:
    """Where on the curve all layers stand."""

    def __init__(self) -> None:
        self.t = 0.5


class _Mix(nn.Module):
    """Parametrization of one tensor: called with the bend, returns the point of the curve."""

    def __init__(self, tensor: Tensor, position: _Position):
        super().__init__()
        self.start = nn.Parameter(tensor.detach().clone(), requires_grad=False)
        self.end = nn.Parameter(tensor.detach().clone(), requires_grad=False)
        self.position = position

    def forward(self, bend: Tensor) -> Tensor:
        return mix(self.start, bend, self.end, t=self.position.t)

    def right_inverse(self, tensor: Tensor) -> Tensor:
        return tensor


class CurveModel(nn.Module):
    """A module whose parameters are a point of a trainable curve.

    Args:
        model: any module; it is copied. Start, bend and end begin as its parameters.

    Attributes:
        t: the point at which `forward` runs.

    Raises:
        UsageError: two layers share a parameter.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.position = _Position()
        self.model = copy.deepcopy(model)
        self.names = [name for name, _ in self.model.named_parameters()]
        if tied := {name for name, _ in self.model.named_parameters(remove_duplicate=False)} - set(self.names):
            raise UsageError(
                f"{', '.join(sorted(tied))} shared with another layer: a curve needs untied parameters; copy them"
            )
        for name in self.names:
            owner, attribute = _owner(self.model, name)
            mix = _Mix(getattr(owner, attribute), self.position)
            parametrize.register_parametrization(owner, attribute, mix, unsafe=True)
            owner.parametrizations[attribute].original.requires_grad_(True)  # type: ignore[index, union-attr]

    @property
    def t(self) -> float:
        return self.position.t

    @t.setter
    def t(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"t = {value}: a point of the curve has t in [0, 1]")
        self.position.t = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            forget_caches(self.model)
        with parametrize.cached():  # a tensor that a forward touches twice is mixed once
            return self.model(*args, **kwargs)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As of a transformers model, for `--activation_checkpointing`: layers are computed anew in the backward pass.

        Until then t has to stay what it was in the forward pass.

        Raises:
            UsageError: the architecture has no layers that it can do this for.
        """
        try:
            self.model.activation_checkpointing_enable(*args, **kwargs)  # type: ignore[operator]
        except (AttributeError, ValueError) as error:
            raise UsageError(
                f"activation_checkpointing: {type(self.model).__name__} does not support it; leave it out, and save "
                "memory by a smaller per_device_train_batch_size with gradient_accumulation_steps"
            ) from error

    def _tensors(self, which: str) -> Params:
        found: Params = {}
        for name in self.names:
            owner, attribute = _owner(self.model, name)
            entry: Any = owner.parametrizations[attribute]  # type: ignore[index]
            found[name] = entry.original if which == "bend" else getattr(entry[0], which)
        return found

    @property
    def start(self) -> Params:
        """The frozen start, by the names of the wrapped module; the tensors themselves, not copies."""
        return self._tensors("start")

    @property
    def bend(self) -> Params:
        """The trainable bend."""
        return self._tensors("bend")

    @property
    def end(self) -> Params:
        """The frozen end."""
        return self._tensors("end")

    @torch.no_grad()
    def set_ends(self, start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> None:
        """A new curve: both ends are copied in place, the bend starts in their middle."""
        for which, values in (("start", start), ("end", end)):
            for name, tensor in self._tensors(which).items():
                tensor.copy_(values[name])
        for name, tensor in self.bend.items():
            tensor.copy_((start[name] + end[name]) / 2)

    @torch.no_grad()
    def point(self, t: float) -> Params:
        """γ(t), as new tensors."""
        start, bend, end = self.start, self.bend, self.end
        return {name: mix(start[name], bend[name], end[name], t=t) for name in self.names}


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
