"""The plans of recipes/benchmark: equal effort, budgets, blocks that agree; and the rule that chooses settings."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from hf_tsc.baselines.registry import BASELINES, settings_of
from hf_tsc.benchmark.lines import read_lines
from hf_tsc.benchmark.means import TUNED_ON
from hf_tsc.benchmark.plan import Plan
from hf_tsc.errors import UsageError

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES / "benchmark"))
choose = pytest.importorskip("choose")

NAMES = ("tuning", "small", "after", "why", "full")
FILES = {name: RECIPES / "benchmark" / f"{name}.yaml" for name in NAMES} | {"cifar10": RECIPES / "cifar10/plan.yaml"}
CONTENTS = {name: yaml.safe_load(file.read_text(encoding="utf-8")) for name, file in FILES.items()}
PLANS = {name: Plan.read(FILES[name]) for name in NAMES}
CELLS = {name: plan.cells for name, plan in PLANS.items()}
IMAGES = 600 * 128  # forward and backward
SIX = {"fine_tuning", "wise_ft", "ft_sam", "fst", "anp", "tsc"}
HELD_OUT_ATTACKS = {"sig", "wanet", "bpp", "adaptive_blend"}


def trained_images(cell) -> int:
    """How many images go forward and backward."""
    if cell.method in BASELINES:
        settings = settings_of(cell.method, cell.settings)
        images = round(cell.budget * (1 - cell.held_out))
        return settings.gradient_evaluations(images) * settings.batch_size
    assert "preset" not in cell.settings
    assert cell.settings["stages"] == 1
    return cell.settings["curve_steps"] * cell.settings["per_device_train_batch_size"]


class TestPlans:
    @pytest.mark.parametrize("name", NAMES)
    def test_no_cell_takes_more_than_the_budget(self, name):
        assert max(trained_images(cell) for cell in CELLS[name]) == IMAGES

    @pytest.mark.parametrize(("name", "count"), [("tuning", 8), ("full", 6)])
    def test_as_many_settings_of_each_method(self, name, count):
        tuning = [cell for cell in CELLS[name] if cell.group == choose.GROUP]
        counts = Counter((c.suspect.model, c.suspect.attack, c.method) for c in tuning)
        assert set(counts.values()) == {count}
        assert {attack for _, attack, _ in counts} == set(TUNED_ON)
        assert not any(cell.report or cell.retune or cell.seed for cell in tuning)  # on select alone

    def test_every_method_is_tuned_for_every_model(self):
        tuned = {
            (c.suspect.model, c.method) for name in ("tuning", "full") for c in CELLS[name] if c.group == "tuning"
        }
        tuned |= {(model, "wise_ft") for model, method in tuned if method == "fine_tuning"}
        assert tuned == {(c.suspect.model, c.method) for c in CELLS["full"] if c.group == "full"}
        assert {method for _, method in tuned} == {*BASELINES, "tsc"}

    def test_the_small_one(self):
        found = Counter((c.suspect.model, c.suspect.attack, c.method) for c in CELLS["small"])
        assert set(found.values()) == {1}
        attacks = HELD_OUT_ATTACKS | {"clean"}
        assert set(found) == {(m, a, k) for m in ("resnet", "vit") for a in attacks for k in SIX | {"ridge"}}
        assert {(cell.budget, cell.seed) for cell in CELLS["small"]} == {(1400, 0)}
        assert all("taken" in cell.report and cell.retune == ("taken",) for cell in CELLS["small"])
        assert not attacks & set(TUNED_ON)

    def test_what_comes_after(self):
        woken = [cell for cell in CELLS["small"] if cell.reactivate]
        methods = Counter((cell.suspect.model, cell.suspect.attack) for cell in woken)
        assert methods == {(model, attack): 5 for model in ("resnet", "vit") for attack in ("sig", "bpp")}
        assert {cell.method for cell in woken} == {"fine_tuning", "fst", "anp", "tsc", "ridge"}
        known = Counter(cell.suspect.attack for cell in CELLS["after"])
        assert known == {"knows_tsc": 12, "badnets": 10}
        assert all(bool(cell.suspect.adaptive) == (cell.suspect.attack == "knows_tsc") for cell in CELLS["after"])

    def test_the_full_one(self):
        full = [cell for cell in CELLS["full"] if cell.group == "full"]
        assert {(cell.seed, cell.budget) for cell in full} == {(s, b) for s in (0, 1, 2) for b in (1400, 280)}
        assert {cell.suspect.model for cell in full} == {"resnet", "vit", "convnext", "swin"}
        assert len({cell.suspect.attack for cell in full}) == 13
        assert len(full) == 3 * 2 * 4 * 13 * 11

    def test_the_protocol_counts_them(self):
        page = (RECIPES.parent / "docs/benchmark.md").read_text(encoding="utf-8")
        for name in NAMES:
            assert f"| `{name}.yaml` | {len(CELLS[name]):,} |" in page

    @pytest.mark.parametrize("block", ["models", "attacks"])
    def test_blocks_agree(self, block):
        """All plans mean the same by a name; the first plan knew no adaptive suspects."""
        seen: dict = {}
        for name, content in CONTENTS.items():
            for key, value in content[block].items():
                apart = {"adaptive", "attacks"} if name == "cifar10" else {"attacks"}  # those of each suspect, below
                value = {k: v for k, v in value.items() if k not in apart}
                known = seen.setdefault(key, value)
                assert {k: v for k, v in known.items() if k not in apart} == value, (name, key)
        assert len({str(content["rows"]) for content in CONTENTS.values()}) == 1

    def test_suspects_agree(self):
        """What differs in an attack for a model differs in all plans; a cell of one knows the suspects of another."""
        seen: dict = {}
        for name, plan in PLANS.items():
            for suspect in plan.suspects:
                key = suspect.model, suspect.attack, suspect.seed
                assert seen.setdefault(key, suspect.id) == suspect.id, (name, key)
        assert {"badnets", "sig", "wanet", "bpp", "clean"} <= {attack for model, attack, _ in seen if model == "vit"}

    def test_chosen_settings_agree(self):
        """Whoever writes the tuning's choice into one plan writes it into all."""
        for family in ("chosen_resnet", "chosen_vit"):
            small, after, full = (CONTENTS[name][family] for name in ("small", "after", "full"))
            assert small == after
            assert small.items() <= full.items()
            assert set(small) == SIX | {"ridge"}


def line(method="tsc", attack="badnets", points=((0.5, 0.78, 0.1),), taken=0.5, **changes) -> dict:
    """A line of a suspect with 80 % accuracy; points are t, accuracy and attack success rate."""
    made = [
        {"t": t, "select": {"accuracy": acc, "attack_success_rate": asr}, "held_out": {"score": acc}}
        for t, acc, asr in points
    ]
    content = {
        "id": f"{method}-{attack}",
        "group": "tuning",
        "model": "resnet",
        "attack": attack,
        "method": method,
        "settings": {"learning_rate": 0.1},
        "before": {"select": {"accuracy": 0.8, "attack_success_rate": 1.0}, "held_out": {"score": 0.8}},
        "paths": [{"path": "round 1, curve 1", "taken": taken, "points": made}],
    }
    return {**content, **changes}


def both(**changes) -> list[dict]:
    return [line(attack=attack, **changes) for attack in TUNED_ON]


class TestChoice:
    def test_means_over_the_attacks(self):
        one, *_ = choose.candidates([line(), line(attack="blended", points=[(0.5, 0.74, 0.3)])])
        assert (one.loss, one.asr, one.der) == pytest.approx((0.04, 0.2, 0.88))

    def test_lowest_rate_within_four_points(self):
        """0.04 is lost exactly at 0.6; 0.7 loses more."""
        (one,) = choose.chosen(both(points=[(0.5, 0.79, 0.3), (0.6, 0.76, 0.1), (0.7, 0.7, 0.0)]))
        assert one.point == "0.6"

    def test_of_equals_the_more_accurate(self):
        (one,) = choose.chosen(both(points=[(0.5, 0.77, 0.1), (0.6, 0.79, 0.1)]))
        assert one.point == "0.6"

    def test_else_the_best_exchange(self):
        (one,) = choose.chosen(both(points=[(0.5, 0.7, 0.5), (0.6, 0.6, 0.1), (0.7, 0.3, 0.0)]))
        assert one.point == "0.6"

    def test_points_that_count(self):
        """All of a path for TSC, ends left out; of fine-tuning its end, and the others for WiSE-FT."""
        points = [(0.0, 0.8, 1.0), (0.3, 0.79, 0.5), (0.5, 0.78, 0.2), (1.0, 0.75, 0.1)]
        lines = [*both(points=points), *both(method="fine_tuning", points=points, taken=1.0)]
        lines += [*both(method="fst", points=points, taken=1.0), *both(method="anp", points=points, taken=0.3)]
        found = {(one.method, one.point) for one in choose.candidates(lines)}
        expected = {(method, t) for method in ("tsc", "wise_ft", "anp") for t in ("0.3", "0.5", choose.WITHIN)}
        assert found == expected | {("fine_tuning", "1"), ("fst", "1"), ("anp", "0")}  # ANP prunes at 0, too

    def test_a_point_within_the_accuracy_budget_is_that_of_each_suspect(self):
        """0.5 of one, 0.3 of the other, where 0.5 loses 5 points of the held-out images."""
        first, second = both(points=[(0.3, 0.79, 0.5), (0.5, 0.78, 0.2)])
        second["paths"][0]["points"][1]["held_out"] = {"score": 0.75}
        found = {one.point: one for one in choose.candidates([first, second])}
        assert (found[choose.WITHIN].loss, found[choose.WITHIN].asr) == pytest.approx((0.015, 0.35))
        assert found["0.5"].asr == pytest.approx(0.2)

    def test_lines_of_two_trainings_are_refused(self):
        lines = [*both(weights="a"), line(settings={"learning_rate": 0.2}, weights="b")]
        with pytest.raises(UsageError, match="resnet/badnets was trained anew"):
            choose.candidates(lines)

    def test_what_does_not_count(self):
        """Failures, other groups and attacks, a setting that one attack alone has measured."""
        good, other = both()
        lines = [good, other, line(attack="sig"), line(group="small"), line(settings={"learning_rate": 0.2})]
        lines += [{key: value for key, value in line(method="anp", error="nan").items() if key != "paths"}]
        assert {one.settings for one in choose.candidates(lines)} == {"learning_rate 0.1"}

    def test_what_the_tuning_chose_is_in_the_plans(self):
        """Settings, and the point of a path."""
        names = {"wise_ft": "alpha", "anp": "threshold", "tsc": "curve1_t", "ridge": "penalty"}
        lines = read_lines(RECIPES / "benchmark" / "tuning.jsonl")
        found = choose.chosen(lines)
        assert {(one.model, one.method) for one in found} == {
            (m, k) for m in ("resnet", "vit") for k in SIX | {"ridge"}
        }
        for one in found:
            chosen = next(dict(x["settings"]) for x in lines if choose._text(x["settings"]) == one.settings)
            planned = dict(
                next(c for c in CELLS["small"] if (c.suspect.model, c.method) == (one.model, one.method)).settings
            )
            name = names.get(one.method)
            if one.point == choose.WITHIN:
                assert planned.pop("max_accuracy_drop") == 4
                assert name not in planned
            elif name is not None:
                assert planned.pop(name) == float(one.point)
            chosen.pop(name, None)
            assert planned == chosen

    def test_the_page_is_of_the_lines(self):
        lines = read_lines(RECIPES / "benchmark" / "tuning.jsonl")
        written = (RECIPES.parent / "docs" / "benchmark" / "tuning.md").read_text(encoding="utf-8")
        assert written == choose.page(lines)

    def test_page(self):
        lines = [*both(), *both(settings={"learning_rate": 0.4}, points=[(0.5, 0.77, 0.02)])]
        row = choose.page(lines).splitlines()[-1]
        assert row == "| resnet | tsc | learning_rate 0.4 | 0.5 | 2 | 4 | 3.0 | 2.0 | 97.5 |"
