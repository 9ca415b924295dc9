"""One cell: run a method on a suspect and measure along what it leaves."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, set_seed

from hf_tsc.baselines.base import Case, Point
from hf_tsc.baselines.registry import BASELINES, loss_config, settings_of
from hf_tsc.benchmark.images import BenchmarkImages, processor, rows_of
from hf_tsc.benchmark.methods import METHODS, tsc_config
from hf_tsc.benchmark.plan import TAKEN, Cell, Places
from hf_tsc.benchmark.suspects import TASKS, attack_of, load
from hf_tsc.captions import TEMPLATES
from hf_tsc.errors import AccuracyBudgetError, PurificationError
from hf_tsc.evaluation import Attack, Evaluator, Reader, read_logits
from hf_tsc.functional import call_at, model_at
from hf_tsc.hub import load_tokenizer
from hf_tsc.images import ImagePipeline, pixel_dataset
from hf_tsc.objectives import Forward, ImageClassification
from hf_tsc.permutation import Params
from hf_tsc.processes import working_device
from hf_tsc.reactivation import Reactivation, reactivate
from hf_tsc.readers import LinearProbe, ReadOnce
from hf_tsc.report import environment
from hf_tsc.retuning import Retuning, retune
from hf_tsc.suspects.dual_encoder import CAPTIONS
from hf_tsc.tasks import Classification, Options, Work
from hf_tsc.tasks.image_text import zero_shot_reader
from hf_tsc.tsc_config import TSCConfig

Measures = dict[str, Any]


def run_cell(cell: Cell, images: BenchmarkImages, cache: Path, *, use_cpu: bool = False) -> dict[str, Any]:
    """Run a cell.

    Returns:
        The line of results: the cell, what tells the suspect's weights from those of another training (`weights`), its
        measures, a list of `paths` with their measured points, the seconds of the method and of the whole, gradient
        evaluations and versions. A method that failed, by a loss that is not finite or for its accuracy budget, leaves
        `error` in place of `paths`.
    """
    started = time.monotonic()
    set_seed(cell.seed)
    bench = _Bench(cell, images, cache, use_cpu=use_cpu)
    line: dict[str, Any] = {**cell.describe(), "images": images.hash, "weights": bench.weights}
    line["before"] = bench.suspect_measures()
    paths: list[dict[str, Any]] = []
    measuring = 0.0

    def visit(name: str, last: bool, point: Point, taken: float) -> None:
        nonlocal measuring
        start = time.monotonic()
        paths.append({"path": name, "taken": taken, "points": bench.along(point, last=last, taken=taken)})
        measuring += time.monotonic() - start

    start = time.monotonic()
    try:
        outcome = METHODS[cell.method](bench.case, cell.settings, visit)
    except (PurificationError, AccuracyBudgetError) as error:
        line["error"] = str(error)
    else:
        line |= {"paths": paths, **asdict(outcome)}
    method = time.monotonic() - start - measuring
    line["seconds"] = {"method": round(method, 1), "all": round(time.monotonic() - started, 1)}
    line["environment"] = {**environment(bench.device), "threads": torch.get_num_threads()}
    return line


class _Bench:
    """A suspect, where it is worked on, with the images it is measured on."""

    def __init__(self, cell: Cell, images: BenchmarkImages, cache: Path, *, use_cpu: bool):
        self.cell, self.images, self.use_cpu = cell, images, use_cpu
        self.device = working_device(use_cpu=use_cpu)
        source, self.suspect = load(cell.suspect, cache)
        self.suspect.to(self.device)  # type: ignore[arg-type]
        self.weights = hashlib.sha256("".join(source.file_hashes.values()).encode()).hexdigest()[:10]
        made, rows = processor(cell.suspect), images.clean_rows(cell)
        self.pipeline = ImagePipeline(made)
        config = _loss_config(cell, self.suspect, use_cpu=use_cpu)
        # pairs as the suspect was trained on; prompts are what it is measured by
        captions = Options(templates=CAPTIONS)
        work = Work(source, self.suspect, images.train, rows, self.pipeline, config, captions)
        task = TASKS[cell.suspect.kind](work)
        train, held_out = task.items(rows.train), task.items(rows.held_out)
        classifier = isinstance(task, Classification)
        self.case = Case(
            self.suspect,
            made,
            train,
            held_out,
            cell.seed,
            objective=None if classifier else task.objective_of,
            objectives=task.objectives,
            use_cpu=use_cpu,
        )
        self.attack = attack_of(cell.suspect, cache)
        self.twin = load(cell.twin, cache)[1] if cell.twin is not None else None
        reading: dict[str, Any] = {"num_classes": _classes(images), "reader": ReadOnce(_reader(cell, images, work))}

        def evaluator(name: str, attack: Attack) -> Evaluator:
            return Evaluator(images.test, self.pipeline, indices=rows_of(cell.rows[name]), attack=attack, **reading)

        self.evaluators = {name: evaluator(name, self.attack) for name in ("select", "report")}
        attacks = [(other, attack_of(other, cache)) for other in cell.retune_with]
        self.others = [(other, attack, evaluator("report", attack)) for other, attack in attacks]
        self.on_held_out: Callable[[Forward], Measures]
        if classifier:
            objective = ImageClassification(self.pipeline)
            self.on_held_out = lambda forward: objective.evaluate(forward, self.case.held_out_batches())
        else:
            measured = Evaluator(images.train, self.pipeline, indices=rows.held_out, **reading)
            self.on_held_out = lambda forward: {"score": measured.clean_accuracy(forward, device=self.device)}

    def suspect_measures(self) -> Measures:
        return {
            "held_out": self._held_out(self.suspect),
            **{name: self._on(name, self.suspect) for name in self.evaluators},
        }

    def along(self, point: Point, *, last: bool, taken: float) -> list[Measures]:
        """The measures of a path's points; only on the last path also those that cost more."""
        report, retune, reactivate = (
            _points(places, taken) if last else set()
            for places in (self.cell.report, self.cell.retune, self.cell.reactivate)
        )
        measured = []
        for t in sorted({*self.cell.points, taken, *report, *retune}):
            params = point(t)
            found = self._measured(t, params)
            if t in report:
                found["report"] = self._on("report", self._forward_at(params))
            if t in retune:
                found |= self._attacked(params, reactivated=t in reactivate)
            measured.append(found)
        return measured

    def _measured(self, t: float, params: Params) -> Measures:
        forward = self._forward_at(params)
        return {"t": t, "held_out": self._held_out(forward), "select": self._on("select", forward)}

    def _attacked(self, params: Params, *, reactivated: bool) -> Measures:
        purified, settings = model_at(self.suspect, params), Retuning(**self.cell.retuning)
        tuned = self._retune(purified, self.attack, settings)
        found: Measures = {"retuned": {"settings": asdict(settings), **self._on("report", tuned)}}
        if self.others:
            found["retuned_with"] = {
                other.attack: {
                    **other.attack_content,
                    **self._by(evaluator, self._retune(purified, attack, settings)),
                }
                for other, attack, evaluator in self.others
            }
        return found | ({"reactivated": self._reactivated(purified, tuned)} if reactivated else {})

    def _retune(self, purified: PreTrainedModel, attack: Attack, settings: Retuning) -> PreTrainedModel:
        with torch.enable_grad():
            return retune(
                purified,
                self.images.train,
                rows_of(self.cell.rows["suspect"]),
                self.pipeline,
                attack,
                settings,
                seed=self.cell.seed,
                use_cpu=self.use_cpu,
            )

    def _reactivated(self, purified: PreTrainedModel, tuned: PreTrainedModel) -> Measures:
        assert self.twin is not None, "a cell that reactivates has one"
        settings = Reactivation(**self.cell.reactivation)
        with torch.enable_grad():
            measured = reactivate(
                purified,
                tuned,
                self.twin,
                self.images.train,
                rows_of(self.cell.rows["suspect"]),
                self.evaluators["report"],
                settings,
                seed=self.cell.seed,
            )
        return {"settings": asdict(settings), **_rounded(asdict(measured))}

    def _forward_at(self, params: Params) -> Forward:
        return lambda **inputs: call_at(self.suspect, params, inputs)

    def _on(self, name: str, forward: Forward) -> Measures:
        return self._by(self.evaluators[name], forward)

    def _by(self, evaluator: Evaluator, forward: Forward) -> Measures:
        return _rounded(evaluator(forward, device=self.device).to_dict())

    def _held_out(self, forward: Forward) -> Measures:
        return _rounded(self.on_held_out(forward))


def _points(places: Places, taken: float) -> set[float]:
    return {taken if place == TAKEN else float(place) for place in places}


def _rounded(measures: Measures) -> Measures:
    return {key: float(np.round(value, 6)) if isinstance(value, float) else value for key, value in measures.items()}


def _loss_config(cell: Cell, suspect: PreTrainedModel, *, use_cpu: bool) -> TSCConfig:
    """The settings of a cell, as far as they make a loss, with the defaults that its method would take."""
    objectives = TASKS[cell.suspect.kind].objectives
    options: dict[str, Any] = {"objectives": objectives, "seed": cell.seed, "use_cpu": use_cpu}
    if cell.method in BASELINES:
        return loss_config(settings_of(cell.method, cell.settings, objectives), suspect, **options)
    return tsc_config(suspect, cell.settings, output_dir="unused", **options)


def _reader(cell: Cell, images: BenchmarkImages, work: Work) -> Reader:
    """Reads classes off the networks of a cell: a probe is fitted on the rows that suspects are trained on, clean."""
    if cell.suspect.kind == "encoder":
        rows = np.random.default_rng(cell.seed).permutation(rows_of(cell.rows["suspect"]))
        drawn = rows[: cell.probe_images or work.options.probe_images]
        return LinearProbe(pixel_dataset(images.train, np.sort(drawn), work.pipeline))
    if cell.suspect.kind == "dual_encoder":
        names = images.train.class_names or []
        return zero_shot_reader(work.model, load_tokenizer(work.source), names, TEMPLATES)
    return read_logits


def _classes(images: BenchmarkImages) -> int:
    labels: Any = images.train.labels
    return int(labels.max()) + 1
