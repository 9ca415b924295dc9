"""Plain fine-tuning on the clean images, and the straight line back to the suspect."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, TrainingArguments

from hf_tsc.activations import Batch
from hf_tsc.batch_norm import recompute_statistics
from hf_tsc.errors import UsageError
from hf_tsc.functional import tensors_of
from hf_tsc.images import AUGMENTATIONS, PixelDataset
from hf_tsc.objective_trainer import ObjectiveTrainer
from hf_tsc.objectives import ImageClassification, Objective
from hf_tsc.permutation import Params
from hf_tsc.tsc_config import OBJECTIVES, PAIRWISE, TEACHER_ERRORS, TEACHER_VIEWS


@dataclass(frozen=True)
class FineTuning:
    """How to fine-tune; names and meanings as in `TSCConfig`, with as many images a step as `batch_size`."""

    steps: int
    learning_rate: float
    batch_size: int = 64
    optim: str = "sgd"
    optim_args: str | None = "momentum=0.9"
    lr_scheduler_type: str = "cosine"
    weight_decay: float = 0.0
    objective: str = "cross_entropy"
    temperature: float = 2.0
    teacher_view: str = "same"
    teacher_errors: str = "keep"
    mixup_alpha: float = 0.0
    augmentation: str = "none"

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UsageError(f"objective={self.objective!r}: expected one of {', '.join(OBJECTIVES)}")
        if self.teacher_view not in TEACHER_VIEWS:
            raise UsageError(f"teacher_view={self.teacher_view!r}: expected one of {', '.join(TEACHER_VIEWS)}")
        if self.teacher_errors not in TEACHER_ERRORS:
            raise UsageError(f"teacher_errors={self.teacher_errors!r}: expected one of {', '.join(TEACHER_ERRORS)}")
        if self.augmentation not in AUGMENTATIONS:
            raise UsageError(f"augmentation={self.augmentation!r}: expected one of {', '.join(AUGMENTATIONS)}")
        for name in ("steps", "batch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)!r}: expected a whole number of 1 or more")
        for name in ("learning_rate", "weight_decay", "temperature", "mixup_alpha"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value >= 0:
                raise UsageError(f"{name}={value!r}: expected a number of 0 or more")


def fine_tune(
    suspect: PreTrainedModel,
    dataset: PixelDataset,
    settings: FineTuning,
    *,
    seed: int,
    objective: Objective | None = None,
    use_cpu: bool = False,
) -> PreTrainedModel:
    """Train a model on, from where it is.

    Args:
        suspect: is copied and not changed; it also teaches, where `settings.objective` is `distillation`.
        dataset: the images to train on.
        settings: how.
        seed: of order and augmentation.
        objective: of models that are no classifiers; by default classification, as the settings say.
        use_cpu: train on the CPU, whatever there is.

    Returns:
        The fine-tuned model in eval mode.

    Raises:
        PurificationError: the loss is not finite.
    """
    model = copy.deepcopy(suspect).requires_grad_(True)
    if objective is None:
        objective = ImageClassification(
            dataset.pipeline,
            augmentation=settings.augmentation,
            teacher=suspect if settings.objective == "distillation" else None,
            temperature=settings.temperature,
            mixup_alpha=settings.mixup_alpha,
            teacher_view=settings.teacher_view,
            teacher_errors=settings.teacher_errors,
        )
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=settings.steps,
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
        ObjectiveTrainer(objective=objective, model=model, args=args, train_dataset=dataset).train()
    return model.eval()


@torch.no_grad()
def interpolate(suspect: PreTrainedModel, tuned: PreTrainedModel, alpha: float, batches: Iterable[Batch]) -> Params:
    """(1 - α) suspect + α tuned, with BatchNorm statistics of its own (WiSE-FT, hf.co/papers/2109.01903).

    Args:
        suspect, tuned: of one architecture.
        alpha: in [0, 1]; 0 and 1 give the two models themselves.
        batches: clean model inputs for the statistics.

    Returns:
        All parameters and buffers.
    """
    if alpha in (0.0, 1.0):
        return tensors_of(tuned if alpha else suspect)
    start, end = dict(suspect.named_parameters()), dict(tuned.named_parameters())
    params = {name: torch.lerp(start[name], end[name], alpha) for name in start}
    return {**params, **recompute_statistics(suspect, params, batches, dict(suspect.named_buffers()))}
