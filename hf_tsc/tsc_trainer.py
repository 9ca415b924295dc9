"""TSCTrainer: Two-stage Symmetry Connectivity as one `Trainer.train()`.

The curves of all rounds are segments of one step counter. At a segment's end a callback takes the curve point,
matches, and rewrites start, bend and end in place.

    θ   the model at the start of a round            θ'  = π(θ, P'),  P'  un-aligns θ from itself
    θ1  = γ1(t*), γ1 from θ to θ'                    θ'' = π(θ, P''), P'' aligns θ with θ1
    θ2  = γ2(t*), γ2 from θ'' to θ1                  the next round starts from θ2
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback

from hf_tsc.activations import Batch
from hf_tsc.curve import CurveModel
from hf_tsc.curve_result import CurvePoint, CurveResult, choose_point
from hf_tsc.curve_trainer import CurveTrainer
from hf_tsc.derive import example_inputs, verify
from hf_tsc.errors import PurificationError, UsageError
from hf_tsc.folders import sha256
from hf_tsc.functional import model_at, tensors_of
from hf_tsc.hub import Pushed, PushOptions, is_folder, push_folder, resolve_model
from hf_tsc.images import ImagePipeline
from hf_tsc.objectives import Forward, HiddenStates, ImageClassification, Objective
from hf_tsc.objectives.hidden_states import following
from hf_tsc.passes import match_networks, restrict
from hf_tsc.permutation import KINDS, Params, PermutationSpec, apply, identity, moved_fraction
from hf_tsc.processes import (
    check_world_size,
    number_of_processes,
    of_all,
    on_main_process,
    rank,
    together,
)
from hf_tsc.report import PurificationReport, environment, summarise_spec
from hf_tsc.specs import spec_of
from hf_tsc.tasks import task_of
from hf_tsc.towers import TOWERS, parameters_by_tower, spaces_clear_of
from hf_tsc.tsc_config import TSCConfig, reported_arguments
from hf_tsc.unmoved_states import unmoved_states

Monitor = Callable[[Forward], float]

logger = logging.getLogger(__name__)


class TSCTrainer(CurveTrainer):
    """Purifies a model on a small clean data set.

    In several processes, each reads its share of the images; statistics are added up, the assignment problems divided,
    and the points of a sweep, too. What comes out is the same in all of them.

    Args:
        model: the suspect, in float32; it is copied and not changed.
        args: the configuration.
        train_dataset: clean items `{"pixels": uint8 (3, H, W), "labels": int}` (labels only where the objective needs
            them), as `PixelDataset` gives them.
        eval_dataset: the held-out part of the clean data, same items: sweeps and `max_accuracy_drop` use it.
        processing_class: the model's image processor.
        objective: what the curves are trained for; by default classification, as `args` say.
        monitors: further measures of each point of a sweep, by name: functions of the point's forward. They are
            recorded and plotted, and never looked at when a point is chosen (an attack success rate belongs here).
        spec: the model's permutation spec; derived from the model when not given. It is verified in any case.
        callbacks: as in `Trainer`.

    Raises:
        UsageError: an empty data set; processes that were launched together and do not train together, or that would
            shard the model.
        PurificationError: the spec does not verify; a loss or a weight is not finite.
        AccuracyBudgetError: no point of the last curve is within `max_accuracy_drop`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TSCConfig,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        processing_class: Any,
        objective: Objective | None = None,
        monitors: Mapping[str, Monitor] | None = None,
        spec: PermutationSpec | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        check_world_size()
        args.check_following()
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if len(dataset) == 0:  # type: ignore[arg-type]
                raise UsageError(f"{name} is empty: give more clean images")
        args = copy.copy(args)  # what is decided here is not the caller's
        inputs = example_inputs(model)
        self.spec = spec if spec is not None else spec_of(model, inputs)
        self.verification = verify(model, self.spec, inputs)
        self.monitors = dict(monitors or {})
        suspect = copy.deepcopy(model).eval().requires_grad_(False)
        if objective is None:
            score_name = "accuracy" if "labels" in eval_dataset[0] else "agreement"
            objective = _classification(args, processing_class, suspect, score_name)
        curve = CurveModel(model)
        self._movable = _keep_towers(curve, model, self.spec, inputs, args)
        _check_movable(self._movable, model, args)
        objective = _followed(objective, model, self._movable, inputs, args)
        super().__init__(
            suspect,
            curve,
            args,
            objective=objective,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[_SegmentCallback(self), *(callbacks or [])],
        )
        self._baseline: dict[str, float] | None = None

    # --- the course: one step counter, cut into segments ---------------------------------------------------------

    def begin(self) -> None:
        """Un-align, and lay the first curve of a training that starts from nothing."""
        self._begin_first_curve(tensors_of(self.suspect))

    def _begin_first_curve(self, theta: Params) -> None:
        """γ1: from θ to its un-aligned copy θ'."""
        permutation = self._match([theta], maximize=False)
        self._lay_curve(theta, apply(theta, self.spec, permutation))

    def _begin_second_curve(self, theta: Params, theta1: Params) -> None:
        """γ2: from θ'', θ aligned with θ1, to θ1."""
        permutation = self._match([theta1, theta], maximize=True)
        self._lay_curve(apply(theta, self.spec, permutation), theta1)

    def finish_segment(self) -> None:
        """Measure the finished curve, take its point, lay the next curve (after the last: its point at both ends)."""
        step = self.state.global_step
        round_, stage = self._segment(step - 1)
        last = step >= self.args.max_steps
        sweep = self._sweep()
        t_star = self._choose_t(sweep, stage, last=last)
        point = self.point(t_star)
        result = CurveResult(round_, stage, step, t_star, sweep, self._moved)
        self._record(result, on_main_process(lambda: self.measure(point)))
        self.on_curve_end(result)
        if last:
            self._lay_curve(point, point)
        elif stage < self.args.stages:
            self._begin_second_curve(self.point(0.0), point)
        else:
            self._begin_first_curve(point)

    def on_curve_end(self, result: CurveResult) -> None:
        """For subclasses: called in every process when a curve is measured, while `point` still gives its points."""

    def _record(self, result: CurveResult, taken: dict[str, float]) -> None:
        # not through `log`: a sweep is a list, which loggers do not take; here it travels with every checkpoint
        self.state.log_history.append({"step": result.step, "curve_result": result.to_dict()})  # type: ignore[dict-item]
        scores = {f"clean_{self.objective.score_name}": taken["score"], "clean_loss": taken["loss"]}
        self.log({"round": result.round, "curve": result.stage, "t": result.t_star, **scores})

    @property
    def curves(self) -> list[CurveResult]:
        """The finished curves, those before a resume included."""
        records: list[Any] = [entry.get("curve_result") for entry in self.state.log_history]
        return [CurveResult.from_dict(record) for record in records if record]

    # --- points -------------------------------------------------------------------------------------------------

    def purified_model(self) -> PreTrainedModel:
        """The result of a finished training, an ordinary model with the suspect's configuration; see `point`.

        Raises:
            PurificationError: the training is not finished.
        """
        step, steps = self.state.global_step, self.args.max_steps
        if step < steps:
            raise PurificationError(f"training stands at step {step} of {steps}: there is no purified model yet")
        return model_at(self.suspect, self.point(0.0)).requires_grad_(True)

    # --- matching -----------------------------------------------------------------------------------------------

    def _match(self, points: list[Params], *, maximize: bool) -> dict[str, Tensor]:
        args = self.args
        kinds: Any = args.move_spaces
        permutation = identity(self.spec) | match_networks(
            self.suspect,
            self._movable,
            self._clean_batches,
            points=points,
            maximize=maximize,
            method=args.matching,
            kinds=kinds,
            max_positions=args.max_positions,
            seed=args.seed,
            memory_limit=args.statistics_bytes,
            progress=not args.disable_tqdm and self.is_world_process_zero(),
        )
        moved = moved_fraction(permutation)
        share = sum(moved.values()) / max(len(moved), 1)
        self.state.log_history.append({"step": self.state.global_step, "moved": share})
        return permutation

    @property
    def _moved(self) -> float:
        """Share of units moved by the last matching; from the log, which travels with every checkpoint."""
        return next(entry["moved"] for entry in reversed(self.state.log_history) if "moved" in entry)

    # --- measuring ----------------------------------------------------------------------------------------------

    @property
    def baseline(self) -> dict[str, float]:
        """`loss` and `score` of the suspect on the held-out images; every process has to ask for it."""
        if self._baseline is None:
            self._baseline = on_main_process(lambda: self.measure(tensors_of(self.suspect)))
        return self._baseline

    def _sweep(self) -> list[CurvePoint]:
        """All points; each is measured by one process."""
        measured: list[CurvePoint] = []
        positions = np.linspace(0, 1, self.args.sweep_points).round(4).tolist()
        for first in range(0, len(positions), number_of_processes()):
            own: list[tuple[float, Params]] = []
            for number, t in enumerate(positions[first : first + number_of_processes()]):
                point = self.point(t)
                own += [(t, point)] if number == rank() else []
            with together():
                measured += [self._measured_point(t, point) for t, point in own]
        return sorted(itertools.chain(*of_all(measured)), key=lambda point: point.t)

    def _measured_point(self, t: float, point: Params) -> CurvePoint:
        measured = self.measure(point)
        if not math.isfinite(measured["loss"]):
            rate = self.args.learning_rate
            raise PurificationError(f"the loss at t={t} is not finite; lower learning_rate={rate}")
        forward = self._forward_at(point)
        monitored = {name: monitor(forward) for name, monitor in self.monitors.items()}
        return CurvePoint(t, measured["loss"], measured["score"], monitored)

    def _choose_t(self, sweep: list[CurvePoint], stage: int, *, last: bool) -> float:
        """t*: as configured, or by the accuracy budget."""
        drop = self.args.max_accuracy_drop
        if drop is None:
            return self.args.curve1_t if stage == 1 else self.args.curve2_t
        return choose_point(sweep, stage=stage, baseline=self.baseline["score"], max_drop=drop, last=last)

    # --- the Trainer's methods that have to differ ----------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss and score, on the held-out images, of the point that would be taken now, or has just been."""
        step = self.state.global_step
        first = self._segment(step)[1] == 1
        if step and step % self.segment_steps == 0:  # the point is an end of the curve that has been laid since
            point = self.point(0.0 if first else 1.0)
        else:
            point = self.point(self.args.curve1_t if first else self.args.curve2_t)
        measured = on_main_process(lambda: self.measure(point))
        metrics = {"eval_loss": measured["loss"], f"eval_{self.objective.score_name}": measured["score"]}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A user's call saves the purified model; the Trainer's own, for checkpoints, the curve with its ends."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        folder: Any = output_dir or self.args.output_dir
        processor: Any = self.processing_class
        purified = self.purified_model()
        with together():
            if self.args.should_save:
                purified.save_pretrained(folder)
                processor.save_pretrained(folder)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str | None = None,
        *,
        private: bool | None = None,
        create_pr: bool = False,
        onto_suspect: bool = False,
        token: str | None = None,
        dataset_name: str = "images that were not named",
    ) -> Pushed:
        """Push the purified model, after `train()`, as `hf-tsc purify --push_to_hub` does: no pickle, one commit.

        Args:
            repo_id: `owner/name`; `hub_model_id` of the arguments by default.
            private: what a new repo is; by default `hub_private_repo` of the arguments, and private if that is None.
            create_pr: open a pull request on a repo that exists.
            onto_suspect: the repo may be the suspect's own.
            token: that may write; by default `hub_token` of the arguments, else the saved one.
            dataset_name: of the clean images, for the card.

        Raises:
            UsageError: there is nothing to push yet, or no repo is named; see `push_folder`.
        """
        repo_id = repo_id or self.args.hub_model_id
        if repo_id is None:
            raise UsageError("push_to_hub: expected a repo id, as an argument or as hub_model_id")
        if not self.curves or self.state.global_step < self.args.max_steps:
            raise UsageError("push_to_hub: the purification is not finished; call train() first")
        if private is None:
            private = self.args.hub_private_repo is not False
        with tempfile.TemporaryDirectory(prefix="hf_tsc_") as folder:
            self.save_model(folder)
            self._report_of_a_folder(Path(folder), dataset_name).write(Path(folder), self.curves)
            options = PushOptions(repo_id, private, create_pr, onto_suspect, token or self.args.hub_token)
            return on_main_process(lambda: push_folder(Path(folder), options))

    def report(self, *, cost: dict[str, Any], **further: Any) -> PurificationReport:
        """The report of a finished training; `further` are its fields that the trainer does not know."""
        evaluations = self.state.max_steps * self.args.gradient_accumulation_steps
        return PurificationReport(
            spec=summarise_spec(self.spec, self.verification.error, self.verification.control),
            arguments=self.reported_arguments(),
            curves=[curve.to_dict() for curve in self.curves],
            score_name=self.objective.score_name,
            environment=environment(self.args.device),
            cost={"gradient_evaluations": evaluations, **cost},
            **further,
        )

    def reported_arguments(self) -> dict[str, Any]:
        """The arguments as a report gives them, and what became of a `relative_rate`."""
        found = {"rate_factor": round(self.rate_factor, 4)} if self._scaled else {}
        return {**reported_arguments(self.args), **found}

    def _report_of_a_folder(self, folder: Path, dataset_name: str) -> PurificationReport:
        """What a trainer alone knows of a purification that is saved in a folder."""
        path, model, n = self.suspect.config.name_or_path or "", type(self.suspect).__name__, len(self.eval_dataset)  # type: ignore[arg-type]
        name = "" if is_folder(path) or Path(path).exists() else path  # a place on this machine tells nobody anything
        seconds = [entry["train_runtime"] for entry in self.state.log_history if "train_runtime" in entry]
        score, point = self.objective.score_name, self.point(0.0)
        after = on_main_process(lambda: self.measure(point))["score"]
        return self.report(
            suspect={"name": name or model, "repo_id": name or None, "revision": None, "architecture": model},
            dataset={"name": dataset_name, "fingerprint": "not known", "images": [len(self.train_dataset), n]},  # type: ignore[arg-type]
            before={"held_out": {"n": n, score: self.baseline["score"]}},
            after={"held_out": {"n": n, score: after}},
            purified={
                "dtype": str(self.suspect.dtype).removeprefix("torch."),
                "files": {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))},
            },
            cost={"seconds": self.seconds_before + sum(seconds)},
            task=task_of(resolve_model(str(folder), local=True)).described(),
        )


def _keep_towers(
    curve: CurveModel, model: PreTrainedModel, spec: PermutationSpec, inputs: Batch, args: TSCConfig
) -> PermutationSpec:
    """Freeze the towers that are not trained; returns the spaces and taps of those that may move."""
    if set(args.move_towers) == set(args.train_towers) == set(TOWERS):
        return spec
    by_tower = parameters_by_tower(copy.deepcopy(model).cpu().requires_grad_(True), inputs)  # as the inputs are
    for name in set[str]().union(*(by_tower[tower] for tower in TOWERS if tower not in args.train_towers)):
        curve.bend[name].requires_grad_(False)
    still = set[str]().union(*(by_tower[tower] for tower in TOWERS if tower not in args.move_towers))
    return restrict(spec, spaces_clear_of(spec, still))


def _check_movable(spec: PermutationSpec, model: PreTrainedModel, args: TSCConfig) -> None:
    """Raises UsageError where nothing can move although something should."""
    there = [kind for kind in KINDS if any(space.kind == kind for space in spec.spaces.values())]
    if there and args.move_spaces and not set(there) & set(args.move_spaces):
        raise UsageError(
            f"{type(model).__name__} has no spaces of the kinds {', '.join(args.move_spaces)}: expected some of "
            f"{', '.join(there)} in move_spaces, or nothing would move"
        )


def _followed(
    objective: Objective, model: PreTrainedModel, spec: PermutationSpec, inputs: Batch, args: TSCConfig
) -> Objective:
    """The objective, following those hidden states alone that the curve's end has in common with the suspect."""
    states: HiddenStates | None = getattr(objective, "hidden_states", None)
    if states is None:
        return objective
    kinds: Any = args.move_spaces
    places = unmoved_states(model, spec, kinds, inputs)
    if not places:
        logger.warning(
            "%s has no hidden state that stays in place along the curve: feature_weight=%g has no effect; "
            "feature_weight=0 takes the defaults that go without it",
            type(model).__name__,
            states.weight,
        )
        args.feature_weight = 0.0
    return following(objective, places)


class _SegmentCallback(TrainerCallback):
    """Calls the trainer at the beginning and at the end of each segment."""

    def __init__(self, trainer: TSCTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.trainer.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.trainer.segment_steps == 0:
            due = control.should_log
            self.trainer.finish_segment()
            control.should_log = due  # cleared by what was logged meanwhile; the loss of this step is still to come


def _classification(args: TSCConfig, processor: Any, suspect: PreTrainedModel, score_name: str) -> ImageClassification:
    """The objective that the arguments describe; without labels the suspect also answers for them in measures."""
    if further := sorted(example_inputs(suspect).keys() - {"pixel_values"}):
        raise UsageError(
            f"{type(suspect).__name__} reads {', '.join(further)}: expected a classifier that reads pixel_values "
            f"alone; give an objective of your own that makes its inputs"
        )
    return ImageClassification.of(args, ImagePipeline(processor), suspect, score_name=score_name)
