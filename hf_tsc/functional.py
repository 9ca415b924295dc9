"""Points of weight space: those of models, and calling a network at one that is not its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_tsc.permutation import Params

Network = TypeVar("Network", bound=nn.Module)


def call_at(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Any:
    """The output of a network with the given parameters and buffers in place of its own."""
    forget_caches(model)
    try:
        return torch.func.functional_call(model, dict(tensors), kwargs=dict(inputs))
    finally:
        forget_caches(model)


def forget_caches(model: nn.Module) -> None:
    """Drop what modules have computed from their weights and kept.

    LeViT keeps its attention biases in evaluation mode, and goes on using those of the first call whatever its weights
    become; like others that keep something, it forgets when it is switched to training.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, mode in modes:
        module.training = mode


def model_at(model: Network, tensors: Mapping[str, Tensor]) -> Network:
    """A copy of a network with the given parameters and buffers in place of its own."""
    made = copy.deepcopy(model)
    saved = made.state_dict()
    made.load_state_dict({**saved, **{name: tensor for name, tensor in tensors.items() if name in saved}})
    forget_caches(made)
    return made


def tensors_of(model: nn.Module) -> Params:
    """All parameters and buffers by name, detached: the tensors themselves, not copies."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
