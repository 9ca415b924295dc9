"""The methods of a benchmark. Each leaves paths through weight space, whose points are then measured alike.

`fine_tuning` leaves the straight line from the suspect (0) to the fine-tuned model (1), so that one run answers for
plain and for interpolated fine-tuning; what the others leave, `hf_tsc.baselines` says. `tsc` leaves its curves, from
the suspect (0) to its un-aligned copy or to the point of the curve before (1).
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_tsc.baselines.base import Case, Visit
from hf_tsc.baselines.registry import BASELINES, Outcome, run_baseline, settings_of
from hf_tsc.curve_result import CurveResult
from hf_tsc.errors import UsageError
from hf_tsc.permutation import Params
from hf_tsc.tsc_config import TSCConfig
from hf_tsc.tsc_trainer import TSCTrainer

PERMUTATIONS = ("matched", "identity", "random")
QUIET = {"disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "report_to": "none"}
OF_THE_CELL = ("output_dir", "seed", "use_cpu", *QUIET)  # arguments of a TSCConfig that are no settings


def check_settings(method: str, settings: dict[str, Any]) -> None:
    """Raises UsageError where a method would refuse its settings."""
    if method in BASELINES:
        settings_of(method, settings)
        needed = ("steps", "learning_rate") if method == "fine_tuning" else ()  # no published ones suit all
        if missing := [name for name in needed if name not in settings]:
            raise UsageError(f"{method} needs the setting(s) {', '.join(missing)}")
        return
    options = dict(settings)
    preset = options.pop("preset", "default")
    if (permutation := options.pop("permutation", PERMUTATIONS[0])) not in PERMUTATIONS:
        raise UsageError(f"permutation={permutation!r}: expected one of {', '.join(PERMUTATIONS)}")
    if unknown := sorted(set(options) - (set(TSCConfig.__dataclass_fields__) - set(OF_THE_CELL))):
        raise UsageError(f"tsc has no setting(s) {', '.join(unknown)}")
    TSCConfig.preset(preset, output_dir="unused", use_cpu=True, **options)


def _run_baseline(name: str, case: Case, settings: dict[str, Any], visit: Visit) -> Outcome:
    return run_baseline(name, case, settings_of(name, settings, case.objectives), visit)


def run_tsc(case: Case, settings: dict[str, Any], visit: Visit) -> Outcome:
    """Purify, and visit every curve."""
    check_settings("tsc", settings)
    permutation = settings.get("permutation", PERMUTATIONS[0])
    if "max_accuracy_drop" not in settings:
        settings = {"sweep_points": 3, **settings}  # the trainer's own sweep is not needed
    with tempfile.TemporaryDirectory() as folder:
        own = {**QUIET, "output_dir": folder, "seed": case.seed, "use_cpu": case.use_cpu}
        config = tsc_config(case.suspect, settings, objectives=case.objectives, **own)
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
        return Outcome(trainer.state.max_steps, {**trainer.reported_arguments(), "permutation": permutation})


def tsc_config(
    suspect: PreTrainedModel, settings: dict[str, Any], *, objectives: Collection[str], **options: Any
) -> TSCConfig:
    """What the settings of a cell ask for; those that are not given, a preset gives or the suspect's kind."""
    given = {name: value for name, value in settings.items() if name not in ("preset", "permutation")} | options
    preset = settings.get("preset", "default")
    if preset == "default":
        if "learning_rate" in given:
            given = {"relative_rate": False, **given}  # a plan that names a rate means it as it is
        return TSCConfig.for_model(suspect, objectives=objectives, **given)
    return TSCConfig.preset(preset, **given)


METHODS: dict[str, Callable[[Case, dict[str, Any], Visit], Outcome]] = {
    "fine_tuning": functools.partial(_run_baseline, "fine_tuning"),
    "tsc": run_tsc,
    **{name: functools.partial(_run_baseline, name) for name in BASELINES if name != "fine_tuning"},
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
