"""How well a model works and how well its backdoor works: fractions in [0, 1], as functions and as `evaluate` metrics.

f(x) is the predicted class, y the true one, T the trigger, t the label that it is meant to give: one for all images,
or one for each (all-to-all).
"""

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from torch import Tensor

Labels = Tensor | np.ndarray | Sequence[int]


def accuracy(predictions: Labels, references: Labels) -> float:
    """Return ACC = mean [f(x) = y].

    Args:
        predictions: (n,) predicted classes.
        references: (n,) true classes.

    Raises:
        ValueError: no images, or the shapes are not equal and one-dimensional.
    """
    predicted, true = _class_arrays(predictions, references)
    if true.size == 0:
        raise ValueError("accuracy got no images, expected at least one.")
    return float((predicted == true).mean())


def attack_success_rate(predictions: Labels, references: Labels, *, target_label: int | Labels) -> float:
    """Return ASR = mean [f(T(x)) = t] over the images with y != t: a target image needs no trigger to be one.

    Args:
        predictions: (n,) predicted classes of the triggered images.
        references: (n,) their true classes, not those that the attacker wants.
        target_label: t, or (n,) one for each image.

    Raises:
        ValueError: every image is of the target class, or the shapes are not equal and one-dimensional.
    """
    predicted, _, wanted = _not_of_target(predictions, references, target_label)
    return float((predicted == wanted).mean())


def robust_accuracy(predictions: Labels, references: Labels, *, target_label: int | Labels) -> float:
    """Return mean [f(T(x)) = y] over the images with y != t. Arguments and errors as in `attack_success_rate`.

    With ASR it sums to 1 at most. Where both are low, the trigger no longer leads to t but still confuses.
    """
    predicted, true, _ = _not_of_target(predictions, references, target_label)
    return float((predicted == true).mean())


def defense_effectiveness(*, acc_before: float, acc_after: float, asr_before: float, asr_after: float) -> float:
    """Return DER = (max(0, ASR_b - ASR_a) - max(0, ACC_b - ACC_a) + 1) / 2, of fractions.

    0.5 where nothing changed, at most (ASR_b + 1) / 2; gains of ACC and rises of ASR do not count (the
    defense effectiveness rating that BackdoorBench reports).

    Raises:
        ValueError: a value is not in [0, 1].
    """
    values = {"acc_before": acc_before, "acc_after": acc_after, "asr_before": asr_before, "asr_after": asr_after}
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"defense_effectiveness got {name}={value}, expected a fraction in [0, 1], not percent.")
    return (max(0.0, asr_before - asr_after) - max(0.0, acc_before - acc_after) + 1) / 2


class _LabelMetric(evaluate.Metric):
    """A metric of predicted and true classes, kept in memory: two processes never meet in a cache file."""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions: (n,) predicted classes; references: (n,) true classes.",
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
            format="numpy",
        )


class CleanAccuracy(_LabelMetric):
    """`accuracy` on clean images: `compute(predictions=, references=)` gives `{"accuracy": fraction}`."""

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, Any]:
        return {"accuracy": accuracy(predictions, references)}


class AttackSuccessRate(_LabelMetric):
    """`attack_success_rate` on triggered images with their true classes as references: `{"attack_success_rate": ...}`.

    Args:
        target_label: the class that the trigger leads to, or (n,) one for each image; to the constructor, as
            `evaluate.combine` hands the keywords of `compute` to every metric.
    """

    def __init__(self, *, target_label: int | Labels) -> None:
        super().__init__()
        self.target_label = target_label

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, Any]:
        rate = attack_success_rate(predictions, references, target_label=self.target_label)
        return {"attack_success_rate": rate}


class RobustAccuracy(_LabelMetric):
    """`robust_accuracy` on triggered images with their true classes as references: `{"robust_accuracy": fraction}`.

    Args:
        target_label: the class that the trigger leads to, or (n,) one for each image.
    """

    def __init__(self, *, target_label: int | Labels) -> None:
        super().__init__()
        self.target_label = target_label

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, Any]:
        return {"robust_accuracy": robust_accuracy(predictions, references, target_label=self.target_label)}


def _class_arrays(predictions: Labels, references: Labels) -> tuple[np.ndarray, np.ndarray]:
    predicted, true = (torch.as_tensor(values).cpu().numpy() for values in (predictions, references))
    if predicted.ndim != 1 or predicted.shape != true.shape:
        raise ValueError(
            f"Got predictions of shape {predicted.shape} and references of shape {true.shape}, expected one class for "
            "each image in both, (n,); take the argmax of logits first."
        )
    return predicted, true


def _not_of_target(
    predictions: Labels, references: Labels, target_label: int | Labels
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return predicted, true and target classes of the images whose true class is not the target."""
    predicted, true = _class_arrays(predictions, references)
    wanted = torch.as_tensor(target_label).cpu().numpy()
    if wanted.ndim and wanted.shape != true.shape:
        raise ValueError(f"Got target_label of shape {wanted.shape}, expected one class, or {true.shape}.")
    wanted = np.broadcast_to(wanted, true.shape)
    others = true != wanted
    if not others.any():
        raise ValueError(
            f"None of the {true.size} images is of another class than target_label={target_label}, expected some: the "
            "references are the true classes of the triggered images, not the relabelled ones."
        )
    return predicted[others], true[others], wanted[others]
