"""Plain fine-tuning on the clean images, and the straight line back to the suspect."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from hf_tsc.activations import Batch
from hf_tsc.baselines.base import Case, Point, Visit
from hf_tsc.baselines.settings import Settings, Training, number
from hf_tsc.batch_norm import recompute_statistics
from hf_tsc.functional import tensors_of
from hf_tsc.images import PixelDataset
from hf_tsc.objective_trainer import ObjectiveTrainer
from hf_tsc.objectives import Objective
from hf_tsc.permutation import Params
from hf_tsc.tsc_config import PAIRWISE


@dataclass(frozen=True, kw_only=True)
class FineTuning(Training):
    """How to fine-tune; names and meanings as in `TSCConfig`, with as many images a step as `batch_size`."""


def train(
    model: nn.Module,
    dataset: Any,
    settings: Training,
    *,
    objective: Objective,
    seed: int,
    use_cpu: bool = False,
    trainer: Callable[..., ObjectiveTrainer] = ObjectiveTrainer,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train a network in place.

    Args:
        model: what is trained.
        dataset: the images to train on.
        settings: how.
        objective: what for.
        seed: of order and augmentation.
        use_cpu: train on the CPU, whatever there is.
        trainer: makes the trainer.
        callbacks: of the trainer.

    Raises:
        PurificationError: the loss is not finite.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=settings.number_of_steps(len(dataset)),
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.lr_scheduler_type,
            optim=settings.optim,
            optim_args=settings.optim_args,
            weight_decay=settings.weight_decay,
            max_grad_norm=0.0,
            per_device_train_batch_size=settings.batch_size,
            dataloader_drop_last=settings.objective in PAIRWISE,
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            use_cpu=use_cpu,
        )
        made = trainer(objective=objective, model=model, args=args, train_dataset=dataset, callbacks=list(callbacks))
        made.train()


def fine_tune(
    suspect: PreTrainedModel,
    dataset: PixelDataset,
    settings: Training,
    *,
    seed: int,
    objective: Objective | None = None,
    use_cpu: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Train a model on, from where it is.

    Args:
        suspect: is copied and not changed; it also teaches, where `settings.objective` is `distillation`.
        dataset: the images to train on.
        settings: how.
        seed: of order and augmentation.
        objective: of models that are no classifiers; by default classification, as the settings say.
        use_cpu: train on the CPU, whatever there is.
        options: further ones of `train`.

    Returns:
        The fine-tuned model in eval mode.

    Raises:
        PurificationError: the loss is not finite.
    """
    model = copy.deepcopy(suspect).requires_grad_(True)
    chosen = Case(suspect, None, dataset, None, seed).objective_of(settings) if objective is None else objective
    train(model, dataset, settings, objective=chosen, seed=seed, use_cpu=use_cpu, **options)
    return model.eval()


@torch.no_grad()
def interpolate(suspect: PreTrainedModel, tuned: PreTrainedModel, alpha: float, batches: Iterable[Batch]) -> Params:
    """(1 - α) suspect + α tuned, with BatchNorm statistics of its own (WiSE-FT, hf.co/papers/2109.01903).

    Args:
        suspect, tuned: of one architecture.
        alpha: in [0, 1]; 0 and 1 give the two models themselves.
        batches: model inputs for the statistics.

    Returns:
        All parameters and buffers.
    """
    if alpha in (0.0, 1.0):
        return tensors_of(tuned if alpha else suspect)
    start, end = dict(suspect.named_parameters()), dict(tuned.named_parameters())
    params = {name: torch.lerp(start[name], end[name], alpha) for name in start}
    return {**params, **recompute_statistics(suspect, params, batches, dict(suspect.named_buffers()))}


def tune(case: Case, settings: Training, objective: Objective, **options: Any) -> PreTrainedModel:
    """`fine_tune` a case's suspect on its training images."""
    return fine_tune(
        case.suspect, case.train, settings, seed=case.seed, objective=objective, use_cpu=case.use_cpu, **options
    )


def line(case: Case, settings: Settings, objective: Objective, tuned: PreTrainedModel) -> Point:
    """The points of the straight line from a case's suspect (0) to a tuned model (1)."""

    def point(alpha: float) -> Params:
        batches = case.statistics_batches(objective, settings.batch_norm_images)
        return interpolate(case.suspect, tuned, alpha, batches)

    return point


def visit_line(case: Case, settings: Settings, objective: Objective, tuned: PreTrainedModel, visit: Visit) -> None:
    """The straight line from the suspect (0) to a tuned model (1), which is taken."""
    visit("interpolation", True, line(case, settings, objective, tuned), 1.0)


def run_fine_tuning(case: Case, settings: FineTuning, visit: Visit) -> None:
    """Fine-tune, and visit the line back to the suspect."""
    objective = case.objective_of(settings)
    visit_line(case, settings, objective, tune(case, settings, objective), visit)


@dataclass(frozen=True, kw_only=True)
class WiSEFT(FineTuning):
    """Interpolated fine-tuning (Wortsman et al. 2022, hf.co/papers/2109.01903): fine-tune hard, and go half way back.

    Attributes:
        alpha: the point taken on the line from the suspect (0) to the fine-tuned model (1); published: 0.5.
        max_accuracy_drop: choose it instead, from 0.05, 0.1, ... 1: the point farthest from the suspect whose score on
            the held-out images is at most so many percentage points below the suspect's.
    """

    alpha: float = number(0.5, "The point taken between the suspect (0) and the fine-tuned model (1).", high=1)
    max_accuracy_drop: float | None = number(
        None, "Choose alpha instead, so that the held-out accuracy drops at most so many points.", high=100
    )


def run_wise_ft(case: Case, settings: WiSEFT, visit: Visit) -> None:
    """Fine-tune, and take a point of the line back to the suspect."""
    objective = case.objective_of(settings)
    point = line(case, settings, objective, tune(case, settings, objective))
    taken = settings.alpha
    if settings.max_accuracy_drop is not None:
        positions = [k / 20 for k in range(1, 21)]
        taken = case.farthest_within(objective, point, positions, settings.max_accuracy_drop)
    visit("interpolation", True, point, taken)
