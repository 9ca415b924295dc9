"""Ridge reconstruction: the smallest weights that still do on clean images what the suspect's do.

Each linear and convolutional layer in turn, in the order in which they run, gets

    W' = argmin  Σ ‖W' x' - W x‖² + λ s ‖W'‖²  =  W (Σ x x'ᵀ) (Σ x' x'ᵀ + λ s I)⁻¹,    s = tr(Σ x' x'ᵀ) / d

with x what the layer reads in the suspect, x' what it reads behind the layers that were replaced before it, and sums
over all clean images and positions. Directions that clean images hardly use fade, and what only a trigger uses lies
there; nothing is trained, and no labels are needed. BatchNorm keeps the suspect's statistics: those of clean images
alone would amplify again what has faded. (A method of this project, not of a paper; the algebra is that of ridge
regression, layer by layer as in OBS-style compression, hf.co/papers/2208.11580.)

Letters: o outputs of a layer, d inputs (of a convolution channels · height · width of the kernel), N positions.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_tsc.activations import Batch
from hf_tsc.baselines.base import Case, Visit
from hf_tsc.baselines.settings import Settings, choice, number
from hf_tsc.errors import UsageError
from hf_tsc.functional import call_at, tensors_of
from hf_tsc.permutation import Params
from hf_tsc.tsc_config import OBJECTIVES, PAIRWISE

PENALTIES = (0.05, *(k / 10 for k in range(1, 11)))
CHUNK = 2**24  # entries of x that are held at once
Batches = Callable[[], Iterable[Batch]]


@dataclass(frozen=True, kw_only=True)
class Ridge(Settings):
    """No gradient evaluations: the cost is two passes forward over the clean images for each layer and penalty.

    Attributes:
        penalty: λ, relative to the mean squared input of a layer; 0 leaves the suspect as it is.
        max_accuracy_drop: choose it instead, the largest of 0.05, 0.1, 0.2, ... 1 with a score on the held-out images
            at most so many percentage points below the suspect's.
    """

    penalty: float = number(0.3, "Strength: penalty on the weights, relative to a layer's mean squared input.", high=1)
    max_accuracy_drop: float | None = number(
        None, "Choose the penalty instead, so that the held-out accuracy drops at most so many points.", high=100
    )
    objective: str = choice("distillation", OBJECTIVES, "What the score on the held-out images is of.")

    def without_effect(self) -> Sequence[str]:
        teaching = ("teacher_view", "teacher_errors", "feature_weight", "feature_states", "mixup_alpha")
        views = () if self.objective in PAIRWISE else ("augmentation", "temperature", "batch_size")
        return (*teaching, *views, "batch_norm_images")

    def gradient_evaluations(self, images: int) -> int:
        return 0


def run_ridge(case: Case, settings: Ridge, visit: Visit) -> None:
    """Visit the suspect, its layers replaced, at every penalty.

    Raises:
        UsageError: no layer can be replaced.
        AccuracyBudgetError: no penalty keeps `max_accuracy_drop`.
    """
    objective = case.objective_of(settings)

    @functools.cache
    def point(penalty: float) -> Params:
        if penalty == 0:
            return tensors_of(case.suspect)
        return reconstructed(case.suspect, lambda: case.clean_batches(objective), penalty)

    taken = settings.penalty
    if settings.max_accuracy_drop is not None:
        taken = case.farthest_within(objective, point, PENALTIES, settings.max_accuracy_drop)
    point(taken)  # is the method's own work, not that of who visits
    visit("penalty", True, point, taken)


@torch.no_grad()
def reconstructed(model: nn.Module, batches: Batches, penalty: float) -> Params:
    """All tensors of a model with its layers replaced.

    Args:
        model: in eval mode; not changed.
        batches: the clean images as model inputs, anew at each call.
        penalty: λ, above 0.

    Raises:
        UsageError: the model runs no linear or convolutional layer that can be replaced.
    """
    suspect = tensors_of(model)
    weights = dict(suspect)
    names = layers_in_order(model, next(iter(batches())))
    if not names:
        raise UsageError(f"{type(model).__name__} has no linear or convolutional layer that ridge could replace")
    for name in names:
        layer, weight = model.get_submodule(name), suspect[f"{name}.weight"]
        moments = [_moments(layer, *pair) for pair in _read(model, name, [suspect, weights], batches)]
        cross, own = (sum(parts[1:], parts[0]) for parts in zip(*moments, strict=True))
        flat = weight.flatten(1).double()
        new = solve_ridge(flat @ cross, own, penalty)
        weights[f"{name}.weight"] = new.to(weight.dtype).reshape(weight.shape)
    return weights


def solve_ridge(target: Tensor, own: Tensor, penalty: float) -> Tensor:
    """target (own + λ s I)⁻¹ of a target (o, d) and a matrix (d, d) with trace d · s; 0 where there is no input."""
    scale = own.diagonal().mean()
    if scale == 0:
        return torch.zeros_like(target)
    regular = own + penalty * scale * torch.eye(len(own), dtype=own.dtype, device=own.device)
    return torch.cholesky_solve(target.T, torch.linalg.cholesky(regular)).T


def layers_in_order(model: nn.Module, batch: Batch) -> list[str]:
    """Names of the linear layers and ungrouped convolutions that a batch goes through, in the order in which it does.

    A layer that runs several times counts where it first does. Those whose weights another module holds as well are
    left out.
    """
    found: dict[str, None] = {}
    shared = _shared_weights(model)

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: found.setdefault(name)

    hooks = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if _is_replaceable(module) and module.weight.data_ptr() not in shared
    ]
    try:
        model(**batch)
    finally:
        for handle in hooks:
            handle.remove()
    return list(found)


def _is_replaceable(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear)


def _shared_weights(model: nn.Module) -> set[int]:
    places = [parameter.data_ptr() for _, parameter in model.named_parameters(remove_duplicate=False)]
    return {place for place in places if places.count(place) > 1}


class _Reached(Exception):
    """A layer has its input: the rest of the forward pass is not needed."""


def _read(model: nn.Module, name: str, networks: list[Params], batches: Batches) -> Iterable[tuple[Tensor, Tensor]]:
    """What a layer first reads, batch by batch, in each of two networks."""

    def stop(module: nn.Module, args: Any) -> None:
        read.append(args[0])
        raise _Reached

    for batch in batches():
        read: list[Tensor] = []
        handle = model.get_submodule(name).register_forward_pre_hook(stop)
        try:
            for network in networks:
                with contextlib.suppress(_Reached):
                    call_at(model, network, batch)
        finally:
            handle.remove()
        yield read[0], read[1]


def _moments(layer: nn.Module, suspect: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """Σ x x'ᵀ and Σ x' x'ᵀ, (d, d) in double precision, of what a layer reads in the two networks."""
    images = max(1, CHUNK // (2 * _positions(layer, now[:1]).numel()))
    total: list[Tensor] = []
    for one, other in zip(suspect.split(images), now.split(images), strict=True):
        x, y = (_positions(layer, part).double() for part in (one, other))
        parts = [x.T @ y, y.T @ y]
        total = parts if not total else [a + b for a, b in zip(total, parts, strict=True)]
    return total[0], total[1]


def _positions(layer: nn.Module, inputs: Tensor) -> Tensor:
    """(N, d): what each output position of a layer is computed from."""
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        patches = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (n, d, positions)
        return patches.transpose(1, 2).flatten(0, 1)
    return inputs.flatten(0, -2)
