"""PurificationReport: what was done and measured, as JSON, as curve plots and as a model card."""

from __future__ import annotations

import json
import platform
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure

from hf_tsc.axes import Frozen
from hf_tsc.curve_result import CurveResult
from hf_tsc.evidence.rows import comparison_rows, trigger_rows
from hf_tsc.evidence.settings import EvidenceSettings
from hf_tsc.folders import CARD_FILE, PLOT_FILE, RECORD, REPORT_FILE, write_json
from hf_tsc.permutation import PermutationSpec
from hf_tsc.processes import number_of_processes
from hf_tsc.triggers import trigger_from_dict, trigger_to_dict

PAPER = {"title": "Circumventing Backdoor Space via Weight Symmetry", "id": "2506.07467"}
SETTINGS = (
    "rounds", "stages", "objective", "temperature", "teacher_view", "teacher_errors", "feature_weight",
    "feature_states", "mixup_alpha", "augmentation", "batch_norm_images", "matching", "move_spaces", "move_towers",
    "train_towers", "curve1_window", "curve1_t", "curve2_window", "curve2_t", "curve_epochs", "curve_steps", "optim",
    "learning_rate", "relative_rate", "rate_factor", "lr_scheduler_type", "weight_decay",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_accuracy_drop", "seed",
)  # fmt: skip
COMMAND_WIDTH = 100
FLAG = object()  # the value of an option that takes none
# Options of the command line -> what the description of a dataset calls it.
DATASET_OPTIONS = {
    "dataset_config_name": "config_name",
    "dataset_split": "split",
    "dataset_revision": "revision",
    "image_column_name": "image_column",
    "label_column_name": "label_column",
    "caption_column_name": "caption_column",
}
PACKAGES = ("hf_tsc", "torch", "transformers", "accelerate", "datasets", "huggingface_hub", "scipy", "kornia")


@dataclass(frozen=True)
class PurificationReport:
    """Everything that is needed to judge a purification and to repeat it.

    Attributes:
        suspect: repo id and commit, or None for a local folder; architecture; sha256 of the weight files.
        dataset: what identifies it; indices of the clean subset and of its held-out part.
        spec: summary of the permutation spec and what the gate measured; empty for a baseline.
        arguments: the hyper-parameters.
        curves: one `CurveResult` (as a dict) a curve; none for a baseline.
        before, after: measures by place: `held_out` (always), `test` (where a test set was given). Fractions.
        score_name: `accuracy`, or `agreement` (with the suspect's answers) where there are no labels.
        attack: trigger and target label, where one was given to measure with.
        notes: what a reader should know.
        task: the kind of model, its pipeline tag, and what an accuracy of it is.
        purified: dtype and sha256 of the weight files.
        environment: versions and hardware.
        cost: seconds and gradient evaluations (backward passes of one batch).
        request: what `purify` was asked for, as far as it is no matter of defaults: `budget`, `held_out`, `preset`,
            `arguments`, `templates` and `probe_images` (None for the usual ones), `test` (images); None where it was
            not `purify`.
        method: of a baseline: its `name`, what it is called and does (`title`, `does`, `chosen`), its paper, and the
            `paths` that it left with the points `taken`; None for TSC.
        evidence: of suspect (`before`) and result (`after`) without a trigger, and how far the two are apart; see
            `hf_tsc.evidence.gather`. None where it was not asked for.
    """

    suspect: dict[str, Any]
    dataset: dict[str, Any]
    spec: dict[str, Any]
    arguments: dict[str, Any]
    curves: list[dict[str, Any]]
    before: dict[str, dict[str, Any]]
    after: dict[str, dict[str, Any]]
    score_name: str
    purified: dict[str, Any]
    environment: dict[str, Any]
    cost: dict[str, Any]
    attack: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    task: dict[str, str] = field(
        default_factory=lambda: {
            "kind": "image classifier",
            "pipeline_tag": "image-classification",
            "accuracy": "clean accuracy",
        }
    )
    request: dict[str, Any] | None = None
    method: dict[str, Any] | None = None
    evidence: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def write(self, folder: Path, curves: Sequence[CurveResult]) -> None:
        """Report, plot of the curves, if there are any, and card, beside the model."""
        write_json(folder / REPORT_FILE, self.to_dict())
        if self.method is None:
            plot_curves(curves, score_name=self.score_name).savefig(folder / PLOT_FILE, dpi=120)
        self.card().save(folder / CARD_FILE)

    @property
    def images(self) -> tuple[int, int]:
        """How many were trained on, and how many held out."""
        train, held_out = self.dataset.get("images") or (
            len(self.dataset["train_indices"]),
            len(self.dataset["held_out_indices"]),
        )
        return train, held_out

    @classmethod
    def from_file(cls, file: str | Path) -> PurificationReport:
        """Read a `tsc_report.json`."""
        return cls(**json.loads(Path(file).read_text(encoding="utf-8")))

    def card(self) -> ModelCard:
        """The model card; a function of the report alone. Names from outside come out as plain text."""
        template = files("hf_tsc") / "templates" / "model_card.md"
        name = f"{plain(self.suspect['name'])}-purified"
        return ModelCard.from_template(
            self._card_data(name),
            template_str=template.read_text(encoding="utf-8"),
            title=name,
            report=self,
            suspect_name=plain(self.suspect["name"]),
            dataset_name=plain(str(self.dataset["name"])),
            fingerprint=plain(str(self.dataset["fingerprint"])),
            rows=self.rows(),
            trigger_rows=trigger_rows(self.evidence["before"], self.evidence["after"]) if self.evidence else [],
            comparison_rows=comparison_rows(self.evidence) if self.evidence else [],
            settings=self._settings(),
            command=self.command(),
            paper=PAPER,
            plot=PLOT_FILE,
            report_file=REPORT_FILE,
        )

    def _card_data(self, name: str) -> ModelCardData:
        known: dict[str, Any] = {}
        if self.suspect["repo_id"]:
            known |= {"base_model": plain(self.suspect["repo_id"]), "base_model_relation": "finetune"}
        if self.suspect.get("license"):
            known["license"] = self.suspect["license"]
        if self.dataset.get("revision"):
            known["datasets"] = [plain(self.dataset["name"])]
        if results := self._eval_results():
            known |= {"model_name": name, "eval_results": results}
        paper = PAPER["id"] if self.method is None else self.method["paper"]
        return ModelCardData(
            library_name="transformers",
            pipeline_tag=self.task["pipeline_tag"],
            tags=["hf-tsc", "backdoor-purification", *([f"arxiv:{paper}"] if paper else [])],
            **known,
        )

    def _eval_results(self) -> list[EvalResult]:
        """What was measured afterwards, for the Hub's `model-index`: on the test images where there were some."""
        place = "test" if "test" in self.after else "held_out"
        tested = (self.request or {}).get("test") or self.dataset
        found = self.after.get(place, {})
        name = plain(str((tested if place == "test" else self.dataset)["name"]))
        target = self.attack["target_label"] if self.attack else None
        return [
            EvalResult(
                task_type=self.task["pipeline_tag"],
                dataset_type=name,
                dataset_name=f"{name} ({place.replace('_', '-')})",
                dataset_revision=self.dataset.get("revision") if place == "held_out" else None,
                metric_type=metric,
                metric_value=round(found[metric], 4),
                metric_name=self.task["accuracy"] if metric == "accuracy" else "attack success rate",
                metric_args={"target_label": target} if metric == "attack_success_rate" else None,
            )
            for metric in ("accuracy", "attack_success_rate")
            if metric in found
        ]

    def _settings(self) -> list[tuple[str, str]]:
        """The hyper-parameters that a reader will look for and that had an effect, by name; all of a baseline."""
        if self.method is not None:
            return [(name, str(value)) for name, value in self.arguments.items() if value is not None]
        unused = {name for name in SETTINGS if self.arguments.get(name) is None}
        unused |= {"curve2_window", "curve2_t"} if self.arguments.get("stages") == 1 else set()
        unused |= {"curve_epochs"} if self.arguments.get("curve_steps", 0) > 0 else {"curve_steps"}
        unused |= (
            {"temperature", "teacher_view", "teacher_errors"}
            if self.arguments.get("objective") == "cross_entropy"
            else set()
        )
        unused |= set() if self.arguments.get("feature_weight") else {"feature_states"}
        unused |= set() if self.arguments.get("relative_rate") else {"relative_rate"}
        unused |= set() if self.task["kind"] == "image-text dual encoder" else {"move_towers", "train_towers"}
        values = {name: self.arguments[name] for name in SETTINGS if name not in unused}
        return [(k, ", ".join(map(str, v)) if isinstance(v, list) else str(v)) for k, v in values.items()]

    def command(self) -> str | None:
        """The command that does the same again; None where it was not `purify` with a dataset that it can name.

        Values that come from outside are quoted for a shell, and reduced before to what cannot end a block of code.
        """
        if self.request is None or self.dataset.get("place") not in ("hub", "folder"):
            return None
        dataset = str(self.dataset["name"])
        options: dict[str, Any] = {"method": self.request.get("method"), "revision": self.suspect["revision"]}
        options["dataset_name"] = dataset if self.dataset["place"] == "hub" else f"./{dataset}"
        for ours, theirs in DATASET_OPTIONS.items():
            options[ours] = self.dataset.get(theirs)
        options |= {"budget": self.request["budget"], "held_out": self.request["held_out"]}
        options |= {"preset": self.request["preset"]} if self.request["preset"] != "default" else {}
        options |= self.request["arguments"]
        options |= self._options_of_the_measures() | self._options_of_the_evidence() | {"output_dir": "purified"}
        lines = [f"hf-tsc purify {_word(self.suspect['repo_id'] or './' + self.suspect['name'])}"]
        for name, value in options.items():
            if value is None:
                continue
            values = list(value) if isinstance(value, list | tuple) else [] if value is FLAG else [value]
            words = " ".join([f"--{name}", *map(_word, values)])
            if len(lines[-1]) + len(words) < COMMAND_WIDTH:
                lines[-1] += f" {words}"
            else:
                lines.append(f"    {words}")
        return " \\\n".join(lines)

    def _options_of_the_measures(self) -> dict[str, Any]:
        """Test images of the same data set; the trigger, which is read from this report if it has settings.

        One that is learnt is read from the suspect's record, which has its file beside it.
        """
        options: dict[str, Any] = {}
        request = self.request or {}
        test = request.get("test") or {}
        if test.get("name") == self.dataset["name"]:
            options["test_split"] = test["split"]
        if self.attack is not None:
            trigger, label = self.attack["trigger"], self.attack["target_label"]
            plain_one = trigger_from_dict({"name": trigger["name"]})
            if plain_one.poisoning.learnt:
                options["trigger"] = RECORD
            elif trigger == trigger_to_dict(plain_one):
                options |= {"trigger": trigger["name"], "target_label": label}
            else:
                options["trigger"] = REPORT_FILE
        return options | {"prompt_template": request.get("templates"), "probe_images": request.get("probe_images")}

    def _options_of_the_evidence(self) -> dict[str, Any]:
        """Those that differ from the usual ones."""
        asked, usual = (self.request or {}).get("evidence"), asdict(EvidenceSettings())
        if asked is None:
            return {}
        return {"evidence": FLAG, **{f"evidence_{k}": v for k, v in asked.items() if v != usual[k]}}

    def rows(self) -> list[tuple[str, int, str, str]]:
        """Table rows: measure, n, before, after."""
        labels = {
            "accuracy": self.task["accuracy"],
            "agreement": "agreement with the suspect on clean images",
            "attack_success_rate": "attack success rate",
            "robust_accuracy": "triggered images classified correctly",
            "explained_variance": "variance of the suspect's features explained",
            "view_retrieval": "second views found among all",
            "retrieval": "captions found in a batch",
            "image_to_text": "captions found for images (R@1)",
            "text_to_image": "images found for captions (R@1)",
        }
        rows = []
        for place, before in self.before.items():
            for key, label in labels.items():
                if key in before:
                    n = before["n_triggered"] if key in ("attack_success_rate", "robust_accuracy") else before["n"]
                    rows.append(
                        (
                            f"{label} ({place.replace('_', '-')})",
                            n,
                            _percent(before[key]),
                            _percent(self.after[place][key]),
                        )
                    )
        return rows


def _word(value: Any) -> str:
    """One argument in a shell's command that stands in a block of code."""
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    return shlex.quote(re.sub(r"[^ -~]|`", "_", text)[:200])


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def plain(text: str) -> str:
    """Text from outside, reduced to what cannot be markup, a link or a line of its own."""
    return re.sub(r"[^\w./ =%:-]|://|www\.", "_", text, flags=re.ASCII)[:100]


def summarise_spec(spec: PermutationSpec, error: float, control: float | None) -> dict[str, Any]:
    """Counts by kind, why axes are frozen, and what the gate measured."""
    reasons = Counter(a.reason for axes in spec.axes.values() for a in axes if isinstance(a, Frozen))
    return {
        "spaces": dict(Counter(space.kind for space in spec.spaces.values())),
        "moved_axes": sum(1 for _ in spec.moved()),
        "frozen_axes": dict(reasons),
        "unknown_ops": list(spec.unknown_ops),
        "relative_error": error,
        "negative_control": control,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, and hardware in general words."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": number_of_processes(),
        "threads": torch.get_num_threads(),
    }


def plot_curves(curves: Sequence[CurveResult], *, score_name: str = "accuracy", title: str = "") -> Figure:
    """One panel a curve: what was measured along it in percent, the loss, and the point taken."""
    figure = Figure(figsize=(4.6 * max(len(curves), 1), 4.0), layout="constrained")
    axes = figure.subplots(1, max(len(curves), 1), squeeze=False)[0]
    for axis, curve in zip(axes, curves, strict=False):
        _plot_curve(axis, curve, score_name)
    for axis in axes[1:]:
        axis.sharey(axes[0])
    if len(curves):
        axes[0].set_ylabel("percent")
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
        )
    figure.suptitle(title)
    return figure


def _plot_curve(axis: Any, curve: CurveResult, score_name: str) -> None:
    ts = [point.t for point in curve.sweep]
    axis.plot(
        ts, [100 * p.score for p in curve.sweep], "o-", color="#0072b2", ms=3, label=f"clean {score_name}, held-out"
    )
    for name, colour in zip(curve.sweep[0].monitors, ("#009e73", "#d55e00", "#cc79a7"), strict=False):
        values = [100 * p.monitors[name] for p in curve.sweep]
        axis.plot(ts, values, "s--", color=colour, ms=3, label=name.replace("_", " "))
    axis.axvline(curve.t_star, color="#555555", lw=1, ls=":")
    axis.annotate(f"t* = {curve.t_star:g}", (curve.t_star, 50), rotation=90, ha="right", va="center")
    ends = ("suspect", "un-aligned copy") if curve.stage == 1 else ("aligned suspect", "point of curve 1")
    axis.set(
        title=f"round {curve.round}, curve {curve.stage}", xlabel=f"t: {ends[0]} (0) to {ends[1]} (1)", ylim=(-3, 103)
    )
    axis.grid(alpha=0.25)
