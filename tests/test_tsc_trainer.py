"""The course of a purification: segments, curves, schedules, seeds, checkpoints, and what comes out of it."""

import itertools
import math
import resource

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForImageClassification, ResNetModel, TrainerCallback, ViTImageProcessorPil

from hf_tsc.batch_norm import recompute_statistics
from hf_tsc.curve_result import CurvePoint, CurveResult, choose_point
from hf_tsc.errors import AccuracyBudgetError, CheckpointError, PurificationError, UsageError
from hf_tsc.folders import last_whole_checkpoint
from hf_tsc.images import ImagePipeline
from hf_tsc.objectives import FeatureDistillation
from hf_tsc.tsc_config import PAPER_PRESET, TSCConfig
from hf_tsc.tsc_trainer import TSCTrainer

STEPS, ROUNDS = 3, 2
LAST = 2 * STEPS * ROUNDS


def config(folder, **changes) -> TSCConfig:
    options = {
        "rounds": ROUNDS,
        "curve_steps": STEPS,
        "per_device_train_batch_size": 8,
        "sweep_points": 3,
        "statistics_batch_size": 16,
        "learning_rate": 0.1,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    fixed = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return TSCConfig(**{**options, **fixed, **changes})


def trainer(folder, family="vit", *, model=None, callbacks=None, monitors=None, **changes) -> TSCTrainer:
    return TSCTrainer(
        model if model is not None else tiny.model(family),
        config(folder, **{"relative_rate": family == "resnet", **changes}),
        train_dataset=tiny.digits(0, 16),
        eval_dataset=tiny.digits(16, 32),
        processing_class=tiny.processor(),
        spec=tiny.spec(family),
        callbacks=callbacks,
        monitors=monitors,
    )


def weights(made: TSCTrainer) -> dict[str, torch.Tensor]:
    """Start, bend and end of the curve as it stands, and the buffers."""
    return {name: t.detach().clone() for name, t in made.curve.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Recorder(TrainerCallback):
    """What every step was taken with, and what it left."""

    def __init__(self):
        self.rates, self.scaled, self.points, self.momenta, self.curves = [], [], [], [], []

    def on_pre_optimizer_step(self, args, state, control, *, model, optimizer, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.scaled.append([group["lr"] for group in optimizer.param_groups[2:]])
        self.points.append(self.trainer.curve.t)
        self.curves.append({name: t.clone() for name, t in self.trainer.curve.start.items()})

    def on_step_end(self, args, state, control, *, optimizer, **kwargs):
        self.momenta.append(len(optimizer.state))


def recorded(folder, family="vit", **changes) -> tuple[TSCTrainer, Recorder]:
    recorder = Recorder()
    made = trainer(folder, family, callbacks=[recorder], **changes)
    recorder.trainer = made
    made.train()
    return made, recorder


@pytest.fixture(scope="module", params=tiny.CLASSIFIERS)
def run(request, tmp_path_factory):
    """Two rounds with a checkpoint at every second step: in the middle of a segment, and on a boundary."""
    folder = tmp_path_factory.mktemp(request.param)
    suspect = tiny.model(request.param)
    before = tiny.tensors(suspect)
    recorder = Recorder()
    made = trainer(
        folder,
        request.param,
        model=suspect,
        callbacks=[recorder],
        save_strategy="steps",
        save_steps=2,
        save_total_limit=None,
    )
    recorder.trainer = made
    made.train()
    return request.param, folder, suspect, before, made, recorder


class TestCourse:
    def test_one_curve_a_round_and_stage(self, run):
        made = run[4]
        assert made.state.global_step == LAST
        assert [(c.round, c.stage, c.step, c.t_star) for c in made.curves] == [
            (1, 1, 3, 0.5),
            (1, 2, 6, 0.4),
            (2, 1, 9, 0.5),
            (2, 2, 12, 0.4),
        ]
        for curve in made.curves:
            assert [point.t for point in curve.sweep] == [0, 0.5, 1]
            assert all(math.isfinite(p.loss) and 0 <= p.score <= 1 for p in curve.sweep)
            assert 0 < curve.moved <= 1

    def test_both_ends_of_the_first_curve_are_the_suspect(self, run):
        made = run[4]
        start, _, end = made.curves[0].sweep
        assert start.loss == pytest.approx(end.loss, rel=1e-5)
        assert start.score == end.score

    def test_curves_follow_each_other(self, run):
        """The second curve ends where the first was left; the next round starts where the second was left."""
        first, second, third, _ = run[4].curves
        taken = [entry["clean_loss"] for entry in run[4].state.log_history if "clean_loss" in entry]
        assert first.sweep[1].loss == taken[0] == pytest.approx(second.sweep[2].loss, rel=1e-6)
        assert third.sweep[0].loss == pytest.approx(taken[1], rel=1e-6)
        # θ'' is the suspect moved: the same loss as at the start of the round
        assert second.sweep[0].loss == pytest.approx(first.sweep[0].loss, rel=1e-4)

    def test_the_first_start_is_the_suspect_and_ends_stay_within_a_segment(self, run):
        *_, before, _, recorder = run
        assert all(torch.equal(t, before[name]) for name, t in recorder.curves[0].items())
        for step in range(LAST - 1):
            same_curve = (step + 1) % STEPS != 0
            assert same(recorder.curves[step], recorder.curves[step + 1]) == same_curve

    def test_the_schedule_starts_anew_at_every_segment(self, run):
        closed = [0.1 * 0.5 * (1 + math.cos(math.pi * (step % STEPS) / STEPS)) for step in range(LAST)]
        assert run[5].rates == pytest.approx(closed)

    def test_weights_before_a_batch_norm_have_a_rate_of_their_own(self, run):
        family, _, _, _, made, recorder = run
        scaled = [[made.rate_factor * rate] if family == "resnet" else [] for rate in recorder.rates]
        assert recorder.scaled == [pytest.approx(rates) for rates in scaled]
        assert (made.rate_factor != 1) == (family == "resnet")

    def test_no_momentum_across_a_boundary(self, run):
        trained = len(run[4].curve.bend)
        assert run[5].momenta == [0 if (step + 1) % STEPS == 0 else trained for step in range(LAST)]

    def test_every_step_logs_its_own_loss(self, run):
        losses = [entry["step"] for entry in run[4].state.log_history if "loss" in entry]
        assert losses == list(range(1, LAST + 1))

    def test_t_is_a_function_of_seed_and_step(self, run):
        expected = [np.random.default_rng([42, step]).random() for step in range(LAST)]
        assert run[5].points == pytest.approx(expected)

    def test_the_callers_model_is_untouched(self, run):
        _, _, suspect, before, *_ = run
        assert same(tiny.tensors(suspect), before)
        assert all(p.requires_grad and p.grad is None for p in suspect.parameters())

    def test_evaluate_measures_what_comes_out(self, run):
        made = run[4]
        metrics = made.evaluate()
        found = made.measure(tiny.tensors(made.purified_model()))
        assert metrics["eval_loss"] == pytest.approx(found["loss"], rel=1e-6)
        assert metrics["eval_accuracy"] == found["score"]

    def test_evaluate_at_the_end_of_a_curve_measures_the_point_that_was_taken(self, tmp_path):
        """Of either curve: by then the next one has been laid."""
        made, _ = recorded(tmp_path, eval_strategy="steps", eval_steps=STEPS)
        taken = [entry for entry in made.state.log_history if "clean_loss" in entry]
        found = [entry for entry in made.state.log_history if "eval_loss" in entry]
        assert len(taken) == len(found) == 2 * ROUNDS
        for one, other in zip(taken, found, strict=True):
            assert one["step"] == other["step"]
            assert one["clean_loss"] == pytest.approx(other["eval_loss"], rel=1e-5)

    def test_a_last_image_alone(self, tmp_path):
        """17 images in batches of 8 and 16: BatchNorm could not normalise the last one, of which one pixel is left."""
        suspect, one = tiny.model("resnet").train(), tiny.digits(0, 1)[0]["pixels"]
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            suspect(pixel_values=one[None].float())
        made = TSCTrainer(
            suspect,
            config(tmp_path, rounds=1, stages=1, curve_steps=5),
            train_dataset=tiny.digits(0, 17),
            eval_dataset=tiny.digits(16, 33),
            processing_class=tiny.processor(),
        )
        made.train()
        assert len(made.get_train_dataloader()) == 2
        assert not made.args.dataloader_drop_last


class TestResult:
    def test_the_purified_model_is_the_point_taken(self, run):
        _, _, suspect, before, made, _ = run
        purified = made.purified_model()
        assert type(purified) is type(suspect)
        assert purified.config.to_dict() == suspect.config.to_dict()
        assert purified.state_dict().keys() == suspect.state_dict().keys()
        assert not purified.training
        assert all(p.requires_grad for p in purified.parameters())
        assert not any(torch.equal(p, before[name]) for name, p in purified.named_parameters())
        measured = made.measure(tiny.tensors(purified))
        taken = [entry["clean_loss"] for entry in made.state.log_history if "clean_loss" in entry]
        assert measured["loss"] == pytest.approx(taken[-1], rel=1e-6)

    def test_saving_writes_a_folder_that_loads(self, run, tmp_path):
        made = run[4]
        made.save_model(str(tmp_path / "purified"))
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "purified").eval()
        assert same(dict(loaded.state_dict()), dict(made.purified_model().state_dict()))
        processor = ViTImageProcessorPil.from_pretrained(tmp_path / "purified")
        assert processor.to_dict() == tiny.processor().to_dict()

    def test_the_report_knows_what_kind_of_model_it_is(self, tmp_path):
        """A card that calls an encoder a classifier would be offered to those who look for one."""
        suspect = ResNetModel(tiny.model("resnet").config).eval()
        data, pipeline = tiny.digits(0, 16), ImagePipeline(tiny.processor())
        made = TSCTrainer(
            suspect,
            config(tmp_path / "work", rounds=1, stages=1),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tiny.processor(),
            objective=FeatureDistillation(pipeline, suspect),
        )
        made.train()
        made.save_model(str(tmp_path / "purified"))
        report = made._report_of_a_folder(tmp_path / "purified", "digits")
        assert (report.task["kind"], report.task["pipeline_tag"]) == ("image encoder", "image-feature-extraction")

    def test_nothing_to_save_before_the_end(self, run, tmp_path):
        made = trainer(tmp_path)
        with pytest.raises(PurificationError, match="training stands at step 0 of 12: there is no purified model yet"):
            made.save_model(str(tmp_path / "purified"))
        assert not (tmp_path / "purified").exists()


class TestRelativeRate:
    def test_a_network_of_larger_weights_is_purified_alike(self, tmp_path):
        """Convolutions of three times the weights do the same, and so does what comes out; not at a plain rate."""
        plain, large = self.losses(tmp_path, 1.0), self.losses(tmp_path, 3.0)
        assert large == pytest.approx(plain, rel=1e-3)
        assert self.losses(tmp_path, 3.0, relative_rate=False) != pytest.approx(plain, rel=1e-2)

    def losses(self, folder, factor, **changes):
        """Along a curve, of a network whose convolutions have `factor` times the weights, and which does the same."""
        model = tiny.model("resnet")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor if parameter.ndim == 4 else 1.0)
            for layer in model.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.eps = 1e-12  # alone is not in proportion
                    layer.running_mean *= factor
                    layer.running_var *= factor**2
        made = trainer(folder, "resnet", model=model, rounds=1, stages=1, sweep_points=5, **changes)
        made.train()
        return [point.loss for point in made.curves[0].sweep]

    def test_the_report_says_the_factor(self, run):
        family, _, _, _, made, _ = run
        told = made.reported_arguments()
        assert told.get("rate_factor") == (round(made.rate_factor, 4) if family == "resnet" else None)


class TestResume:
    @pytest.mark.parametrize("step", [4, 6])
    def test_bit_exact(self, run, tmp_path, step):
        """In the middle of a segment, and on a boundary."""
        family, folder, _, _, made, _ = run
        again = trainer(tmp_path, family, save_strategy="no")
        again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert same(weights(again), weights(made))
        assert again.curves == made.curves
        assert same(dict(again.purified_model().state_dict()), dict(made.purified_model().state_dict()))

    @pytest.mark.parametrize(("matching", "left"), [(1, None), (2, "checkpoint-2"), (3, "checkpoint-4")])
    def test_bit_exact_when_killed_while_matching(self, run, tmp_path, monkeypatch, matching, left):
        """At the beginning, between the two curves of a round, and between rounds."""
        family, _, _, _, made, _ = run
        killed = trainer(tmp_path, family, save_strategy="steps", save_steps=2)
        match, calls = killed._match, itertools.count(1)

        def dying(*args, **kwargs):
            found = match(*args, **kwargs)
            if next(calls) == matching:
                raise Killed
            return found

        monkeypatch.setattr(killed, "_match", dying)
        with pytest.raises(Killed):
            killed.train()
        found = last_whole_checkpoint(tmp_path)
        assert (found and found.name) == left
        again = trainer(tmp_path, family)
        again.train(resume_from_checkpoint=found and str(found))
        assert same(weights(again), weights(made))
        assert again.curves == made.curves


class Killed(BaseException):
    """As a signal: nothing on the way is to take it for an error and clean up."""


class FullDisk(TrainerCallback):
    """From the third step on no file may grow beyond 4 kB."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_disk_that_fills_up_leaves_the_last_whole_checkpoint(tmp_path):
    made = trainer(tmp_path, callbacks=[FullDisk()], save_strategy="steps", save_steps=2, save_total_limit=1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            CheckpointError, match=r"^checkpoint-4 could not be written to .*: make room, and go on with"
        ):
            made.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


class TestSeeds:
    def test_the_same_seed_gives_the_same_weights_and_another_one_others(self, tmp_path):
        runs = [recorded(tmp_path, rounds=1, stages=1, seed=seed)[0] for seed in (1, 1, 2)]
        first, again, other = (weights(made) for made in runs)
        assert same(first, again)
        assert not same(first, other)

    def test_windows(self, tmp_path):
        _, recorder = recorded(tmp_path, rounds=1, curve1_window=[0.4, 0.6], curve2_window=[0.9, 0.9], seed=5)
        drawn = [np.random.default_rng([5, step]).random() for step in range(STEPS)]
        assert recorder.points == pytest.approx([*(0.4 + 0.2 * x for x in drawn), 0.9, 0.9, 0.9])


class TestAccumulation:
    def test_two_micro_batches_are_one_batch(self, tmp_path):
        options = {"rounds": 1, "stages": 1, "augmentation": "none"}
        whole, drawn = recorded(tmp_path, per_device_train_batch_size=8, **options)
        parts, also = recorded(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
        assert whole.segment_steps == parts.segment_steps == STEPS
        assert drawn.points == also.points
        losses = [[entry["loss"] for entry in made.state.log_history if "loss" in entry] for made in (whole, parts)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        a, b = weights(whole), weights(parts)
        start = tiny.tensors(tiny.model("vit"))
        moved = max((whole.point(0.0)[name] - start[name]).abs().max() for name in start)
        assert moved > 1e-3
        assert all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5) for name in a)

    @pytest.mark.parametrize(
        ("changes", "steps"),
        [
            ({"curve_epochs": 5.0}, 10),
            ({"curve_epochs": 5.0, "gradient_accumulation_steps": 2}, 5),
            ({"curve_epochs": 0.1}, 1),
            ({"curve_epochs": 5.0, "per_device_train_batch_size": 5}, 20),
            ({"curve_epochs": 5.0, "per_device_train_batch_size": 5, "dataloader_drop_last": True}, 15),
            ({"curve_epochs": 5.0, "curve_steps": 7}, 7),
        ],
    )
    def test_steps_a_curve(self, tmp_path, changes, steps):
        made = trainer(tmp_path, **{"curve_steps": -1, **changes})
        assert made.segment_steps == steps
        assert made.args.max_steps == 4 * steps


class TestPaperPreset:
    def test_the_optimizer_is_the_papers(self, tmp_path):
        changes = {**PAPER_PRESET, "relative_rate": False}
        del changes["rounds"], changes["curve_epochs"]
        made, recorder = recorded(tmp_path, "resnet", **{**changes, "per_device_train_batch_size": 8}, rounds=1)
        groups = [group for group in made.optimizer.param_groups if group["params"]]
        assert len(groups) == 1
        assert {id(p) for p in groups[0]["params"]} == {id(p) for p in made.curve.bend.values()}
        assert (groups[0]["weight_decay"], groups[0]["momentum"], groups[0]["nesterov"]) == (5e-4, 0.9, False)
        assert made.args.max_grad_norm == 0
        assert recorder.rates == pytest.approx(
            [0.01 * (1 + math.cos(math.pi * (step % STEPS) / STEPS)) for step in range(2 * STEPS)]
        )

    def test_gradients_are_not_clipped(self, tmp_path, monkeypatch):
        made = trainer(tmp_path, rounds=1, stages=1)
        limits = []
        measure = made.accelerator.clip_grad_norm_  # called with no limit to log the norm

        def watch(parameters, max_norm, **kwargs):
            limits.append(max_norm)
            return measure(parameters, max_norm, **kwargs)

        monkeypatch.setattr(made.accelerator, "clip_grad_norm_", watch)
        made.train()
        assert set(limits) <= {math.inf}

    @pytest.mark.parametrize(
        ("schedule", "closed"),
        [
            ("linear", [0.5, 1, 2 / 3, 1 / 3]),
            ("constant", [0.5, 1, 1, 1]),
            ("cosine", [0.5, 1, 0.75, 0.25]),
        ],
    )
    def test_warmup_and_schedule_of_every_segment(self, tmp_path, schedule, closed):
        _, recorder = recorded(tmp_path, rounds=1, curve_steps=4, lr_scheduler_type=schedule, warmup_steps=1)
        assert recorder.rates == pytest.approx([0.1 * factor for factor in 2 * closed])


def sweep(*scores: float) -> list[CurvePoint]:
    return [CurvePoint(t, 1.0, score) for t, score in zip(np.linspace(0, 1, len(scores)), scores, strict=True)]


class TestChoosing:
    @pytest.mark.parametrize(
        ("stage", "scores", "expected"),
        [
            (1, (0.9, 0.9, 0.9, 0.9, 0.9), 0.5),  # the middle is farthest from both ends
            (1, (0.9, 0.9, 0.5, 0.9, 0.9), 0.25),
            (1, (0.9, 0.5, 0.5, 0.9, 0.9), 0.75),
            (2, (0.9, 0.9, 0.9, 0.9, 0.9), 0.75),  # only the start is backdoored
            (2, (0.9, 0.9, 0.9, 0.5, 0.9), 0.5),
            (2, (0.9, 0.89, 0.5, 0.5, 0.9), 0.25),  # one point less is allowed
        ],
    )
    @pytest.mark.parametrize("last", [True, False])
    def test_farthest_within_the_budget(self, stage, scores, expected, last):
        assert choose_point(sweep(*scores), stage=stage, baseline=0.9, max_drop=1.0, last=last) == expected

    def test_a_curve_with_a_successor_may_miss_the_budget(self):
        assert choose_point(sweep(0.9, 0.5, 0.5, 0.5, 0.9), stage=1, baseline=0.9, max_drop=1.0, last=False) == 0.5

    def test_the_last_one_may_not_and_its_ends_do_not_count(self):
        message = (
            r"within max_accuracy_drop=1.0 points .*: 90.0 % before, at best 62.0 % at t=0.25; allow a larger drop"
        )
        with pytest.raises(AccuracyBudgetError, match=message):
            choose_point(sweep(0.9, 0.62, 0.5, 0.5, 0.9), stage=2, baseline=0.9, max_drop=1.0, last=True)

    def test_the_trainer_gives_up(self, tmp_path):
        made = trainer(tmp_path, rounds=1, max_accuracy_drop=1.0)
        made._baseline = {"loss": 0.0, "score": 1.0}  # no point of this training reaches it
        with pytest.raises(AccuracyBudgetError, match=r"100\.0 % before"):
            made.train()
        assert [(curve.stage, curve.t_star) for curve in made.curves] == [(1, 0.5)]

    def test_the_trainer_takes_the_chosen_point(self, tmp_path):
        made = trainer(tmp_path, rounds=1, max_accuracy_drop=100.0, sweep_points=5)
        made.train()
        assert [curve.t_star for curve in made.curves] == [0.5, 0.75]
        assert made.baseline == pytest.approx(made.measure(tiny.tensors(tiny.model("vit"))))

    def test_results_survive_json(self):
        result = CurveResult(1, 2, 6, 0.4, [CurvePoint(0.5, 1.0, 0.9, {"asr": 0.1})], 0.7)
        assert CurveResult.from_dict(result.to_dict()) == result


class TestMonitors:
    def test_recorded_at_every_point_and_never_looked_at(self, tmp_path):
        seen = []

        def monitor(forward) -> float:
            seen.append(forward(pixel_values=torch.zeros(1, 3, 8, 8)).logits)
            return float(len(seen))

        watched = trainer(tmp_path, rounds=1, monitors={"asr": monitor})
        watched.train()
        plain, _ = recorded(tmp_path, rounds=1)
        assert [p.monitors for c in watched.curves for p in c.sweep] == [{"asr": float(k)} for k in range(1, 7)]
        assert same(weights(watched), weights(plain))
        assert not torch.equal(seen[0], seen[1])


class TestRefusals:
    @pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
    def test_an_empty_dataset(self, tmp_path, name):
        data = {"train_dataset": tiny.digits(0, 4), "eval_dataset": tiny.digits(0, 4), name: tiny.digits(0, 0)}
        with pytest.raises(UsageError, match=f"{name} is empty: give more clean images"):
            TSCTrainer(tiny.model("vit"), config(tmp_path), processing_class=tiny.processor(), **data)

    def test_a_spec_that_does_not_fit(self, tmp_path):
        wrong = tiny.spec("vit")
        model = tiny.model("vit")
        model.vit.layers[0].mlp.activation_fn = nn.Softmax(-1)
        model.vit.layers[0].mlp.activation_fn.register_forward_hook(lambda _, args, out: out.cumsum(-1))
        with pytest.raises(
            PurificationError, match=r"does not keep its function: .* alone: vit\.layers\.0\.mlp\.hidden$"
        ):
            TSCTrainer(
                model,
                config(tmp_path),
                train_dataset=tiny.digits(0, 4),
                eval_dataset=tiny.digits(0, 4),
                processing_class=tiny.processor(),
                spec=wrong,
            )

    def test_a_loss_that_is_not_finite(self, tmp_path):
        with pytest.raises(
            PurificationError, match=r"the loss .* not finite; lower learning_rate|the loss is nan at step"
        ):
            trainer(tmp_path, learning_rate=1e20).train()

    def test_weights_that_are_not_finite(self, tmp_path):
        made = trainer(tmp_path)
        theta = tiny.tensors(tiny.model("vit"))
        broken = {**theta, "classifier.bias": torch.full((10,), math.nan)}
        for ends in ((theta, broken), (broken, theta)):
            with pytest.raises(
                PurificationError, match=r"weights of classifier\.bias are not finite; lower learning_rate=0\.1"
            ):
                made._lay_curve(*ends)

    def test_kinds_of_spaces_that_stay(self, tmp_path):
        """Without moving spaces the first curve is a loop: its ends are the suspect itself."""
        made = trainer(tmp_path, move_spaces=[])
        made.create_optimizer()
        made.begin()
        theta = dict(tiny.model("vit").named_parameters())
        assert all(torch.equal(t, theta[name]) for name, t in made.curve.end.items())
        made.args.move_spaces = ["hidden"]
        made.begin()
        moved = {name for name, t in made.curve.end.items() if not torch.equal(t, theta[name])}
        hidden = {name for name in tiny.spec("vit").axes if ".mlp." in name and not name.endswith("fc2.bias")}
        assert moved <= hidden
        assert len(moved) > 2


class TestStatistics:
    def statistics(self, folder, **changes):
        point = trainer(folder, "resnet", **changes).point(0.3)
        return {name: tensor for name, tensor in point.items() if name.endswith(("running_mean", "running_var"))}

    def test_training_images_without_changes_are_the_clean_ones(self, tmp_path):
        clean, training = (
            self.statistics(tmp_path, augmentation="none", batch_norm_images=images)
            for images in ("clean", "training")
        )
        for name, tensor in clean.items():  # in one batch of all images, whatever their order
            assert torch.allclose(training[name], tensor, rtol=1e-5, atol=1e-6), name

    def test_two_passes_over_images_as_training_shows_them(self, tmp_path):
        made = trainer(tmp_path, "resnet", augmentation="crop", mixup_alpha=1.0, statistics_batch_size=12)
        shown, draw = [], made.objective.training_inputs
        made.objective.training_inputs = lambda batch, *, seed: shown.append((batch, seed)) or draw(batch, seed=seed)
        found = made.point(0.3)
        assert [len(batch["pixels"]) for batch, _ in shown] == [12, 4, 12, 4]
        assert len({seed for _, seed in shown}) == 4
        first, second = (torch.cat([shown[i][0]["pixels"], shown[i + 1][0]["pixels"]]) for i in (0, 2))
        assert not torch.equal(first, second)
        assert sorted(map(bytes, first.flatten(1).numpy())) == sorted(map(bytes, second.flatten(1).numpy()))
        inputs = [draw(batch, seed=seed) for batch, seed in shown]
        params = {name: found[name] for name, _ in made.suspect.named_parameters()}
        expected = recompute_statistics(made.suspect, params, inputs, dict(made.suspect.named_buffers()))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert same(found, made.point(0.3))


@pytest.mark.parametrize("stages", [1, 2])
def test_little_memory_for_statistics_changes_nothing(tmp_path, stages, monkeypatch):
    """A round of one curve un-aligns only; one of two aligns as well."""
    passes = []
    begin = TSCTrainer._clean_batches
    options = {"rounds": 1, "stages": stages, "max_positions": 2}
    whole, _ = recorded(tmp_path, **options)
    monkeypatch.setattr(TSCTrainer, "_clean_batches", lambda made: passes.append(made) or begin(made))
    less, _ = recorded(tmp_path, **options, statistics_memory_gb=1e-5)
    assert len(passes) > stages
    assert same(weights(whole), weights(less))
    with pytest.raises(UsageError, match="the matrices of"):
        trainer(tmp_path, statistics_memory_gb=1e-7).train()


def test_channels_last_changes_the_memory_format_and_not_the_course(tmp_path):
    plain, other = (trainer(tmp_path / str(on), "resnet", channels_last=on) for on in (False, True))
    for made in (plain, other):
        made.train()
    kernels = [bend for bend in other.curve.bend.values() if bend.ndim == 4 and bend.shape[2] > 1]
    assert len(kernels) > 3
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    for name, point in plain.purified_model().state_dict().items():
        torch.testing.assert_close(other.purified_model().state_dict()[name], point, rtol=1e-3, atol=1e-4)


def test_channels_last_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path):
    whole = trainer(tmp_path / "whole", "resnet", channels_last=True, save_strategy="steps", save_steps=4)
    whole.train()
    again = trainer(tmp_path / "again", "resnet", channels_last=True)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert same(weights(again), weights(whole))


def test_bf16_trains_and_gives_float32_weights(tmp_path):
    made = trainer(tmp_path, "vit", bf16=True)
    made.train()
    found = made.purified_model().state_dict()
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in found.values())
