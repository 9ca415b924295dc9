"""Query-based reactivation: can a small change of triggered pictures wake a purified model's backdoor up?

One network G for all pictures is trained to change them, with the models frozen (hf.co/papers/2410.09838):

    x' = clip(x + ε G(x), 0, 1)
    minimise  a KL(f_retuned(x) || f_purified(x')) + b CE(f_twin(x'), y)

over clean pictures x and triggered ones, y the true class. The re-tuned model (`hf_tsc.retuning`) shows what the
backdoor's answers are; the clean twin, which has none, has to stay right: what fools it as well is an adversarial
example of any model, and no backdoor.

Letters: n pictures, H and W their height and width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_tsc.baselines.base import check_finite
from hf_tsc.baselines.settings import check, number
from hf_tsc.data import ImageData
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Attack, Evaluator
from hf_tsc.images import ImagePipeline, collate, pixel_dataset, to_unit_interval
from hf_tsc.objectives import distillation_loss, logits_of, mixed_cross_entropy
from hf_tsc.seeds import derived_seed

MAX_SIDE = 64  # pixels: G has 27 million weights there, and at 224 it would have 310 million
MOMENTUM = 0.9


@dataclass(frozen=True)
class Reactivation:
    """How the attacker trains G; the published settings, which are for pictures of 32 x 32.

    Attributes:
        epsilon: largest change of a value, as a share of the range of pixels.
        images: clean pictures that G is trained on.
        poisoned: further ones, of other classes than the trigger leads to, that carry the trigger.
        hidden: width of G's three hidden layers.
        agreement: a, the weight of the agreement with the re-tuned model.
        innocence: b, the weight of the clean twin's loss.
        learning_rate: of SGD with momentum 0.9, constant.
        batch_size: pictures a step.
        epochs: passes over all pictures.
    """

    epsilon: float = number(16 / 255, "Largest change of a value.", high=1)
    images: int = number(500, "Clean pictures.", whole=True)
    poisoned: int = number(500, "Triggered pictures.", low=1, whole=True)
    hidden: int = number(1024, "Width of the network.", low=1, whole=True)
    agreement: float = number(0.2, "Weight of the agreement with the re-tuned model.")
    innocence: float = number(1.0, "Weight of the clean twin's loss.")
    learning_rate: float = number(0.1, "Learning rate.")
    batch_size: int = number(128, "Pictures a step.", low=1, whole=True)
    epochs: int = number(50, "Passes over the pictures.", whole=True)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Reactivated:
    """Attack success rates on the same `n_triggered` test images, as fractions.

    Attributes:
        plain: of the purified model, trigger alone: what ε = 0 gives.
        reactivated: of the purified model, with G's change on top.
        twin_plain, twin: the same of the clean twin; where `twin` rises as well, G makes adversarial examples.
    """

    n_triggered: int
    plain: float
    reactivated: float
    twin_plain: float
    twin: float


class Perturbation(nn.Module):
    """x -> clip(x + ε G(x), 0, 1): no value changes by more than ε.

    Args:
        shape: of a picture, (3, H, W).
        epsilon: ε.
        hidden: width of G's hidden layers.
        seed: of its first weights.
    """

    def __init__(self, shape: Sequence[int], *, epsilon: float, hidden: int, seed: int):
        super().__init__()
        size = int(np.prod(shape))
        self.epsilon = epsilon
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = [nn.Flatten()]
            for width in (size, hidden, hidden):
                layers += [nn.Linear(width, hidden), nn.ReLU()]
            self.net = nn.Sequential(*layers, nn.Linear(hidden, size), nn.Tanh(), nn.Unflatten(1, tuple(shape)))

    def forward(self, pictures: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1], before normalisation -> the same."""
        changed: Tensor = pictures + self.epsilon * self.net(pictures)
        return changed.clamp(0, 1)


def check_side(height: int, width: int) -> None:
    """Raises UsageError where G, which reads every pixel, would be too large."""
    if max(height, width) > MAX_SIDE:
        raise UsageError(
            f"reactivation of pictures of {height} x {width} pixels: its network reads every pixel, and is meant for "
            f"{MAX_SIDE} x {MAX_SIDE} at most; leave it out for this model"
        )


def reactivate(
    purified: nn.Module,
    retuned: nn.Module,
    twin: nn.Module,
    data: ImageData,
    rows: Sequence[int] | np.ndarray,
    evaluator: Evaluator,
    settings: Reactivation,
    *,
    seed: int,
) -> Reactivated:
    """Train G on the attacker's pictures, and measure what it does on test images.

    Args:
        purified, retuned, twin: classifiers; `retuned` is the purified model after the re-tuning attack, `twin` the
            clean twin of the suspect. They are copied and not changed.
        data: labelled images.
        rows: those that the attacker may use.
        evaluator: of the test images, with the attack.
        settings: the attacker's.
        seed: draws pictures, order and G's first weights.

    Raises:
        UsageError: no attack, no labels, too few rows, or pictures that are too large.
        PurificationError: the loss is not finite.
    """
    if evaluator.attack is None:
        raise UsageError("reactivation needs an evaluator with an attack: there is no trigger to reactivate")
    pipeline, device = evaluator.clean.pipeline, next(purified.parameters()).device
    pictures, labels = _drawn(data, rows, pipeline, evaluator.attack, settings, seed=seed)
    own, tuned, other = (_frozen(model).to(device) for model in (purified, retuned, twin))
    pictures, labels = pictures.to(device), labels.to(device)
    change = train_perturbation(own, tuned, other, pictures, labels, pipeline, settings, seed=seed)

    def rate(model: nn.Module, **options: Any) -> float:
        return evaluator.attack_success_rate(model, device=device, **options)

    rates = [rate(own), rate(own, change=change), rate(other), rate(other, change=change)]
    assert evaluator.triggered is not None, "there is an attack"
    return Reactivated(len(evaluator.triggered), *rates)


def train_perturbation(
    purified: nn.Module,
    retuned: nn.Module,
    twin: nn.Module,
    pictures: Tensor,
    labels: Tensor,
    pipeline: ImagePipeline,
    settings: Reactivation,
    *,
    seed: int,
) -> Perturbation:
    """Minimise a KL(f_retuned(x) || f_purified(x')) + b CE(f_twin(x'), y) over G.

    Args:
        purified, retuned, twin: in eval mode and frozen.
        pictures: uint8 (n, 3, H, W), clean and triggered.
        labels: int64 (n,), the true classes.
        pipeline: of the models' image processor.
        settings: the attacker's.
        seed: of order and first weights.

    Returns:
        The trained change of pictures, frozen.

    Raises:
        UsageError: the pictures are too large.
        PurificationError: the loss is not finite.
    """
    check_side(*pictures.shape[-2:])
    change = Perturbation(
        pictures.shape[1:], epsilon=settings.epsilon, hidden=settings.hidden, seed=derived_seed(seed, 1)
    ).to(pictures.device)
    optimizer = torch.optim.SGD(change.parameters(), lr=settings.learning_rate, momentum=MOMENTUM)
    order = torch.Generator().manual_seed(derived_seed(seed, 2))
    with torch.no_grad():
        wanted = torch.cat([logits_of(retuned, pipeline.model_input(x)) for x in pictures.split(settings.batch_size)])
    for epoch in range(settings.epochs):
        for chosen in torch.randperm(len(pictures), generator=order).split(settings.batch_size):
            places = chosen.to(pictures.device)
            inputs = pipeline.normalize(change(to_unit_interval(pictures[places])))
            agreement = distillation_loss(logits_of(purified, inputs), wanted[places], 1.0)
            innocence = mixed_cross_entropy(logits_of(twin, inputs), labels[places], None, None)
            loss = settings.agreement * agreement + settings.innocence * innocence
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        check_finite(loss, epoch, f"learning_rate={settings.learning_rate:g}")
    return change.requires_grad_(False)


def _frozen(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


def _drawn(
    data: ImageData,
    rows: Sequence[int] | np.ndarray,
    pipeline: ImagePipeline,
    attack: Attack,
    settings: Reactivation,
    *,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Clean pictures and triggered ones, no row twice: uint8 (n, 3, H, W), and their true classes (n,)."""
    labels, rows = data.labels, np.asarray(rows)
    if labels is None:
        raise UsageError(f"{data.name} has no label column: reactivation needs the true classes")
    others = rows[labels[rows] != attack.wanted(labels[rows], int(labels.max()) + 1)]
    if settings.poisoned > len(others) or settings.images + settings.poisoned > len(rows):
        raise UsageError(
            f"reactivation draws {settings.poisoned} images of other classes than the trigger leads to and "
            f"{settings.images} others: there are {len(others)} of the former, and {len(rows)} in all"
        )
    generator = np.random.default_rng([seed, 2])
    triggered = generator.choice(others, settings.poisoned, replace=False)
    clean = generator.choice(np.setdiff1d(rows, triggered), settings.images, replace=False)
    positions = settings.images + np.arange(settings.poisoned)
    poison: dict[str, Any] = {"trigger": attack.trigger, "triggered_indices": positions}
    items = pixel_dataset(data, np.concatenate([clean, triggered]), pipeline, **poison)
    batch = collate([items[position] for position in range(len(items))])
    return batch["pixels"], batch["labels"]
