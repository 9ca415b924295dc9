"""A purification by one of the baselines: from a job to the purified model and what the report says of the method."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedModel

from hf_tsc.baselines.base import Case, Point
from hf_tsc.baselines.registry import BASELINES, check_fits, loss_config, run_baseline, settings_of
from hf_tsc.baselines.settings import Settings
from hf_tsc.curve_result import CurveResult
from hf_tsc.errors import UsageError
from hf_tsc.functional import model_at
from hf_tsc.job import Job, OwnScore
from hf_tsc.permutation import PermutationSpec
from hf_tsc.processes import number_of_processes
from hf_tsc.report import PurificationReport, environment
from hf_tsc.tasks import Task
from hf_tsc.tsc_config import TSCConfig

METHODS = ("tsc", *BASELINES)
SHARED = {"seed": 42, "use_cpu": False}  # what every baseline takes besides its settings


def check_method(method: str, config: Any, *, preset: str, resume: bool) -> None:
    """Raises UsageError where a method is unknown, or asked for what it does not do."""
    if method not in METHODS:
        raise UsageError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    if method == "tsc":
        given = set() if isinstance(config, TSCConfig) else set(config or {})
        if unknown := sorted(given - set(TSCConfig.__dataclass_fields__)):
            raise UsageError(f"config: {', '.join(unknown)}: expected fields of TSCConfig or of TrainingArguments")
        return
    if isinstance(config, TSCConfig):
        raise UsageError(f"method {method} has settings of its own: give config as a mapping of them, no TSCConfig")
    if preset != "default":
        raise UsageError(f"preset={preset!r} is one of tsc: the defaults of method {method} are those published")
    if resume:
        raise UsageError(f"method {method} leaves no checkpoints to go on from: start it anew, without --resume")
    if number_of_processes() > 1:
        raise UsageError(f"method {method} trains in one process: start it without a launcher or --accelerate_config")


@dataclass
class BaselineRun:
    """One run of a baseline on one model.

    Attributes:
        name: of the method.
        settings: its own.
        objectives: those that fit the model.
        config: what the settings and the seed are to the model's task.
        curves: none.
        spec: none, as nothing is permuted.
        seconds_before: none, as it is not resumed.
    """

    name: str
    settings: Settings
    objectives: Collection[str]
    config: TSCConfig
    curves: list[CurveResult] = field(default_factory=list)
    spec: PermutationSpec | None = None
    seconds_before: float = 0.0

    @classmethod
    def of(cls, name: str, suspect: PreTrainedModel, kind: type[Task], options: Mapping[str, Any]) -> BaselineRun:
        """The run that the options ask for.

        Raises:
            UsageError: the method does not fit the model; a setting that it does not know, or a wrong value.
        """
        check_fits(name, kind.objectives)
        own = {key: value for key, value in options.items() if key not in SHARED}
        shared: dict[str, Any] = {key: options.get(key, usual) for key, usual in SHARED.items()}
        settings = settings_of(name, own, kind.objectives)
        config = loss_config(settings, suspect, objectives=kind.objectives, **shared)
        return cls(name, settings, kind.objectives, config)

    def prepare(self, job: Job) -> OwnScore:
        """Take the job's images; returns how models are scored on the held-out ones."""
        subset, task = job.work.subset, job.task
        self._case = Case(
            job.model,
            job.work.pipeline.processor,
            task.items(subset.train),
            task.items(subset.held_out),
            self.config.seed,
            objective=task.objective_of,
            objectives=self.objectives,
            use_cpu=self.config.use_cpu,
        )
        objective = task.objective_of(self.settings)
        images = len(self._case.held_out)
        return OwnScore(
            self._case.device, objective.score_name, images, lambda params: self._case.score(objective, params)
        )

    def run(self) -> PreTrainedModel:
        """The purified model; raises as `run_baseline`."""
        self._paths: list[dict[str, Any]] = []
        taken_points: list[PreTrainedModel] = []

        def visit(name: str, last: bool, point: Point, taken: float) -> None:
            self._paths.append({"path": name, "taken": taken})
            if last:
                taken_points.append(model_at(self._case.suspect, point(taken)))

        self._outcome = run_baseline(self.name, self._case, self.settings, visit)
        (purified,) = taken_points
        return purified.requires_grad_(True)

    def report(self, *, cost: dict[str, Any], **further: Any) -> PurificationReport:
        """The report of a finished run; `further` are its fields that the run does not know."""
        baseline = BASELINES[self.name]
        described = {
            key: getattr(baseline, key) for key in ("title", "does", "chosen", "authors", "paper_title", "paper")
        }
        return PurificationReport(
            spec={},
            arguments={**asdict(self.settings), "seed": self.config.seed},
            curves=[],
            score_name=self._case.objective_of(self.settings).score_name,
            environment=environment(self._case.device),
            cost={"gradient_evaluations": self._outcome.gradient_evaluations, **cost},
            method={"name": self.name, **described, "paths": self._paths},
            **further,
        )
