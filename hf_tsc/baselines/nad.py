"""NAD, neural attention distillation (Li et al. 2021, hf.co/papers/2101.05930).

A teacher, the suspect fine-tuned, shows the suspect where to look: with the attention map of a layer's output F,

    A(F)_n = Σ_d |F_nd|²  over channels d, divided by its norm over the N positions n
    loss   = CE + Σ_l w_l Σ_n (A_l(student) - A_l(teacher))²,       mean over the images

The published weights β multiply a mean over positions, so that w = β / N: 500, 1000 and 1000 on maps of 1024, 256
and 64 positions.

Layers. Of pictures of channels, what a stage of the network ends with, for the last three sizes of picture. Of tokens,
what the MLPs add to the residual stream at a half, three quarters and the whole of the depth: after a LayerNorm every
token would have the same sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_tsc.baselines.base import Case, Visit
from hf_tsc.baselines.fine_tuning import tune, visit_line
from hf_tsc.baselines.settings import Training, limits, number
from hf_tsc.baselines.units import hidden_units, on_cpu
from hf_tsc.derive import example_inputs
from hf_tsc.errors import UsageError
from hf_tsc.objective_trainer import ObjectiveTrainer

DEPTHS = (1 / 2, 3 / 4, 1)  # of a network of tokens


@dataclass(frozen=True, kw_only=True)
class NAD(Training):
    """Published settings; one gradient evaluation a step, those of the teacher's fine-tuning included.

    Attributes:
        weights: w of the last three maps, the last one last.
        teacher_epochs, teacher_steps, teacher_learning_rate: of the teacher's fine-tuning.
    """

    weights: list[float] = field(
        default_factory=lambda: [0.5, 4.0, 16.0], metadata=limits("Weights of the last three attention maps.")
    )
    teacher_epochs: float = number(10.0, "Passes over the training images that make the teacher.")
    teacher_steps: int | None = number(
        None, "Steps that make the teacher; overrides teacher_epochs.", low=1, whole=True
    )
    teacher_learning_rate: float = number(0.1, "Peak learning rate of the teacher's fine-tuning.")
    epochs: float = number(20.0, "Passes over the training images.")
    learning_rate: float = number(0.1, "Peak learning rate.")
    weight_decay: float = number(1e-4, "Weight decay.")

    def of_the_teacher(self) -> Training:
        """How the teacher is fine-tuned."""
        rate = self.teacher_learning_rate
        return replace(self, steps=self.teacher_steps, epochs=self.teacher_epochs, learning_rate=rate)

    def gradient_evaluations(self, images: int) -> int:
        return self.number_of_steps(images) + self.of_the_teacher().number_of_steps(images)


def run_nad(case: Case, settings: NAD, visit: Visit) -> None:
    """Make the teacher, distil it, and visit the line back to the suspect.

    Raises:
        UsageError: the suspect has no layers that make maps of more than one position.
        PurificationError: the loss is not finite.
    """
    layers = attention_layers(case.suspect)[-len(settings.weights) :]
    weights = settings.weights[-len(layers) :]
    objective = case.objective_of(settings)
    teacher = tune(case, settings.of_the_teacher(), objective)
    made = functools.partial(_AttentionTrainer, teacher=teacher, layers=layers, weights=weights)
    student = tune(case, settings, objective, trainer=made)
    visit_line(case, settings, objective, student, visit)


def attention_map(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W), or tokens (B, T, D) -> (B, N): sums of squares over channels, of norm 1.

    Of T tokens those of the picture are the last N, the largest square number: class and register tokens come first.
    A map that is 0 everywhere stays 0.
    """
    energy = features.square().sum(1).flatten(1) if features.ndim == 4 else features.square().sum(-1)
    if features.ndim == 3:
        energy = energy[:, energy.shape[1] - math.isqrt(energy.shape[1]) ** 2 :]
    norm = energy.norm(dim=1, keepdim=True)
    return energy / torch.where(norm > 0, norm, 1)


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_l w_l Σ_n (A_l(student) - A_l(teacher))², mean over images; features as in `attention_map`."""
    terms = [
        weight * (attention_map(one) - attention_map(other)).square().sum(1).mean()
        for one, other, weight in zip(student, teacher, weights, strict=True)
    ]
    return torch.stack(terms).sum()


def attention_layers(model: PreTrainedModel) -> list[str]:
    """Names of the layers whose maps are compared, in the network's order.

    Raises:
        UsageError: there are none.
    """
    shapes = _output_shapes(model)
    readers = [units.module for units in hidden_units(model) if len(shapes.get(units.module, ())) == 3]
    if readers:
        return list(dict.fromkeys(readers[math.ceil(depth * len(readers)) - 1] for depth in DEPTHS))
    height, width = example_inputs(on_cpu(model))["pixel_values"].shape[-2:]
    sizes = {  # channels last would look like other sizes: a picture keeps its proportions
        name: (shape[2], shape[3])
        for name, shape in shapes.items()
        if len(shape) == 4 and shape[2] * width == shape[3] * height <= height * width
    }
    last: dict[tuple[int, int], str] = {}
    for name, size in sizes.items():  # in the order in which layers end: a stage after all that is in it
        if math.prod(size) > 1 and all(sizes.get(outer, size) == size for outer in _containers(name)):
            last[size] = name
    if not last:
        raise UsageError(
            f"{type(model).__name__} has no layers with maps of more than one position: NAD compares such maps; use "
            "another method"
        )
    return list(last.values())


def _containers(name: str) -> list[str]:
    """The modules that a module is part of; the first layers of a stage still have the size of the stage before."""
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(1, len(parts))]


@torch.no_grad()
def _output_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shapes of what the layers give, in the order in which they end; without LayerNorms, and the network itself."""
    here, shapes = on_cpu(model), dict[str, tuple[int, ...]]()

    def record(_: nn.Module, __: Any, output: Any, *, name: str) -> None:
        if isinstance(output, Tensor):
            shapes[name] = tuple(output.shape)

    hooks = [
        module.register_forward_hook(functools.partial(record, name=name))
        for name, module in here.named_modules()
        if name and not isinstance(module, nn.LayerNorm)
    ]
    try:
        here(**example_inputs(here))
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


class _AttentionTrainer(ObjectiveTrainer):
    """Adds the distance of the attention maps to the loss, both networks seeing the same pictures."""

    def __init__(self, *, teacher: PreTrainedModel, layers: list[str], weights: list[float], **kwargs: Any):
        super().__init__(**kwargs)
        self.teacher, self.layers, self.map_weights = teacher.requires_grad_(False).eval(), layers, weights

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        student, teacher = _Outputs(self.bare_model, self.layers), _Outputs(self.teacher, self.layers)

        def both(**given: Tensor) -> Any:
            with torch.no_grad(), teacher:
                self.teacher(**given)
            with student:
                return model(**given)

        loss = super().compute_loss(both, inputs, *args, **kwargs)  # type: ignore[arg-type]
        return loss + attention_loss(student.found, teacher.found, self.map_weights)


class _Outputs:
    """What some layers give, while it is entered."""

    def __init__(self, model: nn.Module, layers: Sequence[str]):
        self.model, self.layers = model, layers
        self.found: list[Tensor] = []

    def __enter__(self) -> None:
        self.found.clear()
        self.hooks = [
            self.model.get_submodule(name).register_forward_hook(lambda _, __, output: self.found.append(output))
            for name in self.layers
        ]

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()
