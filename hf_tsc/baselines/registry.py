"""All baselines by name: what each is called and does, what it takes, and how its point is chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from transformers import PreTrainedModel

from hf_tsc.baselines.anp import ANP, run_anp
from hf_tsc.baselines.base import Case, Visit
from hf_tsc.baselines.fine_pruning import FinePruning, run_fine_pruning
from hf_tsc.baselines.fine_tuning import FineTuning, WiSEFT, run_fine_tuning, run_wise_ft
from hf_tsc.baselines.fst import FST, run_fst
from hf_tsc.baselines.ft_sam import FTSAM, run_ft_sam
from hf_tsc.baselines.i_bau import IBAU, run_i_bau
from hf_tsc.baselines.mcr import MCR, run_mcr
from hf_tsc.baselines.nad import NAD, run_nad
from hf_tsc.baselines.ridge import Ridge, run_ridge
from hf_tsc.baselines.settings import Settings
from hf_tsc.errors import UsageError
from hf_tsc.tsc_config import CLASSIFYING, OBJECTIVE_DEFAULTS, TSCConfig


@dataclass(frozen=True)
class Outcome:
    """What a method took: gradient evaluations, and all its arguments, defaults included."""

    gradient_evaluations: int
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Baseline:
    """A defence to compare with.

    Attributes:
        title: what it is called; `short` in tables.
        settings: makes its settings, all of which have defaults.
        run: purifies, and visits the paths that it leaves; the last point taken is the result.
        does: what it does, in a sentence for the card.
        counted: what its gradient evaluations are.
        chosen: how its point is chosen, without a trigger.
        authors, paper_title, paper: where it is from; `paper` is an arXiv id. None for fine-tuning and ridge.
        any_objective: whether it takes encoders and dual encoders, too; others work on a classifier's logits or head.
    """

    title: str
    short: str
    settings: type[Settings]
    run: Callable[[Case, Any, Visit], None]
    does: str
    counted: str
    chosen: str
    authors: str | None = None
    paper_title: str | None = None
    paper: str | None = None
    any_objective: bool = False


BASELINES: dict[str, Baseline] = {
    "fine_tuning": Baseline(
        "fine-tuning",
        "fine-tuning",
        FineTuning,
        run_fine_tuning,
        "All weights are trained on the clean images.",
        "1 a step",
        "the last step",
        any_objective=True,
    ),
    "wise_ft": Baseline(
        "interpolated fine-tuning (WiSE-FT)",
        "WiSE-FT",
        WiSEFT,
        run_wise_ft,
        "All weights are trained on the clean images, and then moved back towards the suspect's on a straight line; "
        "BatchNorm statistics are recomputed.",
        "1 a step of the fine-tuning, none for the line",
        "`alpha`, or the point farthest from the suspect that keeps `max_accuracy_drop` on the held-out images",
        "Wortsman et al., CVPR 2022",
        "Robust fine-tuning of zero-shot models",
        "2109.01903",
        any_objective=True,
    ),
    "ft_sam": Baseline(
        "FT-SAM",
        "FT-SAM",
        FTSAM,
        run_ft_sam,
        "Fine-tuning with the gradient at weights that were moved uphill in proportion to their size.",
        "2 a step",
        "the last step",
        "Zhu et al., ICCV 2023",
        "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization",
        "2304.11823",
        any_objective=True,
    ),
    "fst": Baseline(
        "feature shift tuning (FST)",
        "FST",
        FST,
        run_fst,
        "The linear head is drawn anew, held at its norm and pushed away from the suspect's head while all weights "
        "are fine-tuned.",
        "1 a step",
        "the last step",
        "Min et al., NeurIPS 2023",
        "Towards Stable Backdoor Purification through Feature Shift Tuning",
        "2310.01875",
    ),
    "mcr": Baseline(
        "mode connectivity repair (MCR)",
        "MCR",
        MCR,
        run_mcr,
        "A quadratic Bezier curve from the suspect to a fine-tuned copy is trained on the clean images, and a point "
        "of it taken; BatchNorm statistics are recomputed.",
        "1 a step of the curve and 1 a step of the copy's fine-tuning",
        "`t`, or the point farthest from the suspect that keeps `max_accuracy_drop` on the held-out images",
        "Zhao et al., ICLR 2020",
        "Bridging Mode Connectivity in Loss Landscapes and Adversarial Robustness",
        "2005.00060",
        any_objective=True,
    ),
    "anp": Baseline(
        "adversarial neuron pruning (ANP)",
        "ANP",
        ANP,
        run_anp,
        "Masks on channels (or on hidden units, without BatchNorm) are trained against adversarial noise, and the "
        "units whose masks fall are pruned; no weight is trained.",
        "3 a step of the masks",
        "`threshold`, or the largest one that keeps `max_accuracy_drop` on the held-out images",
        "Wu and Wang, NeurIPS 2021",
        "Adversarial Neuron Pruning Purifies Backdoored Deep Models",
        "2110.14430",
    ),
    "i_bau": Baseline(
        "I-BAU",
        "I-BAU",
        IBAU,
        run_i_bau,
        "A perturbation common to all images is made as harmful as possible and unlearnt, with the gradient of that "
        "two-level problem.",
        "1 a batch of the inner pass, K + 3 a batch of the outer one",
        "the last round",
        "Zeng et al., ICLR 2022",
        "Adversarial Unlearning of Backdoors via Implicit Hypergradient",
        "2110.03735",
    ),
    "nad": Baseline(
        "neural attention distillation (NAD)",
        "NAD",
        NAD,
        run_nad,
        "The suspect is fine-tuned while its attention maps follow those of a copy that was fine-tuned before.",
        "1 a step, and 1 a step of the teacher's fine-tuning",
        "the last step",
        "Li et al., ICLR 2021",
        "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks",
        "2101.05930",
    ),
    "fine_pruning": Baseline(
        "fine-pruning",
        "fine-pruning",
        FinePruning,
        run_fine_pruning,
        "Units that are dormant on clean images are pruned, and the rest is fine-tuned.",
        "1 a step of the fine-tuning, none for the pruning",
        "`ratio`, or pruned in steps of 1 % until `max_accuracy_drop` is exceeded on the held-out images; then the "
        "last step",
        "Liu et al., RAID 2018",
        "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks",
        "1805.12185",
    ),
    "ridge": Baseline(
        "ridge reconstruction",
        "ridge",
        Ridge,
        run_ridge,
        "Every linear or convolutional layer in turn gets the smallest weights that still give about its outputs on "
        "the clean images; nothing is trained, and BatchNorm statistics stay. A method of this project.",
        "none",
        "`penalty`, or the largest one that keeps `max_accuracy_drop` on the held-out images",
        any_objective=True,
    ),
}


def settings_of(name: str, options: Mapping[str, Any], objectives: Collection[str] = CLASSIFYING) -> Settings:
    """The settings of a baseline.

    Args:
        name: of `BASELINES`.
        options: those that differ from its defaults.
        objectives: those that fit the model, its default first. Where the method's own default is none of them, the
            first takes its place that is no distillation, as the suspect answers like itself already; with what goes
            with it.

    Raises:
        UsageError: an unknown name, a wrong value.
    """
    kind = BASELINES[name].settings
    known = [entry.name for entry in fields(kind)]
    if unknown := sorted(set(options) - set(known)):
        raise UsageError(f"{name} has no setting(s) {', '.join(unknown)}: it knows {', '.join(known)}")
    if kind.objective not in objectives:
        learnt = [name for name in objectives if name != "distillation"]
        objective = options.get("objective", learnt[0])
        fitting = {key: value for key, value in OBJECTIVE_DEFAULTS.get(objective, {}).items() if key in known}
        return kind(**{"objective": objective, **fitting, **options})
    return kind(**options)


def loss_config(
    settings: Settings, suspect: PreTrainedModel, *, objectives: Collection[str], seed: int, use_cpu: bool
) -> TSCConfig:
    """The settings that make a loss, as a task of `hf_tsc.tasks` wants them."""
    shared = {entry.name: getattr(settings, entry.name) for entry in fields(Settings) if entry.name != "batch_size"}
    size = {"per_device_train_batch_size": settings.batch_size}
    still: dict[str, Any] = {"move_spaces": []}  # so that hidden states can be followed
    options: dict[str, Any] = {"output_dir": "unused", "seed": seed, "use_cpu": use_cpu, **shared, **size, **still}
    return TSCConfig.for_model(suspect, objectives=objectives, **options)


def run_baseline(name: str, case: Case, settings: Settings, visit: Visit) -> Outcome:
    """Run a baseline.

    Args:
        name: of `BASELINES`.
        case: the suspect, which is not changed, and its images.
        settings: of this baseline.
        visit: called with every path; points are on the device that the case works on.

    Raises:
        UsageError: the method does not fit the model.
        PurificationError: a loss is not finite.
        AccuracyBudgetError: no point keeps the accuracy that is asked for.
    """
    check_fits(name, case.objectives)
    suspect = copy.deepcopy(case.suspect).eval().requires_grad_(False).to(case.device)
    BASELINES[name].run(replace(case, suspect=suspect), settings, visit)
    return Outcome(settings.gradient_evaluations(len(case.train)), asdict(settings))


def check_fits(name: str, objectives: Collection[str]) -> None:
    """Raises UsageError where a method needs a classifier and the model, which these objectives fit, is none."""
    if not BASELINES[name].any_objective and not set(objectives) <= set(CLASSIFYING):
        able = ", ".join(other for other, baseline in BASELINES.items() if baseline.any_objective)
        raise UsageError(
            f"method {name} needs an image classifier, and the model is none: expected one of tsc, {able}"
        )
