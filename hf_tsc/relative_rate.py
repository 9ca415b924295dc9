"""A learning rate in proportion to the size of weights, where a network does not depend on that size.

What a BatchNorm makes of a layer stays the same when the layer's weights w are multiplied by c > 0, but for the
BatchNorm's epsilon. The gradient is divided by c, so that a step of SGD turns the weights as one of a c²-th of the
rate (van Laarhoven 2017, hf.co/papers/1706.05350): a rate that purifies one network leaves the backdoor in another
that does the same with larger weights, of a training with less weight decay. With a rate in proportion to |w|², steps
without gradient clipping are the same in both.

One factor is taken for all such layers, so that they keep their proportions: the geometric mean of |w|² over their
units, w the weights of a unit, relative to what it is in the networks that the default rate was searched on. That
networks of another width want a rate in this proportion, too, is an observation (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from hf_tsc.layers import LAYERS

ALIVE = 1e-3  # of the mean |w|² of a layer
REFERENCE = 0.24  # of the ResNets of recipes/cifar10 that the default rate was searched on


@torch.no_grad()
def weights_before_batch_norm(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """The weights of linear layers and convolutions whose output a BatchNorm takes, at most in another shape.

    Args:
        model: in eval mode.
        inputs: of its forward.

    Returns:
        Their names, and the axis of their units.
    """
    made: list[tuple[Tensor, str, int]] = []  # kept, as another tensor could take the place of one that is gone
    found: dict[str, int] = {}
    handles = []

    def make(name: str, axis: int) -> Any:
        return lambda _module, _inputs, output: made.append((output, f"{name}.weight", axis))

    def take(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        found.update({name: axis for output, name, axis in made if _same_numbers(output, given[0])})

    for name, module in model.named_modules():
        if layer := LAYERS.get(type(module)):
            handles.append(module.register_forward_hook(make(name, layer.output)))
        elif isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(take))
    try:
        like = next(model.parameters())
        model(**{name: x.to(like if x.is_floating_point() else like.device) for name, x in inputs.items()})
    finally:
        for handle in handles:
            handle.remove()
    return found


def rate_factor(weights: Sequence[Tensor]) -> float:
    """The geometric mean of |w|² over all units, w (inputs of a unit) its weights, as a multiple of the reference.

    Args:
        weights: of layers, (units, ...); 1 without any. Units that weight decay has emptied, with less than a
            thousandth of what their layer has on average, do not count.
    """
    sizes = [w.detach().double().flatten(1).square().sum(1).cpu() for w in weights]
    alive = torch.cat([torch.ones(0), *(size[size > ALIVE * size.mean()] for size in sizes)])
    return float(alive.log().mean().exp()) / REFERENCE if len(alive) else 1.0


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def scale_rate(optimizer: Optimizer, parameters: Sequence[Tensor], factor: float) -> None:
    """Give some of an optimizer's parameters a group of their own, of a rate that is `factor` times as high.

    Their weight decay, which acts in proportion to the rate, stays what it is.

    Args:
        optimizer: without a state yet; changed.
        parameters: all in one of its groups.
        factor: of the rate.
    """
    chosen = {id(parameter) for parameter in parameters}
    group = next(group for group in optimizer.param_groups if any(id(p) in chosen for p in group["params"]))
    own = [parameter for parameter in group["params"] if id(parameter) in chosen]
    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
    changed = {"lr": factor * group["lr"], "weight_decay": group["weight_decay"] / factor}
    optimizer.add_param_group({**group, "params": own, **changed})
