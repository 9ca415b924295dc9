"""Which point of a finished curve is taken, and its way through JSON."""

import json
import random

import pytest

from hf_tsc.curve_result import CurvePoint, CurveResult, choose_point
from hf_tsc.errors import AccuracyBudgetError

TS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def sweep(scores: list[float], ts: list[float] = TS) -> list[CurvePoint]:
    return [CurvePoint(t, 1.0, score) for t, score in zip(ts, scores, strict=True)]


def choose(scores, *, stage=1, baseline=0.9, max_drop=5.0, last=True, ts=TS):
    return choose_point(sweep(scores, ts), stage=stage, baseline=baseline, max_drop=max_drop, last=last)


class TestChoosePoint:
    @pytest.mark.parametrize(("stage", "t"), [(1, 0.5), (2, 0.9)])
    def test_farthest_from_the_backdoored_ends(self, stage, t):
        assert choose([0.9] * 11, stage=stage) == t

    @pytest.mark.parametrize(("stage", "t"), [(1, 0.3), (2, 0.3)])
    def test_within_the_budget(self, stage, t):
        assert choose([0.9, 0.9, 0.9, 0.9, *[0.8] * 6, 0.9], stage=stage) == t

    def test_the_far_side_of_the_first_curve_counts_too(self):
        assert choose([0.9, 0.9, *[0.8] * 6, 0.9, 0.9, 0.9]) == 0.8

    @pytest.mark.parametrize("stage", [1, 2])
    @pytest.mark.parametrize("seed", range(20))
    def test_against_brute_force(self, stage, seed):
        drawn = random.Random(seed)
        points = sweep([drawn.choice([0.80, 0.84, 0.86, 0.9]) for _ in TS])
        good = {p.t for p in points if p.score > 0.85 and p.t not in (0, 1)} or {0.5}
        taken = choose_point(points, stage=stage, baseline=0.9, max_drop=5.0, last=False)
        assert taken in good
        ends = (0, 1) if stage == 1 else (0,)
        distance = {t: min(abs(t - end) for end in ends) for t in good}
        assert distance[taken] == max(distance.values())

    def test_a_drop_that_is_exactly_allowed(self):
        # 0.9 - 5 / 100 is not 0.85 in floating point
        assert choose([0.0, 0.85, 0.0], ts=[0.0, 0.5, 1.0]) == 0.5

    @pytest.mark.parametrize("stage", [1, 2])
    def test_ends_are_never_taken(self, stage):
        with pytest.raises(AccuracyBudgetError):
            choose([1.0, *[0.1] * 9, 1.0], stage=stage)

    def test_the_first_of_two_curves_may_miss_the_budget(self):
        assert choose([0.1] * 11, last=False) == 0.5

    def test_the_last_curve_may_not(self):
        scores = [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.705, 0.4, 0.1, 0.9]
        message = r"max_accuracy_drop=5.0 points .*: 90.0 % before, at best 70.5 % at t=0.7; allow"
        with pytest.raises(AccuracyBudgetError, match=message) as caught:
            choose(scores, stage=2)
        assert caught.value.exit_code == 4
        assert "\n" not in str(caught.value)


def test_a_result_through_json():
    points = [CurvePoint(0.0, 0.1, 0.9, {"attack_success_rate": 1.0}), CurvePoint(1.0, 0.2, 0.8)]
    result = CurveResult(round=1, stage=2, step=40, t_star=0.4, sweep=points, moved=0.75)
    assert CurveResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
