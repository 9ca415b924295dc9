"""What a benchmark consists of: suspects, and cells, each one method with one setting on one suspect.

A plan is a YAML file:

    rows:                       # of the dataset's train and test split, [first, last + 1]
      suspect: [0, 28000]       # suspects are trained on these
      clean: [28000, 30000]     # clean images are drawn from these
      select: [0, 1000]         # of the test split: to choose settings by
      report: [1000, 5000]      # of the test split: for the figures that are reported
    models:
      resnet:
        config: {model_type: resnet, ...}       # of transformers
        image_size: 32
        suspect: {num_train_epochs: 20}         # arguments of SuspectConfig
        retuning: {learning_rate: 0.01}         # arguments of Retuning
        reactivation: {epochs: 50}              # arguments of Reactivation
        kind: classifier                        # or encoder, dual_encoder
        bad_encoder: {num_train_epochs: 5}      # of an encoder: arguments of SuspectConfig for such attacks
        adaptive: {learning_rate: 0.0002}       # of a classifier: what such attacks change of `suspect`
        probe_images: 5000                      # of an encoder: of the rows of suspect, that the probe is fitted on
        attacks: {badnets: {poison_rate: 0.05}} # what is different in an attack for this model
    attacks:
      badnets: {trigger: {name: badnets}, target_label: 0, poison_rate: 0.1}
      all: {trigger: {name: badnets}, target_label: next, poison_rate: 0.1}   # each class to the following
      clean: {trigger: {name: badnets}, target_label: 0, poison_rate: 0}      # the clean twin
      lc: {trigger: {name: lc}, target_label: 0, poison_rate: 0.05}           # hardens images against the clean twin
      tuned: {trigger: {name: square}, target_label: 0, poison_rate: 0, method: bad_encoder}  # tunes the clean twin
      knows_tsc: {trigger: {name: badnets}, target_label: 0, poison_rate: 0.1, method: adaptive,
                  settings: {bend_steps: 50}}     # tunes the suspect with the same poison; arguments of Adaptive
    cells:
      - group: rates            # a name for tables
        models: [resnet]
        attacks: [badnets]
        seeds: [0]
        budget: 1400            # clean images
        method: fine_tuning     # or tsc, or another baseline (docs/baselines.md)
        settings: {steps: 800, learning_rate: 0.1}   # of tsc also `preset` and `permutation`; a rate that is named
                                                     # is not relative, unless `relative_rate` is true
        grid: {learning_rate: [0.01, 0.1]}      # every combination, on top of the settings
        points: [0.5, 1.0]      # where the path is measured on select; 0, 0.1, ... 1 by default
        report: [0.5]           # where it is also measured on report; `taken` is the point that the method takes
        retune: [taken]         # and after the re-tuning attack
        retune_with: [blended]  # clean twins among the attacks: with the triggers of these, too, as a control
        reactivate: [0.5]       # some of retune: also under query-based reactivation, beside the clean twin

The seed of a cell makes its suspect, draws the clean images and trains.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError

from hf_tsc.benchmark.methods import METHODS, check_settings
from hf_tsc.benchmark.suspect_plan import ADAPTIVE, BAD_ENCODER, KINDS, SuspectPlan, Suspects, check_kind, digest
from hf_tsc.errors import UsageError
from hf_tsc.reactivation import Reactivation, check_side
from hf_tsc.retuning import Retuning

ROWS = ("suspect", "clean", "select", "report")
EVERY_TENTH = tuple(k / 10 for k in range(11))
OF_ATTACK = {"trigger", "target_label", "poison_rate", "method", "settings"}
OF_MODEL = {"config", "image_size", "suspect", "retuning", "reactivation", "kind", "attacks", "probe_images"}
OF_MODEL |= {BAD_ENCODER, ADAPTIVE}
TAKEN = "taken"  # in place of a point: the one that the method takes
Places = tuple[float | str, ...]


@dataclass(frozen=True)
class Cell:
    """One run of a method, and where its result is measured.

    `twin` is the clean twin of the suspect, where points are reactivated; `retune_with` are those whose
    attacks a clean twin is re-tuned with besides its own.
    """

    group: str
    suspect: SuspectPlan
    method: str
    budget: int
    held_out: float
    settings: dict[str, Any]
    points: tuple[float, ...]
    report: Places
    retune: Places
    retuning: dict[str, Any]
    rows: dict[str, tuple[int, int]]
    reactivate: Places = ()
    reactivation: dict[str, Any] = field(default_factory=dict)
    twin: SuspectPlan | None = None
    retune_with: tuple[SuspectPlan, ...] = ()
    probe_images: int | None = None

    @property
    def seed(self) -> int:
        return self.suspect.seed

    @property
    def suspects(self) -> list[SuspectPlan]:
        """The models that have to be there before it can run."""
        return [self.suspect, *([self.twin] if self.twin is not None else [])]

    @property
    def id(self) -> str:
        """Of everything that the result depends on, but the images; not of the group's name."""
        apart = ("group", "suspect", "reactivate", "reactivation", "twin", "retune_with", "probe_images")
        content = {key: value for key, value in vars(self).items() if key not in apart}
        if self.twin is not None:
            content |= {"reactivate": self.reactivate, "reactivation": self.reactivation, "twin": self.twin.id}
        if self.retune_with:
            content["retune_with"] = {other.attack: other.attack_content for other in self.retune_with}
        if self.probe_images is not None:
            content["probe_images"] = self.probe_images
        return digest({**content, "suspect": self.suspect.id})

    def describe(self) -> dict[str, Any]:
        """For the line of results."""
        plan = self.suspect
        names = {"model": plan.model, "attack": plan.attack, "seed": plan.seed, "suspect": plan.id}
        return {
            "id": self.id,
            "group": self.group,
            **names,
            **plan.attack_content,
            "poison_rate": plan.poison_rate,
            "budget": self.budget,
            "held_out": self.held_out,
            "method": self.method,
            "settings": self.settings,
            **({} if self.probe_images is None else {"probe_images": self.probe_images}),
        }

    def __str__(self) -> str:
        plan = self.suspect
        settings = " ".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.id} {self.group} {plan.model}/{plan.attack}/{plan.seed} {self.method} {settings}"


@dataclass(frozen=True)
class Plan:
    """A plan file, read and checked."""

    cells: list[Cell] = field(default_factory=list)

    @property
    def suspects(self) -> list[SuspectPlan]:
        """In the order in which cells need them."""
        return list({suspect.id: suspect for cell in self.cells for suspect in cell.suspects}.values())

    @classmethod
    def read(cls, file: Path) -> Plan:
        """Read a plan.

        Raises:
            UsageError: the file is missing, is no YAML, or says something else than a plan does.
        """
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"{file}: expected a benchmark plan in YAML ({error})") from error
        try:
            return cls.from_dict(content)
        except (UsageError, KeyError, TypeError, ValueError, AttributeError, StrictDataclassError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise UsageError(f"{file}: {what}; see hf_tsc/benchmark/plan.py for what a plan holds") from error

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Plan:
        """A plan from the content of its file; raises as `read` does, or KeyError where something is missing."""
        if not isinstance(content, Mapping):
            raise ValueError("expected rows, models, attacks and cells")
        rows = {name: _range(content["rows"][name], name) for name in ROWS}
        for one, other in (("suspect", "clean"), ("select", "report")):
            if max(rows[one][0], rows[other][0]) < min(rows[one][1], rows[other][1]):
                raise ValueError(f"rows of {one} and {other} overlap")
        for name, attack in content["attacks"].items():
            _check_keys(attack, OF_ATTACK, f"attack {name}")
        for name, architecture in content["models"].items():
            _check_keys(architecture, OF_MODEL, f"model {name}")
            own = architecture.get("attacks", {})
            _check_keys(own, set(content["attacks"]), f"attacks of model {name}")
            for changed, changes in own.items():
                _check_keys(changes, OF_ATTACK, f"attack {changed} of model {name}")
            check_kind(architecture.get("kind", KINDS[0]), f"model {name}")
            # each complains of what it does not know
            Retuning(**architecture.get("retuning", {}))
            Reactivation(**architecture.get("reactivation", {}))
        cells = [cell for entry in content["cells"] for cell in _cells(entry, content, rows)]
        seen: dict[str, Cell] = {}
        for cell in cells:
            if cell.id in seen:
                raise ValueError(f"the same cell twice: {cell}, and in group {seen[cell.id].group}")
            seen[cell.id] = cell
        return cls(cells)


def _cells(entry: Mapping[str, Any], content: Mapping[str, Any], rows: dict[str, tuple[int, int]]) -> Iterator[Cell]:
    known = {"group", "models", "attacks", "seeds", "budget", "held_out", "method", "settings", "grid", "points",
             "report", "retune", "retune_with", "reactivate"}  # fmt: skip
    _check_keys(entry, known, "a group of cells")
    if entry["method"] not in METHODS:
        raise ValueError(f"method {entry['method']!r}: expected one of {', '.join(METHODS)}")
    grid: dict[str, list[Any]] = entry.get("grid", {})
    reactivate = _places(entry.get("reactivate", ()))
    if (retune_with := entry.get("retune_with", ())) and not entry.get("retune"):
        raise ValueError(f"retune_with {retune_with}: expected points to retune")
    for model, attack, seed in itertools.product(entry["models"], entry["attacks"], entry["seeds"]):
        suspects = Suspects(content, model, int(seed), rows["suspect"])
        suspect = suspects.of(attack)
        others = tuple(suspects.of(other) for other in retune_with)
        if learnt := [other.attack for other in others if other.learns_trigger]:
            raise ValueError(f"retune_with {learnt}: a trigger that is learnt is that of one suspect, leave it out")
        twin = suspects.clean_twin(attack, "is reactivated beside") if reactivate else None
        for values in itertools.product(*grid.values()):
            cell = Cell(
                group=str(entry["group"]),
                suspect=suspect,
                method=entry["method"],
                budget=int(entry["budget"]),
                held_out=float(entry.get("held_out", 0.2)),
                settings={**entry.get("settings", {}), **dict(zip(grid, values, strict=True))},
                points=_points(entry.get("points", EVERY_TENTH)),
                report=_places(entry.get("report", ())),
                retune=_places(entry.get("retune", ())),
                retuning=dict(content["models"][model].get("retuning", {})),
                rows=rows,
                reactivate=reactivate,
                reactivation=dict(content["models"][model].get("reactivation", {})),
                twin=twin,
                retune_with=others if suspect.is_clean else (),
                probe_images=content["models"][model].get("probe_images"),
            )
            _check(cell)
            yield cell


def _check(cell: Cell) -> None:
    """What would otherwise be found out when a suspect is trained, or a method has run."""
    first, last = cell.rows["clean"]
    if not 0 < cell.budget <= last - first:
        raise ValueError(f"budget {cell.budget}: the rows of clean are {last - first} images")
    if not 0 < cell.held_out < 1:
        raise ValueError(f"held_out {cell.held_out}: expected a share between 0 and 1")
    if cell.retune and cell.suspect.kind != KINDS[0]:
        raise ValueError(f"retune {list(cell.retune)}: the re-tuning attack is for classifiers")
    first, last = cell.suspect.rows
    if cell.probe_images is not None and (cell.suspect.kind != "encoder" or not 0 < cell.probe_images <= last - first):
        raise ValueError(f"probe_images {cell.probe_images}: expected, of an encoder, at most the {last - first} rows")
    if cell.retune and Retuning(**cell.retuning).images > last - first:
        raise ValueError(f"re-tuning draws {Retuning(**cell.retuning).images} of the {last - first} rows of suspect")
    if cell.reactivate:
        _check_reactivation(cell)
    check_settings(cell.method, cell.settings)


def _check_reactivation(cell: Cell) -> None:
    if more := [place for place in cell.reactivate if place not in cell.retune]:
        raise ValueError(f"reactivate {more}: expected points of retune, as reactivation needs the re-tuned model")
    check_side(cell.suspect.image_size, cell.suspect.image_size)
    how, (first, last) = Reactivation(**cell.reactivation), cell.suspect.rows
    if how.images + how.poisoned > last - first:
        raise ValueError(f"reactivation draws {how.images + how.poisoned} of the {last - first} rows of suspect")


def _check_keys(content: Mapping[str, Any], known: set[str], what: str) -> None:
    if unknown := sorted(set(content) - known):
        raise ValueError(f"{what} has the unknown key(s) {', '.join(unknown)}")


def _range(value: Any, name: str) -> tuple[int, int]:
    first, last = (int(number) for number in value)
    if not 0 <= first < last:
        raise ValueError(f"rows of {name}, {value}: expected [first, last + 1]")
    return first, last


def _places(values: Any) -> Places:
    return tuple(place for value in values for place in ((value,) if value == TAKEN else _points([value])))


def _points(values: Any) -> tuple[float, ...]:
    points = tuple(float(value) for value in values)
    if outside := [point for point in points if not 0 <= point <= 1]:
        raise ValueError(f"points {outside}: expected numbers from 0 to 1")
    return points
