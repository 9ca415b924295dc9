"""Follow the suspect inside, too: its hidden states on clean images say more than its answers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_tsc.errors import UsageError
from hf_tsc.objectives.base import Forward
from hf_tsc.processes import add_up, number_of_processes


class HiddenStates:
    """A term of a distillation: how far the hidden states are from those of the teacher.

    The states are those that transformers gives as `hidden_states`: of a ResNet what its stages put out, of a ViT its
    residual stream before and after every block. The term is the mean over the states of the share of the teacher's
    variance that is not explained, Σ |f - g|² / Σ |g - mean g|², sums over the images of a step.

    Args:
        weight: of the term in the loss.
        states: `all` of them, or the `last` one: what the answers are made of, and how it comes about is free.

    Attributes:
        places: indices of the states to choose from; None for all. A copy whose units were permuted has some of its
            states permuted as well, and half way there they are nothing to compare with (`unmoved_states`).
    """

    def __init__(self, weight: float, states: str = "all"):
        self.weight, self.states = weight, states
        self.places: Sequence[int] | None = None

    def at(self, places: Sequence[int]) -> HiddenStates:
        """The same, of these states alone."""
        chosen = copy.copy(self)
        chosen.places = places
        return chosen

    def term(self, output: Any, taught: Any) -> Tensor:
        """The weighted term of what a network and its teacher give for the same inputs."""
        found, target = states_of(output), states_of(taught)
        places = range(len(target)) if self.places is None else self.places
        places = places[-1:] if self.states == "last" else places
        return self.weight * unexplained([found[place] for place in places], [target[place] for place in places])


def following(objective: Any, places: Sequence[int]) -> Any:
    """A copy of an objective with hidden states that follows these alone; where there are none, it follows none."""
    own = copy.copy(objective)
    own.hidden_states = objective.hidden_states.at(places) if places else None
    return own


def call_with_states(forward: Forward, inputs: Tensor) -> Any:
    """The output of a network for pixels (n, 3, H, W), hidden states included."""
    return forward(pixel_values=inputs, output_hidden_states=True)


def states_of(output: Any) -> Sequence[Tensor]:
    """Each (n, ...); of a dual encoder those of its image tower.

    Raises:
        UsageError: there are none.
    """
    image_tower = getattr(output, "vision_model_output", output)
    states = getattr(image_tower, "hidden_states", None)
    if not states:
        raise UsageError(f"{type(output).__name__} has no hidden states to follow: give feature_weight=0")
    return states


def unexplained(found: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Mean over several states, each (n, ...), of Σ |found - target|² / Σ |target - mean target|².

    In several processes, each gives its images, equally many, and the sums of the second are those of all: the mean of
    what the processes return is the value for the whole batch. A state that is the same for all images counts nothing.
    """
    processes = number_of_processes()
    with torch.no_grad():
        target = [_wide(state) for state in target]
        means = [state.mean(0) for state in target]
        add_up(means)
        spreads = [(state - mean / processes).square().sum() for state, mean in zip(target, means, strict=True)]
        add_up(spreads)
    total = torch.zeros((), device=target[0].device, dtype=target[0].dtype)
    for one, other, spread in zip(found, target, spreads, strict=True):
        varies = spread > 0
        missed = (_wide(one) - other).square().sum()
        total = total + varies * missed / torch.where(varies, spread, 1)
    return processes * total / len(target)


def _wide(state: Tensor) -> Tensor:
    """In single precision at least."""
    return state if state.dtype == torch.float64 else state.float()
