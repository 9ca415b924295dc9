"""One cell: run a method on a suspect and measure along what it leaves."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, set_seed

from hf_tsc.benchmark.images import BenchmarkImages, processor, rows_of
from hf_tsc.benchmark.methods import METHODS, Point, Task
from hf_tsc.benchmark.plan import Cell
from hf_tsc.benchmark.suspects import attack_of, load
from hf_tsc.errors import AccuracyBudgetError, PurificationError
from hf_tsc.evaluation import Evaluator
from hf_tsc.functional import call_at
from hf_tsc.images import ImagePipeline, PixelDataset, collate, pixel_dataset
from hf_tsc.objectives import Forward, ImageClassification
from hf_tsc.permutation import Params
from hf_tsc.report import environment
from hf_tsc.retuning import Retuning, retune

Measures = dict[str, Any]


def run_cell(cell: Cell, images: BenchmarkImages, cache: Path) -> dict[str, Any]:
    """Run a cell.

    Returns:
        The line of results: the cell, the suspect's measures, a list of `paths` with their measured points, the
        seconds of the method and of the whole, gradient evaluations and versions. A method that failed, by a loss that
        is not finite or for its accuracy budget, leaves `error` in place of `paths`.
    """
    started = time.monotonic()
    set_seed(cell.seed)
    suspect = load(cell.suspect, cache)
    bench = _Bench(cell, images, suspect)
    line: dict[str, Any] = {**cell.describe(), "images": images.hash, "before": bench.suspect_measures()}
    paths: list[dict[str, Any]] = []
    measuring = 0.0

    def visit(name: str, last: bool, point: Point, taken: float) -> None:
        nonlocal measuring
        start = time.monotonic()
        paths.append({"path": name, "taken": taken, "points": bench.along(point, last=last, taken=taken)})
        measuring += time.monotonic() - start

    start = time.monotonic()
    try:
        outcome = METHODS[cell.method](bench.task, cell.settings, visit)
    except (PurificationError, AccuracyBudgetError) as error:
        line["error"] = str(error)
    else:
        line |= {"paths": paths, **asdict(outcome)}
    method = time.monotonic() - start - measuring
    line["seconds"] = {"method": round(method, 1), "all": round(time.monotonic() - started, 1)}
    line["environment"] = {**environment(torch.device("cpu")), "threads": torch.get_num_threads()}
    return line


class _Bench:
    """A suspect with the images it is measured on."""

    def __init__(self, cell: Cell, images: BenchmarkImages, suspect: PreTrainedModel):
        self.cell, self.images, self.suspect = cell, images, suspect
        made = processor(cell.suspect)
        self.pipeline = ImagePipeline(made)
        rows = images.clean_rows(cell)
        train, held_out = (pixel_dataset(images.train, part, self.pipeline) for part in (rows.train, rows.held_out))
        self.task = Task(suspect, made, train, held_out, cell.seed)
        self.objective = ImageClassification(self.pipeline)
        options: dict[str, Any] = {
            "attack": attack_of(cell.suspect),
            "num_classes": suspect.config.num_labels,
        }
        self.evaluators = {
            name: Evaluator(images.test, self.pipeline, indices=rows_of(cell.rows[name]), **options)
            for name in ("select", "report")
        }

    def suspect_measures(self) -> Measures:
        return {
            "held_out": self._held_out(self.suspect),
            **{name: self._on(name, self.suspect) for name in self.evaluators},
        }

    def along(self, point: Point, *, last: bool, taken: float) -> list[Measures]:
        """The measures of a path's points; only on the last path also those that cost more."""
        wanted = sorted({*self.cell.points, taken, *(self.cell.report if last else ()), *self._retuned(last)})
        return [self._measured(t, point(t), last=last) for t in wanted]

    def _retuned(self, last: bool) -> tuple[float, ...]:
        return self.cell.retune if last else ()

    def _measured(self, t: float, params: Params, *, last: bool) -> Measures:
        forward = self._forward_at(params)
        found: Measures = {"t": t, "held_out": self._held_out(forward), "select": self._on("select", forward)}
        if last and t in self.cell.report:
            found["report"] = self._on("report", forward)
        if last and t in self.cell.retune:
            found["retuned"] = self._after_retuning(params)
        return found

    def _after_retuning(self, params: Params) -> Measures:
        model = copy.deepcopy(self.suspect)
        saved = model.state_dict()
        model.load_state_dict({name: params[name] for name in saved})
        rows = rows_of(self.cell.rows["suspect"])
        settings = Retuning(**self.cell.retuning)
        with torch.enable_grad():
            tuned = retune(
                model,
                self.images.train,
                rows,
                self.pipeline,
                attack_of(self.cell.suspect),
                settings,
                seed=self.cell.seed,
                use_cpu=True,
            )
        return {"settings": asdict(settings), **self._on("report", tuned)}

    def _forward_at(self, params: Params) -> Forward:
        return lambda **inputs: call_at(self.suspect, params, inputs)

    def _on(self, name: str, forward: Forward) -> Measures:
        return _rounded(self.evaluators[name](forward).to_dict())

    def _held_out(self, forward: Forward) -> Measures:
        return _rounded(self.objective.evaluate(forward, _batches(self.task.held_out)))


def _batches(dataset: PixelDataset) -> Iterable[Any]:
    loader: Any = DataLoader(dataset, batch_size=128, collate_fn=collate, generator=torch.Generator())
    return loader


def _rounded(measures: Measures) -> Measures:
    return {key: float(np.round(value, 6)) if isinstance(value, float) else value for key, value in measures.items()}
