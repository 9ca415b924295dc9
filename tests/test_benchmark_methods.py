"""The methods of a benchmark: the paths they leave, what is taken on them, and what replaces the matching."""

import gc

import pytest
import torch
from suspects_and_digits import classifier, processor, same
from tiny import digits, spec, tensors

from hf_tsc import tsc_trainer
from hf_tsc.baselines import units
from hf_tsc.baselines.base import Case
from hf_tsc.baselines.fine_tuning import FineTuning, fine_tune
from hf_tsc.benchmark import methods
from hf_tsc.benchmark.methods import METHODS
from hf_tsc.benchmark.plan import METHODS as PLANNED_METHODS
from hf_tsc.errors import PurificationError, UsageError
from hf_tsc.functional import call_at
from hf_tsc.images import collate
from hf_tsc.permutation import apply
from hf_tsc.tsc_config import PAPER_PRESET, TSCConfig
from hf_tsc.tsc_trainer import TSCTrainer

FAMILIES = ("resnet", "vit")
TRAIN, HELD_OUT = digits(0, 24), digits(24, 36)
TUNING = {"steps": 2, "learning_rate": 0.05, "batch_size": 8}
QUICK = {
    "fine_tuning": TUNING,
    "wise_ft": TUNING,
    "ft_sam": TUNING,
    "fst": TUNING,
    "mcr": TUNING,
    "nad": {**TUNING, "teacher_steps": 2},
    "fine_pruning": {**TUNING, "ratio": 0.3},
    "anp": {"steps": 3, "batch_size": 8, "learning_rate": 1e4, "threshold": 0.5},
    "i_bau": {"rounds": 1, "batch_size": 12, "fixed_point_steps": 2},
    "ridge": {"penalty": 0.2},
}
TSC = {"curve_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 0.05, "stages": 2}


@pytest.fixture(scope="module", autouse=True)
def nothing_to_collect():
    """Every training collects garbage; most of its time here would go into looking at what was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def derived_once():
    """The specs of these models; each trainer still verifies its own."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (tsc_trainer, units):
            patch.setattr(module, "spec_of", lambda model, inputs: spec(model.config.model_type))
        yield


def case(family: str, *, seed: int = 0) -> Case:
    suspect = classifier(family, **({"hidden_dropout_prob": 0.0} if family == "vit" else {})).eval()
    return Case(suspect, processor(), TRAIN, HELD_OUT, seed)


class Visited(list):
    """What a method showed: of each path the name, whether it is the last, the point taken, and points by t."""

    def __call__(self, name, last, point, taken):
        points = {t: {key: x.detach().clone() for key, x in point(t).items()} for t in (0.0, 0.5, 1.0)}
        self.append((name, last, taken, points))

    @property
    def points(self):
        return [points for *_, points in self]


def run(method: str, on: Case, **settings):
    visited = Visited()
    outcome = METHODS[method](on, {**QUICK.get(method, TSC), **settings}, visited)
    return visited, outcome


def logits(on: Case, params) -> torch.Tensor:
    pixels = collate([HELD_OUT[i] for i in range(len(HELD_OUT))])["pixels"]
    with torch.no_grad():
        return call_at(on.suspect, params, {"pixel_values": HELD_OUT.pipeline.model_input(pixels)}).logits


def changed(one, other) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_names_are_those_of_a_plan():
    assert sorted(METHODS) == sorted(PLANNED_METHODS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_is_a_function_of_the_seed(method, family):
    on = case(family, seed=1)
    before = tensors(on.suspect)
    visited, outcome = run(method, on)
    torch.manual_seed(99)
    again, outcome_again = run(method, on)
    other, _ = run(method, case(family, seed=2))
    assert outcome == outcome_again
    for path, repeated in zip(visited.points, again.points, strict=True):
        assert all(same(path[t], repeated[t]) for t in path)
    assert bool(changed(visited.points[-1][0.5], other.points[-1][0.5])) == (method != "ridge")  # which draws nothing
    assert same(tensors(on.suspect), before)


class TestFineTuning:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_path(self, family):
        on = case(family, seed=3)
        visited, outcome = run("fine_tuning", on, optim_args=None)
        ((name, last, taken, points),) = visited
        assert (name, last, taken) == ("interpolation", True, 1.0)
        assert same(points[0.0], tensors(on.suspect))
        tuned = fine_tune(on.suspect, TRAIN, FineTuning(**TUNING, optim_args=None), seed=3, use_cpu=True)
        assert same(points[1.0], tensors(tuned))
        for key, parameter in tuned.named_parameters():
            assert torch.allclose(points[0.5][key], (points[0.0][key] + parameter) / 2, atol=1e-7)
        assert outcome.gradient_evaluations == 2

    def test_statistics_are_of_the_training_images(self):
        """Of all of them, and of no others: those of the first layer by hand."""
        on = case("resnet")
        visited, _ = run("fine_tuning", on)
        middle = visited.points[0][0.5]
        pixels = collate([TRAIN[i] for i in range(len(TRAIN))])["pixels"]
        inputs = TRAIN.pipeline.model_input(pixels)
        (name,) = [key for key in middle if "embedder" in key and key.endswith("running_mean")]
        weight = middle["resnet.embedder.embedder.convolution.weight"]
        convolution = on.suspect.resnet.embedder.embedder.convolution
        seen = torch.nn.functional.conv2d(inputs, weight, stride=convolution.stride, padding=convolution.padding)
        assert torch.allclose(middle[name], seen.mean((0, 2, 3)), atol=1e-5)

    def test_arguments(self):
        _, outcome = run("fine_tuning", case("vit"), augmentation="crop_flip", mixup_alpha=0.3)
        expected = {**TUNING, "augmentation": "crop_flip", "mixup_alpha": 0.3, "objective": "cross_entropy"}
        assert expected.items() <= outcome.arguments.items()
        assert {"optim", "optim_args", "weight_decay", "temperature"} <= outcome.arguments.keys()

    def test_unknown_settings(self):
        with pytest.raises(UsageError, match=r"fine_tuning has no setting\(s\) curve_steps, rate"):
            run("fine_tuning", case("vit"), rate=1, curve_steps=3)


class TestTsc:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_paths(self, family):
        visited, outcome = run("tsc", case(family), rounds=2, curve1_t=0.3, curve2_t=0.6)
        assert [(name, last, taken) for name, last, taken, _ in visited] == [
            ("round 1, curve 1", False, 0.3),
            ("round 1, curve 2", False, 0.6),
            ("round 2, curve 1", False, 0.3),
            ("round 2, curve 2", True, 0.6),
        ]
        assert outcome.gradient_evaluations == 2 * 2 * 2
        assert {**TSC, "rounds": 2, "permutation": "matched", "sweep_points": 3}.items() <= outcome.arguments.items()

    def test_one_stage(self):
        visited, outcome = run("tsc", case("vit"), stages=1)
        assert [(name, last) for name, last, *_ in visited] == [("round 1, curve 1", True)]
        assert outcome.gradient_evaluations == 2

    @pytest.mark.parametrize("family", FAMILIES)
    def test_defaults_are_those_of_the_family(self, family, tmp_path):
        on = case(family)
        _, outcome = run("tsc", on)
        plain = TSCConfig.for_model(on.suspect, output_dir=str(tmp_path), use_cpu=True)
        for name in ("curve1_t", "curve2_t", "curve1_window", "objective", "mixup_alpha", "move_spaces", "optim"):
            assert outcome.arguments[name] == getattr(plain, name), name

    def test_preset(self):
        """Published settings in place of the family's, where the cell has no others."""
        visited, outcome = run("tsc", case("vit"), preset="paper", rounds=1)
        assert [taken for _, _, taken, _ in visited] == [0.4, 0.4]
        expected = {**PAPER_PRESET, **TSC, "rounds": 1}
        del expected["warmup_steps"]  # the Trainer's own, which is not reported
        assert {name: outcome.arguments[name] for name in expected} == expected

    def test_unknown_preset(self):
        with pytest.raises(UsageError, match="preset='papre': expected one of default, paper"):
            run("tsc", case("vit"), preset="papre")

    def test_begins_with_the_suspect_and_ends_with_its_copy(self):
        on = case("vit")
        first, second = run("tsc", on)[0].points
        suspect = tensors(on.suspect)
        assert same(first[0.0], suspect)
        assert changed(first[1.0], suspect)
        for params in (first[1.0], second[0.0]):
            assert torch.allclose(logits(on, params), logits(on, suspect), atol=1e-5)
        assert not torch.allclose(logits(on, first[0.5]), logits(on, suspect), atol=1e-3)

    def test_ends_with_the_point_taken_before(self):
        first, second = run("tsc", case("vit"), curve1_t=0.5)[0].points
        assert same(second[1.0], first[0.5])

    def test_statistics_at_the_ends(self):
        """BatchNorm's are recomputed at every point, also at the suspect's own."""
        on = case("resnet")
        (first, _) = run("tsc", on)[0].points
        moved = changed(first[0.0], tensors(on.suspect))
        assert moved
        assert moved == {name for name in first[0.0] if "running_" in name}

    def test_point_by_the_accuracy_budget(self):
        on = case("vit")
        visited, outcome = run("tsc", on, max_accuracy_drop=100.0, stages=1)
        assert outcome.arguments["sweep_points"] == 11  # the choice needs them
        assert visited[0][2] in [k / 10 for k in range(1, 10)]

    def test_unknown_settings(self):
        with pytest.raises((UsageError, TypeError), match="no_such_setting"):
            run("tsc", case("vit"), no_such_setting=1)

    def test_wrong_settings(self):
        with pytest.raises(UsageError, match=r"curve1_t=1\.5"):
            run("tsc", case("vit"), curve1_t=1.5)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_diverged(self, family):
        with pytest.raises(PurificationError, match=r"lower learning_rate=1e\+30"):
            run("tsc", case(family), learning_rate=1e30, curve_steps=4)


class TestPermutation:
    @pytest.fixture(scope="class")
    @classmethod
    def ends(cls):
        """The end of the first curve under each permutation, of one suspect."""
        on = case("vit")
        kinds = ("matched", "random", "identity")
        return on, {kind: run("tsc", on, stages=1, permutation=kind)[0].points[0][1.0] for kind in kinds}

    def test_identity(self, ends):
        on, found = ends
        assert same(found["identity"], tensors(on.suspect))

    def test_random(self, ends):
        """Another copy of the suspect; what the matching leaves in place stays there."""
        on, found = ends
        suspect = tensors(on.suspect)
        moved = changed(found["random"], suspect)
        assert moved == changed(found["matched"], suspect)
        assert 0 < len(moved) < len(suspect)
        assert all(not torch.equal(found["random"][name], found["matched"][name]) for name in moved)
        assert torch.allclose(logits(on, found["random"]), logits(on, suspect), atol=1e-5)

    def test_random_is_a_function_of_the_seed(self, ends):
        on, found = ends
        options = {"stages": 1, "permutation": "random"}
        assert same(run("tsc", on, **options)[0].points[0][1.0], found["random"])
        other = run("tsc", case("vit", seed=1), **options)[0].points[0][1.0]
        assert changed(other, found["random"])

    def test_is_drawn_anew_in_every_round(self, monkeypatch):
        """Also where the matching finds the same again."""
        found, drawn = [], []

        def the_same(trainer, points, *, maximize, real=TSCTrainer._match):
            found.append(real(trainer, points, maximize=maximize))
            return found[0]

        def recorded(trainer, points, *, maximize, real=methods._VisitingTrainer._match):
            drawn.append(real(trainer, points, maximize=maximize))
            return drawn[-1]

        monkeypatch.setattr(TSCTrainer, "_match", the_same)
        monkeypatch.setattr(methods._VisitingTrainer, "_match", recorded)
        run("tsc", case("vit"), permutation="random", stages=1, rounds=2)
        one, other = drawn
        assert changed(one, other)

    @pytest.mark.parametrize("kind", ["identity", "random"])
    def test_second_curve_is_matched_all_the_same(self, monkeypatch, kind):
        on, specs, found = case("vit"), [], {}

        def recorded(trainer, points, *, maximize, real=TSCTrainer._match):
            specs.append(trainer.spec)
            found[maximize] = real(trainer, points, maximize=maximize)
            return found[maximize]

        monkeypatch.setattr(TSCTrainer, "_match", recorded)
        _, second = run("tsc", on, permutation=kind, curve_steps=4, learning_rate=0.5)[0].points
        suspect = tensors(on.suspect)
        assert same(second[0.0], apply(suspect, specs[0], found[True]))

    def test_unknown(self):
        with pytest.raises(UsageError, match="permutation"):
            run("tsc", case("vit"), permutation="idenity")


def test_hook_of_the_trainer(tmp_path):
    """`on_curve_end` comes once a curve, with its result, while the curve's points are still there."""
    on, seen = case("resnet"), []

    class Watching(TSCTrainer):
        def on_curve_end(self, result):
            for measured in result.sweep:
                again = self.measure(self.point(measured.t))
                assert (again["loss"], again["score"]) == (measured.loss, measured.score)
            seen.append((result, self.curves))

    options = {"use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    config = TSCConfig.for_model(on.suspect, output_dir=str(tmp_path), **TSC, sweep_points=3, rounds=2, **options)
    data = {"train_dataset": TRAIN, "eval_dataset": HELD_OUT, "processing_class": processor()}
    trainer = Watching(on.suspect, config, **data)
    trainer.train()
    assert [(result.round, result.stage, result.step) for result, _ in seen] == [
        (1, 1, 2),
        (1, 2, 4),
        (2, 1, 6),
        (2, 2, 8),
    ]
    assert [result for result, _ in seen] == trainer.curves
    assert [len(curves) for _, curves in seen] == [1, 2, 3, 4]  # a result is recorded before it is shown
    assert len({point.loss for point in seen[-1][0].sweep}) == 3


@pytest.mark.parametrize(
    ("settings", "relative"),
    [({}, True), ({"learning_rate": 0.1}, False), ({"learning_rate": 0.1, "relative_rate": True}, True)],
)
def test_a_plan_that_names_a_rate_means_it_as_it_is(tmp_path, settings, relative):
    fixed = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True}
    made = methods.tsc_config(classifier("resnet"), settings, objectives=("distillation",), **fixed)
    assert made.relative_rate == relative
