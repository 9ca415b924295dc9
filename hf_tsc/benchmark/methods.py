"""The methods of a benchmark. Each leaves paths through weight space, whose points are then measured alike.

`fine_tuning` leaves the straight line from the suspect (0) to the fine-tuned model (1), so that one run answers for
plain and for interpolated fine-tuning. `tsc` leaves its curves, from the suspect (0) to its un-aligned copy or to the
point of the curve before (1).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from hf_tsc.activations import Batch
from hf_tsc.baselines.fine_tuning import FineTuning, fine_tune, interpolate
from hf_tsc.curve_result import CurveResult
from hf_tsc.errors import UsageError
from hf_tsc.images import collate
from hf_tsc.objectives import ImageClassification, Objective
from hf_tsc.permutation import Params
from hf_tsc.tasks import LossSettings
from hf_tsc.tsc_config import CLASSIFYING, TSCConfig, reported_arguments
from hf_tsc.tsc_trainer import TSCTrainer

PERMUTATIONS = ("matched", "identity", "random")
Point = Callable[[float], Params]
# called with a path's name, whether it is the last one, its points, and the point that is taken
Visit = Callable[[str, bool, Point, float], None]


@dataclass(frozen=True)
class Case:
    """What a method works on.

    `objective` makes what is trained for, of the method's settings; None for classifiers, which the methods know.
    `objectives` names those that fit.
    """

    suspect: PreTrainedModel
    processor: Any
    train: Any
    held_out: Any
    seed: int
    objective: Callable[[LossSettings], Objective] | None = None
    objectives: Sequence[str] = CLASSIFYING


@dataclass(frozen=True)
class Outcome:
    """What a method took: gradient evaluations, and all its arguments, defaults included."""

    gradient_evaluations: int
    arguments: dict[str, Any]


def check_settings(method: str, settings: dict[str, Any]) -> None:
    """Raises UsageError where a method would refuse its settings."""
    if method == "fine_tuning":
        _fine_tuning(settings)
        return
    options = dict(settings)
    if (permutation := options.pop("permutation", PERMUTATIONS[0])) not in PERMUTATIONS:
        raise UsageError(f"permutation={permutation!r}: expected one of {', '.join(PERMUTATIONS)}")
    if unknown := sorted(set(options) - set(TSCConfig.__dataclass_fields__)):
        raise UsageError(f"tsc has no setting(s) {', '.join(unknown)}")
    TSCConfig(output_dir="unused", use_cpu=True, **options)


def _fine_tuning(settings: dict[str, Any]) -> FineTuning:
    known = {entry.name: entry for entry in fields(FineTuning)}
    if unknown := sorted(set(settings) - set(known)):
        raise UsageError(f"fine_tuning has no setting(s) {', '.join(unknown)}")
    if missing := [name for name in ("steps", "learning_rate") if name not in settings]:
        raise UsageError(f"fine_tuning needs the setting(s) {', '.join(missing)}")
    return FineTuning(**settings)


def run_fine_tuning(case: Case, settings: dict[str, Any], visit: Visit) -> Outcome:
    """Fine-tune, and visit the line back to the suspect."""
    chosen = _fine_tuning(settings)
    objective = case.objective(chosen) if case.objective is not None else None
    tuned = fine_tune(case.suspect, case.train, chosen, seed=case.seed, objective=objective, use_cpu=True)
    inputs = ImageClassification(case.train.pipeline) if objective is None else objective

    def point(alpha: float) -> Params:
        return interpolate(case.suspect, tuned, alpha, _clean_batches(case, inputs))

    visit("interpolation", True, point, 1.0)
    return Outcome(chosen.steps, asdict(chosen))


def run_tsc(case: Case, settings: dict[str, Any], visit: Visit) -> Outcome:
    """Purify, and visit every curve."""
    check_settings("tsc", settings)
    options = dict(settings)
    permutation = options.pop("permutation", PERMUTATIONS[0])
    with tempfile.TemporaryDirectory() as folder:
        if "max_accuracy_drop" not in options:
            options.setdefault("sweep_points", 3)  # the trainer's own sweep is not needed
        quiet = {"disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "report_to": "none"}
        config = TSCConfig.for_model(
            case.suspect,
            objectives=case.objectives,
            output_dir=folder,
            seed=case.seed,
            use_cpu=True,
            **{**options, **quiet},
        )
        trainer = _VisitingTrainer(
            case.suspect,
            config,
            train_dataset=case.train,
            eval_dataset=case.held_out,
            processing_class=case.processor,
            objective=case.objective(config) if case.objective is not None else None,
            visit=visit,
            permutation=permutation,
        )
        trainer.train()
        return Outcome(trainer.state.max_steps, {**reported_arguments(config), "permutation": permutation})


METHODS: dict[str, Callable[[Case, dict[str, Any], Visit], Outcome]] = {
    "fine_tuning": run_fine_tuning,
    "tsc": run_tsc,
}


class _VisitingTrainer(TSCTrainer):
    """Lets every curve be seen before the next one is laid; `permutation` replaces what matching found.

    `random` draws every permutation, `identity` moves nothing: what un-alignment is worth shows beside them.
    """

    def __init__(self, *args: Any, visit: Visit, permutation: str, **kwargs: Any):
        self.visit, self.permutation = visit, permutation
        super().__init__(*args, **kwargs)

    def on_curve_end(self, result: CurveResult) -> None:
        last = result.step >= self.args.max_steps
        with torch.no_grad():
            self.visit(f"round {result.round}, curve {result.stage}", last, self.point, result.t_star)

    def _match(self, points: list[Params], *, maximize: bool) -> dict[str, Tensor]:
        found = super()._match(points, maximize=maximize)
        if self.permutation == "matched" or maximize:
            return found
        if self.permutation == "identity":
            return {name: torch.arange(perm.shape[-1]).expand_as(perm).clone() for name, perm in found.items()}
        generator = np.random.default_rng([self.args.seed, self.state.global_step, 7])
        moving = {name for name, perm in found.items() if not bool((perm == torch.arange(perm.shape[-1])).all())}
        return {
            name: torch.from_numpy(generator.permuted(perm.numpy(), axis=-1)) if name in moving else perm
            for name, perm in found.items()
        }


def _clean_batches(case: Case, objective: Objective) -> Iterator[Batch]:
    loader: Any = DataLoader(case.train, batch_size=128, collate_fn=collate, generator=torch.Generator())
    return (objective.model_inputs(batch) for batch in loader)
