"""PurificationReport: what was done and measured, as JSON, as curve plots and as a model card."""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from matplotlib.figure import Figure

from hf_tsc.axes import Frozen
from hf_tsc.curve_result import CurveResult
from hf_tsc.permutation import PermutationSpec

REPORT_FILE, PLOT_FILE, CARD_FILE = "tsc_report.json", "tsc_curves.png", "README.md"
PAPER = {"title": "Circumventing Backdoor Space via Weight Symmetry", "id": "2506.07467"}
PACKAGES = ("hf_tsc", "torch", "transformers", "accelerate", "datasets", "huggingface_hub", "scipy", "kornia")


@dataclass(frozen=True)
class PurificationReport:
    """Everything that is needed to judge a purification and to repeat it.

    Attributes:
        suspect: repo id and commit, or None for a local folder; architecture; sha256 of the weight files.
        dataset: what identifies it; indices of the clean subset and of its held-out part.
        spec: summary of the permutation spec and what the gate measured.
        arguments: the hyper-parameters.
        curves: one `CurveResult` (as a dict) a curve.
        before, after: measures by place: `held_out` (always), `test` (where a test set was given). Fractions.
        score_name: `accuracy`, or `agreement` (with the suspect's answers) where there are no labels.
        attack: trigger and target label, where one was given to measure with.
        notes: what a reader should know.
        task: the kind of model, its pipeline tag, and what an accuracy of it is.
        purified: dtype and sha256 of the weight files.
        environment: versions and hardware.
        cost: seconds and gradient evaluations (backward passes of one batch).
    """

    suspect: dict[str, Any]
    dataset: dict[str, Any]
    spec: dict[str, Any]
    arguments: dict[str, Any]
    curves: list[dict[str, Any]]
    before: dict[str, dict[str, Any]]
    after: dict[str, dict[str, Any]]
    score_name: str
    attack: dict[str, Any] | None
    purified: dict[str, Any]
    environment: dict[str, Any]
    cost: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    task: dict[str, str] = field(
        default_factory=lambda: {
            "kind": "image classifier",
            "pipeline_tag": "image-classification",
            "accuracy": "clean accuracy",
        }
    )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_file(cls, file: str | Path) -> PurificationReport:
        """Read a `tsc_report.json`."""
        return cls(**json.loads(Path(file).read_text(encoding="utf-8")))

    def card(self) -> ModelCard:
        """The model card; a function of the report alone."""
        template = files("hf_tsc") / "templates" / "model_card.md"
        name = f"{_plain(self.suspect['name'])}-purified"
        return ModelCard.from_template(
            self._card_data(),
            template_str=template.read_text(encoding="utf-8"),
            title=name,
            report=self,
            suspect_name=_plain(self.suspect["name"]),
            dataset_name=_plain(str(self.dataset["name"])),
            fingerprint=_plain(str(self.dataset["fingerprint"])),
            rows=self.rows(),
            paper=PAPER,
            plot=PLOT_FILE,
            report_file=REPORT_FILE,
        )

    def _card_data(self) -> ModelCardData:
        base = (
            {"base_model": self.suspect["repo_id"], "base_model_relation": "finetune"}
            if self.suspect["repo_id"]
            else {}
        )
        return ModelCardData(
            library_name="transformers",
            pipeline_tag=self.task["pipeline_tag"],
            tags=["hf-tsc", "backdoor-purification", f"arxiv:{PAPER['id']}"],
            **base,
        )

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


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _plain(text: str) -> str:
    """A name from outside, reduced to what cannot be markup."""
    return re.sub(r"[^\w./ -]", "_", text)[:100]


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
