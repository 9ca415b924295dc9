"""Accuracy of a model on clean images, and with a trigger its attack success rate and robust accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_tsc.data import ImageData
from hf_tsc.errors import UsageError
from hf_tsc.images import ImagePipeline, PixelDataset, collate, pixel_dataset
from hf_tsc.metrics import AttackSuccessRate, CleanAccuracy, RobustAccuracy
from hf_tsc.objectives import Forward, logits_of
from hf_tsc.triggers import Trigger


@dataclass(frozen=True)
class Evaluation:
    """Measures as fractions, each with its number of images.

    Attributes:
        accuracy: on `n` clean images.
        attack_success_rate: share of `n_triggered` triggered images, none of the target class, that get its label.
        robust_accuracy: share of the same images that get their true label.
    """

    n: int
    accuracy: float
    n_triggered: int | None = None
    attack_success_rate: float | None = None
    robust_accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Attack:
    """A known trigger and the label it is meant to give: to measure with, never to purify with."""

    trigger: Trigger
    target_label: int


@torch.no_grad()
def predict(
    forward: Forward, dataset: PixelDataset, *, batch_size: int = 128, device: str | torch.device = "cpu"
) -> Tensor:
    """Predicted class of every item, int64 (n,) on the CPU."""
    # a generator of its own: measuring must not touch the global random state, on which dropout depends
    loader: Any = DataLoader(dataset, batch_size=batch_size, collate_fn=collate, generator=torch.Generator())
    found = []
    for batch in loader:
        inputs = dataset.pipeline.model_input(batch["pixels"].to(device))
        found.append(logits_of(forward, inputs).argmax(-1).cpu())
    return torch.cat(found)


class Evaluator:
    """The clean and triggered versions of a labelled set of images, ready to measure any number of models.

    Args:
        data: labelled images.
        pipeline: of the model's image processor.
        indices: rows to use; all by default.
        attack: adds attack success rate and robust accuracy.
        num_classes: the model's.

    Raises:
        UsageError: no labels, or a target label that the model does not have.
    """

    def __init__(
        self,
        data: ImageData,
        pipeline: ImagePipeline,
        *,
        num_classes: int,
        indices: Sequence[int] | np.ndarray | None = None,
        attack: Attack | None = None,
    ):
        labels = data.labels
        if labels is None:
            raise UsageError(
                f"{data.name} has no label column: accuracy needs labels; name one with --label_column_name"
            )
        if attack is not None and not 0 <= attack.target_label < num_classes:
            raise UsageError(f"target_label={attack.target_label}: the model has the classes 0 to {num_classes - 1}")
        rows = np.arange(len(data.rows)) if indices is None else np.asarray(indices)
        self.attack = attack
        self.clean = pixel_dataset(data, rows, pipeline)
        self.triggered: PixelDataset | None = None
        if attack is not None:
            others = rows[labels[rows] != attack.target_label]
            if len(others) == 0:
                raise UsageError(
                    f"all {len(rows)} images are of the target class {attack.target_label}: no attack to measure"
                )
            self.triggered = pixel_dataset(data, others, pipeline, trigger=attack.trigger)

    def __call__(self, forward: Forward, *, device: str | torch.device = "cpu") -> Evaluation:
        """Measure a model, or any callable that maps `pixel_values` to an output with `logits`."""
        acc = self.clean_accuracy(forward, device=device)
        if self.attack is None or self.triggered is None:
            return Evaluation(len(self.clean), acc)
        fooled = {"predictions": predict(forward, self.triggered, device=device), "references": self.triggered.labels}
        target = self.attack.target_label
        return Evaluation(
            n=len(self.clean),
            accuracy=acc,
            n_triggered=len(self.triggered),
            attack_success_rate=AttackSuccessRate(target_label=target).compute(**fooled)["attack_success_rate"],
            robust_accuracy=RobustAccuracy(target_label=target).compute(**fooled)["robust_accuracy"],
        )

    def clean_accuracy(self, forward: Forward, *, device: str | torch.device = "cpu") -> float:
        """Of a model or callable."""
        predictions = predict(forward, self.clean, device=device)
        return CleanAccuracy().compute(predictions=predictions, references=self.clean.labels)["accuracy"]

    def attack_success_rate(self, forward: Forward, *, device: str | torch.device = "cpu") -> float:
        """Of a model or callable; needs an attack."""
        assert self.attack is not None
        assert self.triggered is not None
        predictions = predict(forward, self.triggered, device=device)
        metric = AttackSuccessRate(target_label=self.attack.target_label)
        return metric.compute(predictions=predictions, references=self.triggered.labels)["attack_success_rate"]


def evaluate_model(
    model: nn.Module, data: ImageData, pipeline: ImagePipeline, *, attack: Attack | None = None, device: str = "cpu"
) -> Evaluation:
    """Evaluate a classifier on all rows of a dataset."""
    num_classes = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
    evaluator = Evaluator(data, pipeline, num_classes=num_classes, attack=attack)
    return evaluator(model.to(device).eval(), device=device)
