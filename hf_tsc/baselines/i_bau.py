"""I-BAU, backdoor unlearning by implicit hypergradients (Zeng et al. 2022, hf.co/papers/2110.03735).

    min over θ of max over δ of the mean loss of f(x + δ),        one δ for all images

δ is found by gradient ascent. A step of θ follows the whole derivative of h, the loss at (δ(θ), θ); how δ answers to θ
comes from the fixed point δ = Φ(δ, θ) = δ - a ∂g/∂δ of the ascent, by K steps of

    v_{k+1} = (∂Φ/∂δ)ᵀ v_k + ∂h/∂δ,        dh/dθ = ∂h/∂θ + (∂Φ/∂θ)ᵀ v_K

Letters: δ (1, 3, H, W), in units of a picture's range [0, 1]; K fixed-point steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from hf_tsc.activations import Batch
from hf_tsc.baselines.base import Case, Visit, check_finite
from hf_tsc.baselines.fine_tuning import visit_line
from hf_tsc.baselines.settings import Settings, number
from hf_tsc.images import Augmentation, to_unit_interval
from hf_tsc.objectives import logits_of
from hf_tsc.seeds import derived_seed


@dataclass(frozen=True, kw_only=True)
class IBAU(Settings):
    """Published settings; an inner step is one gradient evaluation, an outer one K + 3.

    `objective` says what images are labelled with: `cross_entropy` takes the labels, `distillation` the suspect's own
    answers. There is no mixup, and hidden states are not followed.

    Attributes:
        rounds: of an inner and an outer pass over the training images each; published: 3 to 5.
        learning_rate: of θ, by Adam.
        inner_learning_rate: of δ, by plain gradient descent, from 0 in each round.
        penalty: weight of |δ|² in the inner loss.
        fixed_point_steps: K; 0 takes δ for a constant.
        fixed_point_rate: a.
        perturbed_share: of a batch that δ is added to in the outer loss; of one image at least.
    """

    rounds: int = number(5, "Rounds of an inner and an outer pass.", low=1, whole=True)
    learning_rate: float = number(1e-3, "Learning rate of the weights.")
    inner_learning_rate: float = number(10.0, "Learning rate of the perturbation.")
    penalty: float = number(0.001, "Weight of the perturbation's square.")
    fixed_point_steps: int = number(5, "Fixed-point steps of the hypergradient.", whole=True)
    fixed_point_rate: float = number(0.1, "Rate in the fixed-point equation.")
    perturbed_share: float = number(0.01, "Share of a batch that is perturbed in the outer loss.", high=1)
    batch_size: int = number(100, "Images a gradient evaluation.", low=1, whole=True)

    def without_effect(self) -> Sequence[str]:
        return ("mixup_alpha", "temperature", "teacher_view", "teacher_errors", "feature_weight", "feature_states")

    def gradient_evaluations(self, images: int) -> int:
        return self.rounds * math.ceil(images / self.batch_size) * (1 + self.fixed_point_steps + 3)


def run_i_bau(case: Case, settings: IBAU, visit: Visit) -> None:
    """Unlearn, and visit the line back to the suspect.

    Raises:
        PurificationError: a loss is not finite.
    """
    model = copy.deepcopy(case.suspect).requires_grad_(True).eval()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=settings.learning_rate)
    with _differentiable_twice():
        for number_of_round in range(settings.rounds):
            batches = list(_batches(case, settings, number_of_round))
            delta = find_perturbation(model, case, settings, [pictures for pictures, _ in batches])
            for pictures, labels in batches:
                perturbed = max(1, round(settings.perturbed_share * len(pictures)))

                def outer(delta: Tensor, x: Tensor = pictures, y: Tensor = labels, n: int = perturbed) -> Tensor:
                    return _loss(model, case, torch.cat([x[:n] + delta, x[n:]]), y)

                def inner(delta: Tensor, x: Tensor = batches[0][0], y: Tensor = batches[0][1]) -> Tensor:
                    return settings.penalty * delta.square().sum() - _loss(model, case, x + delta, y)

                gradients = hypergradient(
                    outer, inner, delta, weights, rate=settings.fixed_point_rate, steps=settings.fixed_point_steps
                )
                optimizer.zero_grad()
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight.grad = gradient
                optimizer.step()
            check_finite(
                torch.stack([weight.detach().sum() for weight in weights]),
                number_of_round,
                f"learning_rate={settings.learning_rate:g}",
            )
    visit_line(case, settings, case.objective_of(settings), model, visit)


def find_perturbation(model: PreTrainedModel, case: Case, settings: IBAU, pictures: Sequence[Tensor]) -> Tensor:
    """δ after one pass of gradient descent on -CE(f(x + δ), f's own answer to x) + penalty |δ|², from 0."""
    delta = torch.zeros_like(pictures[0][:1], requires_grad=True)
    for step, x in enumerate(pictures):
        with torch.no_grad():
            answers = logits_of(model, case.train.pipeline.normalize(x)).argmax(-1)
        loss = settings.penalty * delta.square().sum() - _loss(model, case, x + delta, answers)
        check_finite(loss, step, f"inner_learning_rate={settings.inner_learning_rate:g}")
        (gradient,) = torch.autograd.grad(loss, delta)
        delta = (delta - settings.inner_learning_rate * gradient).detach().requires_grad_(True)
    return delta


def hypergradient(
    outer: Callable[[Tensor], Tensor],
    inner: Callable[[Tensor], Tensor],
    delta: Tensor,
    weights: Sequence[Tensor],
    *,
    rate: float,
    steps: int,
) -> list[Tensor]:
    """dh/dθ through the fixed point of the inner descent; see the module's head.

    Args:
        outer, inner: h and g, functions of δ that also depend on the weights.
        delta: the inner solution.
        weights: θ; those that a loss does not depend on get zeros.
        rate: a.
        steps: K; 0 gives ∂h/∂θ.
    """
    direct = torch.autograd.grad(outer(delta), [delta, *weights], allow_unused=True)
    by_delta = torch.zeros_like(delta) if direct[0] is None else direct[0]
    found = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, direct[1:], strict=True)]
    (slope,) = torch.autograd.grad(inner(delta), delta, create_graph=True)
    v = torch.zeros_like(delta)
    for _ in range(steps):
        (curved,) = torch.autograd.grad(slope, delta, v, retain_graph=True, allow_unused=True)
        v = v - rate * (0 if curved is None else curved) + by_delta
    mixed = torch.autograd.grad(slope, list(weights), v, allow_unused=True)
    return [g if m is None else g - rate * m for g, m in zip(found, mixed, strict=True)]


def _loss(model: PreTrainedModel, case: Case, pictures: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(model, case.train.pipeline.normalize(pictures)), labels)


def _batches(case: Case, settings: IBAU, number_of_round: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All training images once, in an order of the round: pictures in [0, 1] and labels (n,)."""
    augmentation = Augmentation(settings.augmentation)
    for step, batch in enumerate(case.shuffled(settings.batch_size, derived_seed(case.seed, number_of_round, 4))):
        pictures = augmentation(
            to_unit_interval(batch["pixels"]), seed=derived_seed(case.seed, number_of_round, step, 5)
        )
        yield pictures, _labels(case, settings, batch)


def _labels(case: Case, settings: IBAU, batch: Batch) -> Tensor:
    if settings.objective == "cross_entropy":
        return batch["labels"]
    with torch.no_grad():
        return logits_of(case.suspect, case.train.pipeline.model_input(batch["pixels"])).argmax(-1)


@contextmanager
def _differentiable_twice() -> Iterator[None]:
    """Fused attention has no second derivative (pytorch#116350); its plain formula has."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
