"""A quadratic Bezier curve through weight space, over the parameters of any module.

    γ(t) = (1-t)² start + 2t(1-t) bend + t² end,        t in [0, 1]

(Garipov et al. 2018, hf.co/papers/1802.10026.) Start and end are frozen, the bend is trained. The mixing happens layer
by layer with `torch.nn.utils.parametrize`, so that DDP and `fully_shard` see ordinary parameters: where all three sets
of weights are sharded, a layer mixes what it has gathered of its own.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from hf_tsc.errors import UsageError
from hf_tsc.functional import forget_caches
from hf_tsc.permutation import Params
from hf_tsc.sharding import whole, write


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
    """Parametrization of one tensor: called with the bend, returns the point of the curve.

    Of a scalar (CLIP's temperature) all three are vectors of one element, as `fully_shard` takes no scalars.
    """

    def __init__(self, tensor: Tensor, position: _Position):
        super().__init__()
        self.shape = tensor.shape
        self.start = nn.Parameter(torch.atleast_1d(tensor.detach()).clone(), requires_grad=False)
        self.end = nn.Parameter(torch.atleast_1d(tensor.detach()).clone(), requires_grad=False)
        self.position = position

    def forward(self, bend: Tensor) -> Tensor:
        return mix(self.start, bend, self.end, t=self.position.t).view(self.shape)

    def right_inverse(self, tensor: Tensor) -> Tensor:
        return torch.atleast_1d(tensor)


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
        # A tensor that a forward touches twice is mixed once; but where layers are gathered one by one, the first time
        # may be before its layer is (ViT looks at a weight's dtype), and what was mixed would be a shard.
        sharded = any(isinstance(parameter, DTensor) for parameter in self.parameters())
        with contextlib.nullcontext() if sharded else parametrize.cached():
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
        """The frozen start, by the names of the wrapped module; the tensors themselves (or shards), not copies."""
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
        """A new curve: both ends are copied in place, the bend starts in their middle.

        The values are whole tensors, also where the curve is sharded.
        """
        for which, values in (("start", start), ("end", end)):
            for name, tensor in self._tensors(which).items():
                write(tensor, values[name])
        for name, tensor in self.bend.items():
            write(tensor, (start[name] + end[name]) / 2)

    @torch.no_grad()
    def point(self, t: float) -> Params:
        """γ(t), as new, whole tensors; of a sharded curve, every process has to ask for it."""
        start, bend, end = self.start, self.bend, self.end
        return {
            name: mix(whole(start[name]), whole(bend[name]), whole(end[name]), t=t).view(self._shape(name))
            for name in self.names
        }

    def _shape(self, name: str) -> torch.Size:
        owner, attribute = _owner(self.model, name)
        shape: torch.Size = owner.parametrizations[attribute][0].shape  # type: ignore[index]
        return shape

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of the layers that FSDP gathers one by one: those that transformers names, and as they are called
        where a layer that owns parameters itself has got a class of its own by `parametrize`."""
        named = set(getattr(self.model, "_no_split_modules", None) or ())
        return sorted({type(m).__name__ for m in self.model.modules() if _class_name(m) in named})


def _class_name(module: nn.Module) -> str:
    """The name of a module's class, without what `parametrize` makes of it."""
    made = type(module)
    return (made.__bases__[0] if parametrize.is_parametrized(module) else made).__name__


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
