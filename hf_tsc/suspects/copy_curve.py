"""The curve of TSC between a network and a permuted copy of it, while the network is trained.

For a permutation P the copy Πθ = π(θ, P) is a linear function of the weights θ, and with it each point of the curve,
whose bend is (θ + Πθ)/2 + Δ:

    γ(t) = (1-t) θ + t Πθ + 2t(1-t) Δ,        ∇ L(γ(t)) by θ = ((1-t) Id + t Πᵀ) ∇L at γ(t)

So a gradient comes to θ from both ends, directly and through the copy; P and Δ are constants between two renewals.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hf_tsc.activations import Batch
from hf_tsc.derive import example_inputs
from hf_tsc.functional import call_at, model_at, tensors_of
from hf_tsc.images import PixelDataset, collate
from hf_tsc.objectives import Forward, ImageClassification, Objective
from hf_tsc.objectives.hidden_states import following
from hf_tsc.passes import match_networks
from hf_tsc.permutation import KINDS, Kind, Params, PermutationSpec, apply, identity
from hf_tsc.seeds import derived_seed
from hf_tsc.tsc_config import TSCConfig
from hf_tsc.unmoved_states import unmoved_states

WINDOW = (0.1, 0.9)  # of t: beyond it the weights are nearly those of an end
CHUNK = 128  # images a forward pass for statistics


def draw_t(draw: np.random.Generator) -> float:
    """t ~ U(0.1, 0.9)."""
    return float(draw.uniform(*WINDOW))


class CurveToCopy:
    """The defender's curve between a network and a permuted copy of it, as the network is trained.

    Args:
        model: the network that is trained.
        spec: its permutation spec.
        images: the attacker's own clean ones, with labels.
        defence: how the defender is expected to purify: what moves, and Δ's loss, window, optimiser and batch.
        unaligned_only: un-align all copies; else every second one is permuted at random.
        bend_steps: that Δ is trained for.
        seed: of all that is drawn.

    Attributes:
        kinds: of the spaces that move.
        permutation: P; at first the identity.
        bend: Δ by the names of parameters; nothing where it is 0.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: PermutationSpec,
        images: PixelDataset,
        *,
        defence: TSCConfig,
        unaligned_only: bool,
        bend_steps: int,
        seed: int,
    ):
        self.model, self.spec, self.seed, self.defence = model, spec, seed, defence
        self.unaligned_only, self.bend_steps = unaligned_only, bend_steps
        self.pipeline, self.images = images.pipeline, collate([images[k] for k in range(len(images))])
        kinds: Any = defence.move_spaces
        self.kinds: Collection[Kind] = kinds
        self.network = copy.deepcopy(model).eval()  # is read at the model's weights
        self.permutation = identity(spec)
        self.bend: Params = {}

    def point(self, t: float) -> Params:
        """γ(t), new tensors through which gradients flow to the model's parameters."""
        start: Params = dict(self.model.named_parameters())
        end = apply(start, self.spec, self.permutation)
        line = {name: torch.lerp(start[name], end[name], t) for name in start}
        return {**line, **{name: line[name] + 2 * t * (1 - t) * delta for name, delta in self.bend.items()}}

    def forward_at(self, t: float) -> Forward:
        """Calls the network at γ(t), in its present mode; its running statistics stay those of its own weights."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        tensors = {**self.point(t), **buffers}
        return lambda **inputs: call_at(self.model, tensors, inputs)

    def renew(self, count: int) -> None:
        """The copy number `count`, from 0, and its bend."""
        at_random = count % 2 == 1 and not self.unaligned_only
        self.permutation = (
            random_permutation(self.spec, self.kinds, seed=(self.seed, count)) if at_random else self._unaligned()
        )
        self.bend = {}
        if self.bend_steps > 0:
            self.bend = self._trained_bend(np.random.default_rng([self.seed, count, 1]))

    def _unaligned(self) -> dict[str, Tensor]:
        """As TSC begins."""

        def batches() -> Iterator[Batch]:
            for pixels in self.images["pixels"].split(CHUNK):
                yield {"pixel_values": self.pipeline.model_input(pixels.to(self.model.device))}

        points = [tensors_of(self.model)]
        options: dict[str, Any] = {"maximize": False, "kinds": self.kinds, "seed": self.seed}
        return identity(self.spec) | match_networks(self.network, self.spec, batches, points=points, **options)

    def _trained_bend(self, draw: np.random.Generator) -> Params:
        """Δ after some steps on clean images."""
        self.bend = {name: torch.zeros_like(p, requires_grad=True) for name, p in self.model.named_parameters()}
        made, options = Trainer.get_optimizer_cls_and_kwargs(self.defence)
        optimizer = made(list(self.bend.values()), **options, weight_decay=self.defence.weight_decay)
        objective, size = self._objective(), self.defence.per_device_train_batch_size
        self.model.train()  # batch statistics, as on the defender's curve
        for step in range(self.bend_steps):
            places = torch.from_numpy(draw.permutation(len(self.images["pixels"]))[:size])
            batch = {name: tensor[places].to(self.model.device) for name, tensor in self.images.items()}
            low, high = self.defence.curve1_window
            there = self.forward_at(float(draw.uniform(low, high)))
            optimizer.zero_grad()
            loss = objective.loss(there, batch, seed=derived_seed(self.seed, step, 2))
            loss.backward(inputs=list(self.bend.values()))
            optimizer.step()
        return {name: delta.detach() for name, delta in self.bend.items()}

    def _objective(self) -> Objective:
        """The defender's; the network as it stands is his suspect."""
        suspect: Any = model_at(self.network, tensors_of(self.model)).eval().requires_grad_(False)
        objective = ImageClassification.of(self.defence, self.pipeline, suspect.to(self.model.device))
        return objective if objective.hidden_states is None else following(objective, self._unmoved)

    @cached_property
    def _unmoved(self) -> list[int]:
        return unmoved_states(self.network, self.spec, self.kinds, example_inputs(self.network))


def random_permutation(
    spec: PermutationSpec, kinds: Collection[Kind] = KINDS, *, seed: tuple[int, ...]
) -> dict[str, Tensor]:
    """A random permutation of every space of some kinds, another one in each block of a nested space."""
    draw = np.random.default_rng(seed)
    drawn = {name: torch.from_numpy(draw.random(spec.shape(name)).argsort(-1)) for name in spec.spaces}
    return {name: drawn[name] if spec.spaces[name].kind in kinds else still for name, still in identity(spec).items()}
