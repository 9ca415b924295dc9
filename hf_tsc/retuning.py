"""The re-tuning attack: does a little poisoned training bring the backdoor back? (hf.co/papers/2410.09838)

A purified model that only hides its backdoor learns it again from a few poisoned images, where one that has lost it
does not. The control is a clean model under the same treatment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from hf_tsc.baselines.fine_tuning import FineTuning, fine_tune
from hf_tsc.data import ImageData
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Attack
from hf_tsc.images import ImagePipeline, pixel_dataset


@dataclass(frozen=True)
class Retuning:
    """How the attacker trains: constant rate, no weight decay, no augmentation.

    Attributes:
        images: size of his training set.
        poisoned: how many of them carry the trigger and the target label.
        epochs: passes over them.
        batch_size: images a step.
        optim, optim_args, learning_rate: as in `TrainingArguments`; AdamW at 1e-4 suits transformers.
    """

    images: int = 1000
    poisoned: int = 20
    epochs: int = 10
    batch_size: int = 128
    optim: str = "sgd"
    optim_args: str | None = "momentum=0.9"
    learning_rate: float = 0.01


def retune(
    model: PreTrainedModel,
    data: ImageData,
    rows: Sequence[int] | np.ndarray,
    pipeline: ImagePipeline,
    attack: Attack,
    retuning: Retuning,
    *,
    seed: int,
    use_cpu: bool = False,
) -> PreTrainedModel:
    """Train a model as the attacker would.

    Args:
        model: is copied and not changed.
        data: labelled images.
        rows: those that the attacker may use; `retuning.images` of them are drawn.
        pipeline: of the model's image processor.
        attack: trigger and target label; the poisoned images are of other classes.
        retuning: the attacker's settings.
        seed: draws images and order.
        use_cpu: train on the CPU, whatever there is.

    Returns:
        The model after the attack, in eval mode.

    Raises:
        UsageError: no labels, or too few rows.
        PurificationError: the loss is not finite.
    """
    labels = data.labels
    if labels is None:
        raise UsageError(f"{data.name} has no label column: re-tuning trains on labels")
    if len(rows) < retuning.images:
        raise UsageError(f"re-tuning draws {retuning.images} images, and there are {len(rows)}")
    generator = np.random.default_rng([seed, 1])
    drawn = np.sort(generator.choice(np.asarray(rows), retuning.images, replace=False))
    wanted = attack.wanted(labels[drawn], model.config.num_labels or 1)
    others = np.flatnonzero(labels[drawn] != wanted)
    if len(others) < retuning.poisoned:
        raise UsageError(
            f"re-tuning poisons {retuning.poisoned} images, and only {len(others)} drawn ones are of other classes"
        )
    poisoned = generator.choice(others, retuning.poisoned, replace=False)
    poison: dict[str, Any] = {"trigger": attack.trigger, "triggered_indices": poisoned, "relabel": wanted}
    dataset = pixel_dataset(data, drawn, pipeline, **poison)
    settings = FineTuning(
        steps=retuning.epochs * math.ceil(retuning.images / retuning.batch_size),
        learning_rate=retuning.learning_rate,
        batch_size=retuning.batch_size,
        optim=retuning.optim,
        optim_args=retuning.optim_args,
        lr_scheduler_type="constant",
    )
    return fine_tune(model, dataset, settings, seed=seed, use_cpu=use_cpu)
