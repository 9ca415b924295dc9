"""The curve of TSC between a network and a permuted copy of it, while the network is trained.

For a permutation P the copy Πθ = π(θ, P) is a linear function of the weights θ, and with it each point of the curve,
whose bend is (θ + Πθ)/2 + Δ:

    γ(t) = (1-t) θ + t Πθ + 2t(1-t) Δ,        ∇ L(γ(t)) by θ = ((1-t) Id + t Πᵀ) ∇L at γ(t)

So a gradient comes to θ from both ends, directly and through the copy; P and Δ are constants between two renewals.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_tsc.activations import Batch
from hf_tsc.functional import call_at, tensors_of
from hf_tsc.images import PixelDataset, collate
from hf_tsc.objectives import Forward, logits_of, mixed_cross_entropy
from hf_tsc.passes import match_networks
from hf_tsc.permutation import KINDS, Kind, Params, PermutationSpec, apply, identity
from hf_tsc.tsc_config import family_defaults

WINDOW = (0.1, 0.9)  # of t: beyond it the weights are nearly those of an end
CHUNK = 128  # images a forward pass for statistics
MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def draw_t(draw: np.random.Generator) -> float:
    """t ~ U(0.1, 0.9)."""
    return float(draw.uniform(*WINDOW))


class CurveToCopy:
    """The defender's curve between a network and a permuted copy of it, as the network is trained.

    Args:
        model: the network that is trained.
        spec: its permutation spec.
        images: the attacker's own clean ones, with labels.
        unaligned_only: un-align all copies; else every second one is permuted at random.
        bend_steps: that Δ is trained for.
        bend_optimizer: makes the optimiser of these steps.
        batch_size: images a step of Δ.
        seed: of all that is drawn.

    Attributes:
        kinds: of the spaces that move, as by the defaults of the model's family.
        permutation: P; at first the identity.
        bend: Δ by the names of parameters; nothing where it is 0.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: PermutationSpec,
        images: PixelDataset,
        *,
        unaligned_only: bool,
        bend_steps: int,
        bend_optimizer: MakeOptimizer,
        batch_size: int,
        seed: int,
    ):
        self.model, self.spec, self.seed = model, spec, seed
        self.unaligned_only, self.bend_steps, self.batch_size = unaligned_only, bend_steps, batch_size
        self.bend_optimizer = bend_optimizer
        self.pipeline, self.images = images.pipeline, collate([images[k] for k in range(len(images))])
        self.kinds: Collection[Kind] = family_defaults(model).get("move_spaces", KINDS)
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
        optimizer = self.bend_optimizer(self.bend.values())
        self.model.train()  # batch statistics, as on the defender's curve
        for _ in range(self.bend_steps):
            places = torch.from_numpy(draw.permutation(len(self.images["pixels"]))[: self.batch_size])
            batch = {name: tensor[places].to(self.model.device) for name, tensor in self.images.items()}
            logits = logits_of(self.forward_at(draw_t(draw)), self.pipeline.model_input(batch["pixels"]))
            optimizer.zero_grad()
            mixed_cross_entropy(logits, batch["labels"], None, None).backward(inputs=list(self.bend.values()))
            optimizer.step()
        return {name: delta.detach() for name, delta in self.bend.items()}


def random_permutation(
    spec: PermutationSpec, kinds: Collection[Kind] = KINDS, *, seed: tuple[int, ...]
) -> dict[str, Tensor]:
    """A random permutation of every space of some kinds, another one in each block of a nested space."""
    draw = np.random.default_rng(seed)
    drawn = {name: torch.from_numpy(draw.random(spec.shape(name)).argsort(-1)) for name in spec.spaces}
    return {name: drawn[name] if spec.spaces[name].kind in kinds else still for name, still in identity(spec).items()}
