"""Metrics: small cases counted by hand, functions and `evaluate` classes alike."""

import os
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from hf_tsc.metrics import (
    AttackSuccessRate,
    CleanAccuracy,
    RobustAccuracy,
    accuracy,
    attack_success_rate,
    defense_effectiveness,
    robust_accuracy,
)

# true classes and what the model says of the triggered images; the target is 0, two images are of class 0
TRUE = [0, 0, 1, 1, 2, 2, 2, 3]
PREDICTED = [0, 1, 0, 1, 0, 0, 3, 1]
CONTAINERS = [list, np.array, torch.tensor]


@pytest.mark.parametrize("container", CONTAINERS)
def test_by_hand(container):
    predicted, true = container(PREDICTED), container(TRUE)
    assert accuracy(predicted, true) == 2 / 8
    assert attack_success_rate(predicted, true, target_label=0) == 3 / 6  # of the six that are not 0, three become 0
    assert robust_accuracy(predicted, true, target_label=0) == 1 / 6


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (CleanAccuracy, {"accuracy": 2 / 8}),
        (lambda: AttackSuccessRate(target_label=0), {"attack_success_rate": 3 / 6}),
        (lambda: RobustAccuracy(target_label=0), {"robust_accuracy": 1 / 6}),
    ],
)
def test_metric_classes_agree_at_once_and_in_batches(container, metric, expected):
    metric = metric()
    assert metric.compute(predictions=container(PREDICTED), references=container(TRUE)) == expected
    for rows in (slice(0, 3), slice(3, 8)):
        metric.add_batch(predictions=container(PREDICTED)[rows], references=container(TRUE)[rows])
    assert metric.compute() == expected


def test_metrics_combine():
    both = evaluate.combine([CleanAccuracy(), AttackSuccessRate(target_label=0)])
    assert both.compute(predictions=PREDICTED, references=TRUE) == {"accuracy": 2 / 8, "attack_success_rate": 3 / 6}


def test_metrics_leave_no_file():
    AttackSuccessRate(target_label=0).compute(predictions=PREDICTED, references=TRUE)
    CleanAccuracy().add_batch(predictions=PREDICTED, references=TRUE)
    cache = Path(evaluate.config.HF_METRICS_CACHE)
    assert Path(os.environ["HF_HOME"]) in cache.parents
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_attack_success_rate_and_robust_accuracy_sum_to_one_at_most():
    rng = np.random.default_rng(0)
    for _ in range(20):
        predicted, true = rng.integers(0, 3, size=(2, 30))
        shares = [rate(predicted, true, target_label=1) for rate in (attack_success_rate, robust_accuracy)]
        assert sum(shares) <= 1


def test_without_an_image_of_another_class_there_is_no_rate():
    metric = AttackSuccessRate(target_label=2)
    for _ in range(2):  # the metric can be used again after the error
        with pytest.raises(ValueError, match="None of the 3 images is of another class than target_label=2"):
            metric.compute(predictions=[2, 0, 1], references=[2, 2, 2])
    assert metric.compute(predictions=[2, 0], references=[0, 0]) == {"attack_success_rate": 0.5}
    with pytest.raises(ValueError, match="accuracy got no images"):
        accuracy([], [])


def test_logits_and_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match=r"predictions of shape \(4, 2\) and references of shape \(4,\).*argmax"):
        accuracy(torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(ValueError, match=r"shape \(1,\) and references of shape \(4,\)"):
        attack_success_rate(torch.zeros(1), torch.zeros(4), target_label=1)


@pytest.mark.parametrize(
    ("acc", "asr", "expected"),
    [
        ((0.95, 0.93), (1.0, 0.02), 0.98),
        ((0.9, 0.9), (0.7, 0.7), 0.5),
        ((0.9, 0.95), (1.0, 0.0), 1.0),  # a gain of accuracy does not count
        ((0.9, 0.9), (0.1, 0.6), 0.5),  # nor does a rise of the attack success rate
        ((0.9, 0.1), (0.0, 0.0), 0.1),
    ],
)
def test_defense_effectiveness(acc, asr, expected):
    rating = defense_effectiveness(acc_before=acc[0], acc_after=acc[1], asr_before=asr[0], asr_after=asr[1])
    assert rating == pytest.approx(expected)


def test_defense_effectiveness_refuses_percent():
    with pytest.raises(ValueError, match=r"asr_before=98.0, expected a fraction in \[0, 1\], not percent"):
        defense_effectiveness(acc_before=0.9, acc_after=0.9, asr_before=98.0, asr_after=0.1)
