"""TSCTrainer: Two-stage Symmetry Connectivity as one `Trainer.train()`.

The curves of all rounds are segments of one step counter. At a segment's end a callback takes the curve point,
matches, and rewrites start, bend and end in place; checkpoints hold all three, so that resuming is the Trainer's own.

    θ   the model at the start of a round            θ'  = π(θ, P'),  P'  un-aligns θ from itself
    θ1  = γ1(t*), γ1 from θ to θ'                    θ'' = π(θ, P''), P'' aligns θ with θ1
    θ2  = γ2(t*), γ2 from θ'' to θ1                  the next round starts from θ2
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import StateDictType
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler
from transformers import PreTrainedModel, SchedulerType, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hf_tsc.activations import Batch
from hf_tsc.batch_norm import recompute_statistics
from hf_tsc.curve import CurveModel
from hf_tsc.curve_result import CurvePoint, CurveResult, choose_point
from hf_tsc.derive import example_inputs, verify
from hf_tsc.errors import CheckpointError, PurificationError, UsageError
from hf_tsc.folders import seal_checkpoint, sha256, writing_checkpoint
from hf_tsc.functional import call_at, forget_caches, tensors_of
from hf_tsc.hub import Pushed, PushOptions, is_folder, push_folder
from hf_tsc.images import ImagePipeline
from hf_tsc.objective_trainer import ObjectiveTrainer
from hf_tsc.objectives import Forward, ImageClassification, Objective
from hf_tsc.passes import match_networks, restrict
from hf_tsc.permutation import Params, PermutationSpec, apply, identity, moved_fraction
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
from hf_tsc.synced_batch_norm import SyncedBatchNorm
from hf_tsc.towers import TOWERS, parameters_by_tower, spaces_clear_of
from hf_tsc.tsc_config import SCHEDULES, TSCConfig, reported_arguments

Monitor = Callable[[Forward], float]


class TSCTrainer(ObjectiveTrainer):
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

    args: TSCConfig

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
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if len(dataset) == 0:  # type: ignore[arg-type]
                raise UsageError(f"{name} is empty: give more clean images")
        args._n_gpu = min(args.n_gpu, 1)  # a process has one device; the Trainer would wrap several in DataParallel
        inputs = example_inputs(model)
        self.spec = spec if spec is not None else spec_of(model, inputs)
        self.verification = verify(model, self.spec, inputs)
        self.suspect = copy.deepcopy(model).eval().requires_grad_(False)
        self.monitors = dict(monitors or {})
        if objective is None:
            score_name = "accuracy" if "labels" in eval_dataset[0] else "agreement"
            objective = _classification(args, processing_class, self.suspect, score_name)
        curve = CurveModel(model)
        if args.activation_checkpointing:
            curve.activation_checkpointing_enable()  # so that it is refused here, and not after all preparations
        self._movable = _keep_towers(curve, model, self.spec, inputs, args)
        if args.channels_last:
            curve.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        super().__init__(
            objective=objective,
            model=curve,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[_SegmentCallback(self), *(callbacks or [])],
        )
        check_sharding(self.accelerator, args, objective)
        self.suspect.to(args.device)
        self.segment_steps = args.segment_steps(len(train_dataset))  # type: ignore[arg-type]
        self.args.max_steps = self.segment_steps * args.stages * args.rounds
        self._baseline: dict[str, float] | None = None

    # --- the course: one step counter, cut into segments ---------------------------------------------------------

    def _segment(self, step: int) -> tuple[int, int]:
        """(round, stage), both from 1, of the segment that optimisation step `step` (from 0) belongs to."""
        number = step // self.segment_steps
        return number // self.args.stages + 1, number % self.args.stages + 1

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

    def _lay_curve(self, start: Params, end: Params) -> None:
        """A fresh curve: ends and bend in place, no momentum from the one before."""
        for name in self.curve.names:
            if not (torch.isfinite(start[name]).all() and torch.isfinite(end[name]).all()):
                rate = self.args.learning_rate
                raise PurificationError(f"the weights of {name} are not finite; lower learning_rate={rate}")
        self.curve.set_ends(start, end)
        assert self.optimizer is not None, "curves are laid while training"
        self.optimizer.state.clear()

    def _record(self, result: CurveResult, taken: dict[str, float]) -> None:
        # not through `log`: a sweep is a list, which loggers do not take; here it travels with every checkpoint
        self.state.log_history.append({"step": result.step, "curve_result": result.to_dict()})  # type: ignore[dict-item]
        scores = {f"clean_{self.objective.score_name}": taken["score"], "clean_loss": taken["loss"]}
        self.log({"round": result.round, "curve": result.stage, "t": result.t_star, **scores})

    @property
    def curve(self) -> CurveModel:
        """The curve itself, without the objective's head and without the wrappers of a distributed run."""
        curve = self.bare_model
        assert isinstance(curve, CurveModel)
        return curve

    @property
    def curves(self) -> list[CurveResult]:
        """The finished curves, those before a resume included."""
        records: list[Any] = [entry.get("curve_result") for entry in self.state.log_history]
        return [CurveResult.from_dict(record) for record in records if record]

    # --- points -------------------------------------------------------------------------------------------------

    def point(self, t: float) -> Params:
        """γ(t) of the current curve: parameters, and buffers with recomputed BatchNorm statistics.

        Every process has to call it, as each reads its share of the images for the statistics.
        """
        return self._with_statistics(self.curve.point(t))

    def purified_model(self) -> PreTrainedModel:
        """The result of a finished training, an ordinary model with the suspect's configuration; see `point`.

        Raises:
            PurificationError: the training is not finished.
        """
        step, steps = self.state.global_step, self.args.max_steps
        if step < steps:
            raise PurificationError(f"training stands at step {step} of {steps}: there is no purified model yet")
        model = copy.deepcopy(self.suspect)
        saved, point = model.state_dict(), self.point(0.0)
        model.load_state_dict({**saved, **{name: tensor for name, tensor in point.items() if name in saved}})
        forget_caches(model)
        return model.requires_grad_(True)

    def _with_statistics(self, params: Params) -> Params:
        buffers = dict(self.suspect.named_buffers())
        detached = {name: tensor.detach() for name, tensor in params.items()}
        return {**detached, **recompute_statistics(self.suspect, detached, self._clean_batches(), buffers)}

    def _batches(self, dataset: Any, *, divided: bool = False) -> Iterator[Batch]:
        """In fixed order; `divided` among the processes: of W, process r has the batches r, r + W, ..."""
        size = self.args.statistics_batch_size
        batches = list(BatchSampler(SequentialSampler(dataset), size, drop_last=False))
        if divided:
            batches = batches[rank() :: number_of_processes()]
        loader: Any = DataLoader(dataset, batch_sampler=batches, collate_fn=self.data_collator)
        for batch in loader:
            yield self._prepare_inputs(batch)

    def _clean_batches(self) -> Iterator[Batch]:
        """This process' share of the training part, without augmentation."""
        return (self.objective.model_inputs(batch) for batch in self._batches(self.train_dataset, divided=True))

    # --- matching -----------------------------------------------------------------------------------------------

    def _match(self, points: list[Params], *, maximize: bool) -> dict[str, Tensor]:
        args = self.args
        kinds: Any = args.move_spaces
        gigabytes = args.statistics_memory_gb
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
            memory_limit=None if gigabytes is None else round(1e9 * gigabytes),
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

    def measure(self, tensors: Params) -> dict[str, float]:
        """`loss` and `score` of a point on the held-out images, all of which this process reads."""
        return self.objective.evaluate(self._forward_at(tensors), self._batches(self.eval_dataset))

    def _forward_at(self, tensors: Params) -> Forward:
        def forward(**inputs: Tensor) -> Any:
            return call_at(self.suspect, tensors, inputs)

        return forward

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
        monitored = {name: monitor(self._forward_at(point)) for name, monitor in self.monitors.items()}
        return CurvePoint(t, measured["loss"], measured["score"], monitored)

    def _choose_t(self, sweep: list[CurvePoint], stage: int, *, last: bool) -> float:
        """t*: as configured, or by the accuracy budget."""
        drop = self.args.max_accuracy_drop
        if drop is None:
            return self.args.curve1_t if stage == 1 else self.args.curve2_t
        return choose_point(sweep, stage=stage, baseline=self.baseline["score"], max_drop=drop, last=last)

    # --- the Trainer's methods that have to differ ----------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss at a random t, the same t for all processes and micro-batches of a step."""
        self.curve.t = self._draw_t(self.state.global_step)
        synced = self.args.sync_batch_norm and number_of_processes() > 1
        with SyncedBatchNorm() if synced else contextlib.nullcontext():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _draw_t(self, step: int) -> float:
        """t ~ U(window), a function of seed and step."""
        low, high = self.args.curve1_window if self._segment(step)[1] == 1 else self.args.curve2_window
        return low + (high - low) * float(np.random.default_rng([self.args.seed, step]).random())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All trained ones, as in the paper; the Trainer would leave out biases and norms, by their names."""
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        """The schedule starts anew at every segment and reaches 0 at its end."""
        if self.lr_scheduler is None:
            shape = SCHEDULES[str(SchedulerType(self.args.lr_scheduler_type).value)]
            steps, warmup = self.segment_steps, self.args.get_warmup_steps(self.segment_steps)

            def factor(step: int) -> float:
                k = step % steps if step < num_training_steps else steps
                return (k + 1) / (warmup + 1) if k < warmup else shape((k - warmup) / max(steps - warmup, 1))

            trained: Any = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(trained, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss and score of the point that would be taken now, on the held-out images."""
        stage = self._segment(max(self.state.global_step - 1, 0))[1]
        done = self.state.global_step >= self.args.max_steps
        t = 0.0 if done else self.args.curve1_t if stage == 1 else self.args.curve2_t
        point = self.point(t)
        measured = on_main_process(lambda: self.measure(point))
        metrics = {"eval_loss": measured["loss"], f"eval_{self.objective.score_name}": measured["score"]}
        self.log(metrics)
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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Sealed when all processes have written their parts; older ones go after that.

        The Trainer would remove older ones while other processes, or the disk, still owe something to this one.
        """
        folder = Path(str(self.args.output_dir))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with together(), writing_checkpoint(checkpoint):
                super()._save_checkpoint(model, trial)
                self._forget_between_curves()
            with together(), writing_checkpoint(checkpoint):
                if self.args.should_save:
                    seal_checkpoint(checkpoint)
        except CheckpointError:
            if self.args.should_save:
                shutil.rmtree(checkpoint, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(str(folder), limit)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._forget_between_curves()

    def _forget_between_curves(self) -> None:
        """Saving the optimizer of a sharded model gives it a state, by a step without gradients, if it has none."""
        if self.optimizer is not None and self.state.global_step % self.segment_steps == 0:
            self.optimizer.state.clear()

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
            arguments=reported_arguments(self.args),
            curves=[curve.to_dict() for curve in self.curves],
            score_name=self.objective.score_name,
            environment=environment(self.args.device),
            cost={"gradient_evaluations": evaluations, **cost},
            **further,
        )

    def _report_of_a_folder(self, folder: Path, dataset_name: str) -> PurificationReport:
        """What a trainer alone knows of a purification that is saved in a folder."""
        path, model, n = self.suspect.config.name_or_path, type(self.suspect).__name__, len(self.eval_dataset)  # type: ignore[arg-type]
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
            cost={"seconds": sum(seconds)},
        )


def check_sharding(accelerator: Accelerator, args: TSCConfig, objective: Objective) -> None:
    """Raises UsageError where the model would be sharded in a way that curves do not know."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UsageError(f"{kind.value} is not supported: start with --accelerate_config fsdp2, or multi_gpu")
    if kind != DistributedType.FSDP:
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            raise UsageError(
                f"FSDP was asked for, and accelerate would train as {kind.value}: it shards over several accelerators "
                "alone. Start with --accelerate_config multi_cpu on processors, or single_gpu"
            )
        return
    if not accelerator.is_fsdp2:
        raise UsageError("fsdp_version 1 is not supported: expected fsdp_version: 2, as in --accelerate_config fsdp2")
    if accelerator.state.fsdp_plugin.state_dict_type != StateDictType.SHARDED_STATE_DICT:
        raise UsageError("expected fsdp_state_dict_type: SHARDED_STATE_DICT, as in --accelerate_config fsdp2")
    if objective.head is not None:
        raise UsageError(
            f"objective={args.objective} trains a projection head, which cannot be sharded with the curve: start "
            "with --accelerate_config multi_gpu"
        )
    if args.channels_last:
        raise UsageError("channels_last does not go with FSDP2, which shards tensors in their usual memory format")


def _keep_towers(
    curve: CurveModel, model: PreTrainedModel, spec: PermutationSpec, inputs: Batch, args: TSCConfig
) -> PermutationSpec:
    """Freeze the towers that are not trained; returns the spaces and taps of those that may move."""
    if set(args.move_towers) == set(args.train_towers) == set(TOWERS):
        return spec
    by_tower = parameters_by_tower(copy.deepcopy(model).requires_grad_(True), inputs)
    for name in set[str]().union(*(by_tower[tower] for tower in TOWERS if tower not in args.train_towers)):
        curve.bend[name].requires_grad_(False)
    still = set[str]().union(*(by_tower[tower] for tower in TOWERS if tower not in args.move_towers))
    return restrict(spec, spaces_clear_of(spec, still))


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
    return ImageClassification(
        ImagePipeline(processor),
        augmentation=args.augmentation,
        teacher=suspect if args.objective == "distillation" else None,
        temperature=args.temperature,
        mixup_alpha=args.mixup_alpha,
        teacher_view=args.teacher_view,
        teacher_errors=args.teacher_errors,
        score_name=score_name,
    )
