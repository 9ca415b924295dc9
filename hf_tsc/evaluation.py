"""Accuracy of a model on clean images, and with a trigger its attack success rate and robust accuracy.

How classes are read off a model is a `Reader`'s business: from logits, by a linear probe, from prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_tsc.data import ImageData
from hf_tsc.errors import UsageError
from hf_tsc.images import ImagePipeline, PixelDataset, collate, pixel_dataset, to_unit_interval
from hf_tsc.metrics import AttackSuccessRate, CleanAccuracy, RobustAccuracy
from hf_tsc.objectives import Forward, logits_of
from hf_tsc.triggers import Attack


@dataclass(frozen=True)
class Evaluation:
    """Measures as fractions, each with its number of images.

    Attributes:
        accuracy: on `n` clean images.
        attack_success_rate: share of `n_triggered` triggered images, none of the class that the trigger leads to, that
            get its label.
        robust_accuracy: share of the same images that get their true label.
    """

    n: int
    accuracy: float
    n_triggered: int | None = None
    attack_success_rate: float | None = None
    robust_accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


Predict = Callable[[Tensor], Tensor]  # model inputs (n, 3, H, W) -> classes, int64 (n,)
# Makes, for a network on a device, the function that gives the classes of its inputs; what has to be fitted is fitted
# here, on images of the reader's own.
Reader = Callable[[Forward, str | torch.device], Predict]
Change = Callable[[Tensor], Tensor]  # pictures (n, 3, H, W) in [0, 1] -> the same


def read_logits(forward: Forward, device: str | torch.device) -> Predict:
    """The class of the largest logit."""
    return lambda inputs: logits_of(forward, inputs).argmax(-1)


@torch.no_grad()
def map_batches(
    function: Callable[[Tensor], Tensor],
    dataset: PixelDataset,
    *,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
    change: Change | None = None,
) -> Tensor:
    """What a function of model inputs gives for all items, (n, ...) on the CPU; `change` changes their pictures."""
    # a generator of its own: measuring must not touch the global random state, on which dropout depends
    loader: Any = DataLoader(dataset, batch_size=batch_size, collate_fn=collate, generator=torch.Generator())
    pictures = (to_unit_interval(batch["pixels"].to(device)) for batch in loader)
    changed = pictures if change is None else map(change, pictures)
    return torch.cat([function(dataset.pipeline.normalize(one)).cpu() for one in changed])


class Evaluator:
    """The clean and triggered versions of a labelled set of images, ready to measure any number of models.

    Args:
        data: labelled images.
        pipeline: of the model's image processor.
        indices: rows to use; all by default.
        attack: adds attack success rate and robust accuracy.
        num_classes: that the reader knows.
        reader: reads classes off a network.

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
        reader: Reader = read_logits,
    ):
        labels = data.labels
        if labels is None:
            raise UsageError(
                f"{data.name} has no label column: accuracy needs labels; name one with --label_column_name"
            )
        target = None if attack is None else attack.target_label
        if isinstance(target, int) and not 0 <= target < num_classes:
            raise UsageError(f"target_label={target}: the model has the classes 0 to {num_classes - 1}")
        rows = np.arange(len(data.rows)) if indices is None else np.asarray(indices)
        if missing := int((labels[rows] < 0).sum()):
            raise UsageError(f"{missing} image(s) of {data.name} have a negative label: choose a split with labels")
        self.attack, self.reader = attack, reader
        self.clean = pixel_dataset(data, rows, pipeline)
        self.triggered: PixelDataset | None = None
        self.wanted: np.ndarray | None = None
        if attack is not None:
            wanted = attack.wanted(labels[rows], num_classes)
            others, self.wanted = rows[labels[rows] != wanted], wanted[labels[rows] != wanted]
            if len(others) == 0:
                raise UsageError(
                    f"all {len(rows)} images are of the target class {attack.target_label}: no attack to measure"
                )
            self.triggered = pixel_dataset(data, others, pipeline, trigger=attack.trigger)

    def __call__(self, forward: Forward, *, device: str | torch.device = "cpu") -> Evaluation:
        """Measure a model, or any callable that maps `pixel_values` to an output that the reader can read."""
        predict = self.reader(forward, device)
        found = Evaluation(len(self.clean), self._accuracy(predict, device))
        if self.triggered is None:
            return found
        return replace(found, n_triggered=len(self.triggered), **self._fooled(predict, device))

    def measure(self, forward: Forward, *, device: str | torch.device = "cpu") -> dict[str, Any]:
        """The same as a dictionary, without what was not measured."""
        return self(forward, device=device).to_dict()

    def monitors(self) -> dict[str, Callable[..., float]]:
        """What is worth a look along a curve, by name."""
        found: dict[str, Callable[..., float]] = {"accuracy": self.clean_accuracy}
        return found | ({"attack_success_rate": self.attack_success_rate} if self.attack is not None else {})

    def clean_accuracy(self, forward: Forward, *, device: str | torch.device = "cpu") -> float:
        """Of a model or callable."""
        return self._accuracy(self.reader(forward, device), device)

    def attack_success_rate(
        self, forward: Forward, *, device: str | torch.device = "cpu", change: Change | None = None
    ) -> float:
        """Of a model or callable; needs an attack. `change` comes after the trigger."""
        return self._fooled(self.reader(forward, device), device, change)["attack_success_rate"]

    def _accuracy(self, predict: Predict, device: str | torch.device) -> float:
        predictions = map_batches(predict, self.clean, device=device)
        return CleanAccuracy().compute(predictions=predictions, references=self.clean.labels)["accuracy"]

    def _fooled(self, predict: Predict, device: str | torch.device, change: Change | None = None) -> dict[str, Any]:
        assert self.triggered is not None
        assert self.wanted is not None
        predictions = map_batches(predict, self.triggered, device=device, change=change)
        found: dict[str, Any] = {}
        for metric in (AttackSuccessRate, RobustAccuracy):
            made = metric(target_label=self.wanted)
            found |= made.compute(predictions=predictions, references=self.triggered.labels)
        return found


def evaluate_model(
    model: nn.Module, data: ImageData, pipeline: ImagePipeline, *, attack: Attack | None = None, device: str = "cpu"
) -> Evaluation:
    """Evaluate a classifier on all rows of a dataset."""
    num_classes = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
    evaluator = Evaluator(data, pipeline, num_classes=num_classes, attack=attack)
    return evaluator(model.to(device).eval(), device=device)
