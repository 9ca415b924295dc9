"""Running a plan: what a line holds, stopping and going on, what fails and what it takes along, and the command."""

import copy
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from datasets import DatasetDict
from suspects_and_digits import NAMES, InThisProcess, digit_data, digits, processor, read_json, renamed
from tiny import TRANSFORMER
from transformers import TrainingArguments

from hf_tsc.baselines import fine_tuning
from hf_tsc.baselines.fine_tuning import FineTuning, fine_tune
from hf_tsc.benchmark import cells, estimate, runner, suspects
from hf_tsc.benchmark.estimate import estimate_seconds
from hf_tsc.benchmark.images import BenchmarkImages
from hf_tsc.benchmark.lines import open_lines, read_lines
from hf_tsc.benchmark.plan import Plan
from hf_tsc.benchmark.runner import Progress, cells_to_run, lines_of, run_plan, summary
from hf_tsc.cli import main
from hf_tsc.errors import PurificationError, UsageError
from hf_tsc.evaluation import Attack, Evaluator, evaluate_model
from hf_tsc.hub import resolve_model
from hf_tsc.images import ImagePipeline, pixel_dataset
from hf_tsc.job import DataArguments
from hf_tsc.objective_trainer import ObjectiveTrainer
from hf_tsc.reactivation import Reactivation, reactivate
from hf_tsc.readers import ReadOnce
from hf_tsc.retuning import Retuning, retune
from hf_tsc.suspects.dual_encoder import CAPTIONS
from hf_tsc.tasks.evaluate import evaluate_source
from hf_tsc.triggers import BadNets, Blended
from hf_tsc.work_folder import REQUEST_FILE

TRAIN, TEST = (0, 300), (300, 440)  # of the digits
QUICK = {"num_train_epochs": 0.5, "per_device_train_batch_size": 32}
RETUNING = {"images": 40, "poisoned": 10, "epochs": 3, "batch_size": 16, "learning_rate": 0.1}
RESNET = {"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"}
VIT = {"model_type": "vit", **TRANSFORMER, "hidden_dropout_prob": 0.1}
ATTACK = {"trigger": {"name": "badnets"}, "target_label": 0, "poison_rate": 0.1}
ON = {"models": ["resnet"], "attacks": ["badnets"], "seeds": [0], "budget": 50, "points": [0, 0.5, 1]}
TUNING = {**ON, "method": "fine_tuning", "settings": {"steps": 3, "learning_rate": 0.1, "batch_size": 16}}
TSC_SETTINGS = {"curve_steps": 2, "stages": 2, "curve1_t": 0.5, "per_device_train_batch_size": 16}
TSC = {**ON, "method": "tsc", "settings": TSC_SETTINGS}
CONTENT = {
    "rows": {"suspect": [0, 160], "clean": [160, 300], "select": [0, 60], "report": [60, 140]},
    "models": {
        "resnet": {"config": RESNET, "image_size": 8, "suspect": QUICK, "retuning": RETUNING},
        "vit": {"config": VIT, "image_size": 8, "suspect": QUICK, "retuning": RETUNING},
    },
    "attacks": {
        "badnets": ATTACK,
        "clean": {**ATTACK, "poison_rate": 0},
        "greedy": {**ATTACK, "poison_rate": 0.99},  # more than there are images of other classes
    },
    "cells": [
        {**TSC, "group": "curves", "report": ["taken"], "retune": [0.5]},
        {**TUNING, "group": "rates", "grid": {"learning_rate": [0.1, 0.05]}, "report": [0.5], "retune": [0, "taken"]},
        {**TSC, "group": "wild", "settings": {**TSC_SETTINGS, "learning_rate": 1e30}},
    ],
}


def content_of(*groups, rows=()):
    return {**copy.deepcopy(CONTENT), "rows": {**CONTENT["rows"], **dict(rows)}, "cells": list(groups)}


def plan_of(*groups, rows=()) -> Plan:
    return Plan.from_dict(content_of(*groups, rows=rows))


def written(file: Path, content: object) -> Path:
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


@pytest.fixture(scope="module", autouse=True)
def nothing_to_collect():
    """Every training collects garbage; most of its time here would go into looking at what was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "ProcessPoolExecutor", InThisProcess)
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    DatasetDict(train=digits(*TRAIN), test=digits(*TEST)).save_to_disk(folder)
    return folder


def opened(folder: Path, **options) -> BenchmarkImages:
    return BenchmarkImages(DataArguments(dataset_name=str(folder)), **options)


@pytest.fixture(scope="module")
def images(dataset):
    return opened(dataset)


@dataclass
class Finished:
    """A plan that was run: its results, the suspects and what was said."""

    plan: Plan
    results: Path
    cache: Path
    said: list[str]
    progress: Progress

    @property
    def lines(self):
        return read_lines(self.results)

    @property
    def suspect(self) -> Path:
        (folder,) = (folder for folder in self.cache.glob("*/*") if folder.name == self.plan.suspects[0].id)
        return folder

    def copy_lines(self, file: Path, *, without=()) -> Path:
        with open_lines(file) as copied:
            for line in self.lines:
                if line["id"] not in without:
                    copied.add(line)
        return file


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("finished"), []
    plan, results, cache = Plan.from_dict(CONTENT), folder / "results.jsonl", folder / "suspects"
    progress = run_plan(plan, images, results=results, cache=cache, say=said.append)
    return Finished(plan, results, cache, said, progress)


def run(plan, images, results, cache, **options):
    """Progress, and what was said."""
    said = []
    return run_plan(plan, images, results=results, cache=cache, say=said.append, **options), said


def but_seconds(line):
    return {key: value for key, value in line.items() if key != "seconds"}


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


class TestLines:
    def test_every_cell_has_one(self, finished):
        assert [line["id"] for line in finished.lines] == [cell.id for cell in finished.plan.cells]
        assert (finished.progress.finished, finished.progress.failed) == (4, [])
        for line, cell in zip(finished.lines, finished.plan.cells, strict=True):
            assert cell.describe().items() <= line.items()
            assert line["seconds"].keys() == {"method", "all"}
            assert line["environment"]["threads"] == 1

    def test_tells_one_training_of_a_suspect_from_another(self, finished):
        content = (finished.suspect / "model.safetensors").read_bytes()
        digest = hashlib.sha256(hashlib.sha256(content).hexdigest().encode()).hexdigest()
        assert {line["weights"] for line in finished.lines} == {digest[:10]}

    def test_what_was_said(self, finished):
        suspect, *cells = finished.said
        assert suspect == f"suspect {finished.plan.suspects[0].id}"
        assert cells == [summary(line) for line in finished.lines]

    def test_summary(self, finished):
        """ACC/ASR on `select` in percent, before and at the point taken of the last path."""
        for line in finished.lines[:3]:
            path = line["paths"][-1]
            (point,) = (point for point in path["points"] if point["t"] == path["taken"])
            pairs = [
                f"{100 * measures['accuracy']:.1f}/{100 * measures['attack_success_rate']:.1f}"
                for measures in (line["before"]["select"], point["select"])
            ]
            assert re.match(rf"{line['id']} resnet/badnets/0 .*: {pairs[0]} -> {pairs[1]} in \d+ s$", summary(line))

    def test_paths_and_points(self, finished):
        curves, *rates, _ = finished.lines
        assert [(path["path"], path["taken"]) for path in curves["paths"]] == [
            ("round 1, curve 1", 0.5),
            ("round 1, curve 2", 0.4),
        ]
        assert curves["gradient_evaluations"] == 4
        plain = {"t", "held_out", "select"}
        expected = [
            {0.0: plain, 0.5: plain, 1.0: plain},
            {0.0: plain, 0.4: plain | {"report"}, 0.5: plain | {"retuned"}, 1.0: plain},
        ]
        assert [{point["t"]: point.keys() for point in path["points"]} for path in curves["paths"]] == expected
        for line in rates:
            (path,) = line["paths"]
            assert (path["path"], path["taken"], line["gradient_evaluations"]) == ("interpolation", 1.0, 3)
            expected = {0.0: plain | {"retuned"}, 0.5: plain | {"report"}, 1.0: plain | {"retuned"}}
            assert {point["t"]: point.keys() for point in path["points"]} == expected
        assert rates[0]["paths"] != rates[1]["paths"]

    def test_the_suspect_is_measured_on_its_rows(self, finished):
        _, model = suspects.load(finished.plan.suspects[0], finished.suspect.parent)
        line = finished.lines[1]
        assert not model.training
        for name, n in (("select", 60), ("report", 80)):
            data = digit_data(*(TEST[0] + row for row in CONTENT["rows"][name]))
            found = evaluate_model(model, data, ImagePipeline(processor()), attack=Attack(BadNets(), 0)).to_dict()
            assert line["before"][name] == pytest.approx(found, abs=1e-6)
            assert found["n"] == n
        first = line["paths"][0]["points"][0]
        assert (first["t"], first["held_out"], first["select"]) == (
            0.0,
            line["before"]["held_out"],
            line["before"]["select"],
        )

    @pytest.mark.parametrize("t", [0, 1])
    def test_retuned(self, finished, images, t):
        """The ends of the line, made by hand, under the attack with the suspect's own rows, measured on `report`."""
        _, model = suspects.load(finished.plan.suspects[0], finished.suspect.parent)
        attack, pipeline, cell = Attack(BadNets(), 0), ImagePipeline(processor()), finished.plan.cells[1]
        if t == 1:
            clean = pixel_dataset(images.train, images.clean_rows(cell).train, pipeline)
            model = fine_tune(model, clean, FineTuning(**cell.settings), seed=0, use_cpu=True)
        rows = np.arange(*CONTENT["rows"]["suspect"])
        tuned = retune(model, images.train, rows, pipeline, attack, Retuning(**RETUNING), seed=0, use_cpu=True)
        data = digit_data(*(TEST[0] + row for row in CONTENT["rows"]["report"]))
        expected = evaluate_model(tuned, data, pipeline, attack=attack).to_dict()
        points = finished.lines[1]["paths"][0]["points"]
        found = dict(points[2 * t]["retuned"])
        assert found.pop("settings").items() >= RETUNING.items()
        assert found == pytest.approx(expected, abs=1e-6)
        assert points[0]["retuned"] != points[2]["retuned"]

    def test_a_method_that_diverges(self, finished):
        *_, wild = finished.lines
        assert re.search(r"not finite; lower learning_rate=1e\+30", wild["error"])
        assert wild["error"] in summary(wild)
        assert wild.keys() & {"paths", "gradient_evaluations"} == set()
        assert wild["before"] == finished.lines[0]["before"]

    def test_fine_tuning_that_diverges(self, finished, images, tmp_path):
        wild = {**TUNING, "group": "wild", "grid": {"learning_rate": [1e30]}}
        progress, _ = run(plan_of(wild), images, tmp_path / "r", finished.cache)
        assert progress.finished == 1
        assert "lower learning_rate=1e+30" in read_lines(tmp_path / "r")[0]["error"]

    def test_measuring_more_changes_nothing(self, images, tmp_path):
        """A ViT with dropout: whoever touches the global random state between curves shows."""
        group = {**TSC, "models": ["vit"], "points": [0.5]}
        more = {**group, "points": [0, 0.25, 0.5, 1], "report": [0.5], "retune": [0]}
        plan = plan_of({**group, "group": "few"}, {**more, "group": "many"})
        run(plan, images, tmp_path / "r", tmp_path / "s")
        few, many = (
            [[point for point in path["points"] if point["t"] == 0.5] for path in line["paths"]]
            for line in read_lines(tmp_path / "r")
        )
        for (one,), (other,) in zip(few, many, strict=True):
            assert one.items() <= other.items()
        assert few[0] != few[1]


class TestGoingOn:
    def test_nothing_is_left_to_do(self, finished, images, tmp_path):
        """Not even suspects are trained, and a cell that diverged is not tried again."""
        results = finished.copy_lines(tmp_path / "r")
        before = results.read_bytes()
        progress, said = run(finished.plan, images, results, tmp_path / "new")
        assert (progress.finished, progress.failed, said) == (0, [], [])
        assert results.read_bytes() == before
        assert everything(tmp_path) == {"r"}

    def test_a_missing_line_comes_out_the_same(self, finished, images, tmp_path):
        gone = [cell.id for cell in finished.plan.cells[:2]]
        results = finished.copy_lines(tmp_path / "r", without=gone)
        weights = (finished.suspect / "model.safetensors").stat().st_mtime_ns
        progress, said = run(finished.plan, images, results, finished.cache)
        assert [text.split()[0] for text in said] == gone
        assert progress.finished == 2
        again = {line["id"]: but_seconds(line) for line in read_lines(results)}
        assert again == {line["id"]: but_seconds(line) for line in finished.lines}
        assert (finished.suspect / "model.safetensors").stat().st_mtime_ns == weights

    def test_killed(self, finished, dataset, tmp_path):
        """kill -9 after the first line, and half a line more as a kill may leave it; the workers end by themselves."""
        results = tmp_path / "results.jsonl"
        argv = ["benchmark", str(written(tmp_path / "plan.yaml", CONTENT)), "--dataset_name", str(dataset)]
        argv += ["--results", str(results), "--cache_dir", str(tmp_path / "suspects")]
        with (tmp_path / "log").open("wb") as log:
            command = [sys.executable, "-m", "hf_tsc.cli", *argv]
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            try:
                deadline = time.monotonic() + 300
                while not read_lines(results):
                    assert process.poll() is None, (tmp_path / "log").read_text()
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                workers = psutil.Process(process.pid).children()
                process.kill()
                process.wait()
                assert workers
                assert psutil.wait_procs(workers, timeout=60)[1] == []
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        there = read_lines(results)
        assert [line["id"] for line in there] == [cell.id for cell in finished.plan.cells[: len(there)]]
        assert len(there) < len(finished.plan.cells)
        whole = results.read_bytes()
        with results.open("ab") as file:
            file.write(b'{"id": "cut')
        trained = (tmp_path / "suspects").glob("*/*/model.safetensors")
        times = [file.stat().st_mtime_ns for file in trained]
        assert len(times) == 1
        assert main(argv) == 0
        assert results.read_bytes().startswith(whole)
        # in other processes, with a suspect of their own: the same to the last digit
        assert [but_seconds(line) for line in read_lines(results)] == [but_seconds(line) for line in finished.lines]
        assert [file.stat().st_mtime_ns for file in (tmp_path / "suspects").glob("*/*/model.safetensors")] == times

    def test_interrupted(self, finished, images, tmp_path, monkeypatch):
        """Lines that are there stay, and the file can be opened again."""

        def stop(cell, *args, **options):
            if cell.group == "wild":
                raise KeyboardInterrupt
            return {**next(line for line in finished.lines if line["id"] == cell.id)}

        monkeypatch.setattr(runner, "run_cell", stop)
        with pytest.raises(KeyboardInterrupt):
            run(finished.plan, images, tmp_path / "r", finished.cache)
        assert read_lines(tmp_path / "r") == finished.lines[:3]
        with open_lines(tmp_path / "r"):
            pass

    @pytest.mark.parametrize("name", ["run_cell", "train"])
    def test_a_worker_was_killed(self, finished, images, tmp_path, monkeypatch, name):
        """Nobody knows by whom: what it worked on has not failed, and is run again."""

        def broken(*args, **options):
            raise BrokenProcessPool("a child process terminated abruptly")

        monkeypatch.setattr(runner, name, broken)
        cache = finished.cache if name == "run_cell" else tmp_path / "s"
        with pytest.raises(PurificationError, match=r"a worker process was killed, .* fewer --processes"):
            run(finished.plan, images, tmp_path / "r", cache)
        assert read_lines(tmp_path / "r") == []

    def test_killed_between_a_suspect_and_its_times(self, finished, images, tmp_path):
        cache = Path(shutil.copytree(finished.cache, tmp_path / "s"))
        (times,) = (cache / images.hash / finished.plan.suspects[0].id).glob("times.json")
        times.unlink()
        progress, _ = run(finished.plan, images, tmp_path / "r", cache, only=["rates"])
        assert progress.failed == []

    def test_a_suspect_whose_training_was_killed_goes_on(self, images, tmp_path, monkeypatch):
        (suspect,), seen = plan_of({**TUNING, "group": "g"}).suspects, []

        def step(self, *args, real=ObjectiveTrainer.training_step, **kwargs):
            seen.append(self.state.global_step)
            if seen == [0, 1, 2]:
                raise KeyboardInterrupt
            return real(self, *args, **kwargs)

        monkeypatch.setattr(ObjectiveTrainer, "training_step", step)
        with pytest.raises(KeyboardInterrupt):
            suspects.train(suspect, images, tmp_path)
        assert not suspects.is_trained(suspect, tmp_path)
        suspects.train(suspect, images, tmp_path)
        assert seen == [0, 1, 2, 2]
        assert suspects.is_trained(suspect, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [suspect.id]

    def test_checkpoints_of_another_training_are_not_gone_on_from(self, images, tmp_path):
        """Of other versions, or from another copy of the images: a benchmark begins anew."""
        (suspect,) = plan_of({**TUNING, "group": "g"}).suspects
        work = tmp_path / f"{suspect.id}.work"
        work.mkdir()
        (work / REQUEST_FILE).write_text("{}")
        (work / "checkpoint-2").mkdir()
        suspects.train(suspect, images, tmp_path)
        assert suspects.is_trained(suspect, tmp_path)
        assert not work.exists()

    def test_left_over_folders(self, finished, images, tmp_path):
        with subprocess.Popen([sys.executable, "-S", "-c", ""]) as ended:
            ended.wait()
        names = {
            "dead": f".resnet-badnets-0-0123456789.{ended.pid}.tmp",
            "own": f".resnet-badnets-0-0123456789.{os.getpid()}.tmp",
            "other": ".resnet-badnets-0-0123456789.1.tmp",
            "unknown": ".resnet-badnets-0-0123456789.me.tmp",
            "finished": f"resnet-badnets-0-0123456789.{ended.pid}.tmp",
        }
        for name in names.values():
            (tmp_path / images.hash / name / "checkpoint").mkdir(parents=True)
        run(finished.plan, images, finished.copy_lines(tmp_path / "r"), tmp_path)
        left = {path.name for path in (tmp_path / images.hash).iterdir()}
        assert left == set(names.values()) - {names["dead"]}


class TestChoice:
    def test_of_cells(self, finished):
        cells = finished.plan.cells
        first, second, *_ = finished.lines
        assert cells_to_run(finished.plan, []) == cells
        assert cells_to_run(finished.plan, [second, first]) == cells[2:]
        assert cells_to_run(finished.plan, [], ["rates"]) == cells[1:3]
        assert cells_to_run(finished.plan, [], ["rates", "learning_rate=0.05"]) == [cells[2]]
        assert cells_to_run(finished.plan, [first], ["resnet/badnets/0", "tsc"]) == [cells[3]]
        assert cells_to_run(finished.plan, [], ["rates", "tsc"]) == []

    def test_of_what_is_next(self, tmp_path):
        """A cell whose suspect is there; else a suspect that nobody trains yet."""
        waiting = plan_of({**TUNING, "group": "g", "seeds": [0, 1], "grid": {"steps": [1, 2]}}).cells
        first, _, third, last = list(waiting)
        one, other = first.suspect, last.suspect
        assert runner._next(waiting, [], tmp_path) == one
        assert runner._next(waiting, [one], tmp_path) == other
        assert runner._next(waiting, [one, other], tmp_path) is None
        assert len(waiting) == 4
        (tmp_path / other.id).mkdir()
        assert runner._next(waiting, [one], tmp_path) == other  # in the making
        (tmp_path / other.id / "suspect.json").touch()
        assert runner._next(waiting, [one], tmp_path) == third
        assert runner._next(waiting, [], tmp_path) == last
        assert waiting == [first, plan_of({**TUNING, "group": "g", "grid": {"steps": [2]}}).cells[0]]


REACTIVATION = {"images": 40, "poisoned": 20, "hidden": 16, "epochs": 2, "batch_size": 16}
WOKEN = {**TUNING, "group": "g", "points": [0], "retune": [0, "taken"], "reactivate": ["taken"]}


class TestReactivation:
    """Cells that need the clean twin beside their suspect."""

    def plan(self, **changes) -> Plan:
        content = content_of({**WOKEN, **changes})
        content["models"]["resnet"]["reactivation"] = REACTIVATION
        return Plan.from_dict(content)

    def test_a_line(self, images, tmp_path):
        """The end of the line, made by hand, against the twin that the run has trained."""
        plan = self.plan()
        (cell,) = plan.cells
        progress, said = run(plan, images, tmp_path / "r", tmp_path / "s")
        assert (progress.finished, progress.failed) == (1, [])
        assert said[:2] == [f"suspect {cell.suspect.id}", f"suspect {cell.twin.id}"]
        (line,) = read_lines(tmp_path / "r")
        points = {point["t"]: point for point in line["paths"][0]["points"]}
        assert {t for t, point in points.items() if "reactivated" in point} == {1.0}
        cache = tmp_path / "s" / images.hash
        suspect, twin = (suspects.load(one, cache)[1] for one in cell.suspects)
        pipeline, attack = ImagePipeline(processor()), Attack(BadNets(), 0)
        clean = pixel_dataset(images.train, images.clean_rows(cell).train, pipeline)
        purified = fine_tune(suspect, clean, FineTuning(**cell.settings), seed=0, use_cpu=True)
        rows = np.arange(*CONTENT["rows"]["suspect"])
        tuned = retune(purified, images.train, rows, pipeline, attack, Retuning(**RETUNING), seed=0, use_cpu=True)
        on = {"num_classes": 10, "attack": attack, "indices": np.arange(*CONTENT["rows"]["report"])}
        evaluator = Evaluator(images.test, pipeline, **on)
        expected = reactivate(
            purified, tuned, twin, images.train, rows, evaluator, Reactivation(**REACTIVATION), seed=0
        )
        found = dict(points[1.0]["reactivated"])
        assert found.pop("settings").items() >= REACTIVATION.items()
        assert found == pytest.approx(asdict(expected), abs=1e-6)

    def test_a_twin_is_retuned_with_the_triggers_of_others(self, images, tmp_path):
        """Made by hand; and its own trigger beside."""
        content = content_of({**TUNING, "group": "g", "attacks": ["clean"], "points": [], "retune": ["taken"]})
        content["attacks"]["blended"] = {**ATTACK, "trigger": {"name": "blended"}}
        content["cells"][0]["retune_with"] = ["blended"]
        (cell,) = (plan := Plan.from_dict(content)).cells
        run(plan, images, tmp_path / "r", tmp_path / "s")
        (line,) = read_lines(tmp_path / "r")
        (point,) = line["paths"][0]["points"]
        _, twin = suspects.load(cell.suspect, tmp_path / "s" / images.hash)
        pipeline, attack = ImagePipeline(processor()), Attack(Blended(), 0)
        clean = pixel_dataset(images.train, images.clean_rows(cell).train, pipeline)
        purified = fine_tune(twin, clean, FineTuning(**cell.settings), seed=0, use_cpu=True)
        rows = np.arange(*CONTENT["rows"]["suspect"])
        tuned = retune(purified, images.train, rows, pipeline, attack, Retuning(**RETUNING), seed=0, use_cpu=True)
        report = Evaluator(
            images.test, pipeline, num_classes=10, attack=attack, indices=np.arange(*CONTENT["rows"]["report"])
        )
        assert list(point["retuned_with"]) == ["blended"]
        measured = dict(point["retuned_with"]["blended"])
        assert {name: measured.pop(name) for name in ("trigger", "target_label")} == {
            "trigger": {"name": "blended"},
            "target_label": 0,
        }
        assert measured == pytest.approx(report(tuned).to_dict(), abs=1e-6)
        assert measured != {name: point["retuned"][name] for name in measured}

    def test_what_is_next(self, tmp_path):
        """The twin, too, is trained before its cell is run."""
        (cell,) = waiting = self.plan().cells
        assert runner._next(waiting, [], tmp_path) == cell.suspect
        assert runner._next(waiting, [cell.suspect], tmp_path) == cell.twin
        assert runner._next(waiting, cell.suspects, tmp_path) is None
        for suspect, wanted in ((cell.suspect, cell.twin), (cell.twin, cell)):
            (tmp_path / suspect.id).mkdir()
            (tmp_path / suspect.id / "suspect.json").touch()
            assert runner._next(waiting, [], tmp_path) == wanted

    def test_a_twin_that_fails_takes_its_cells_along(self, images, tmp_path, monkeypatch):
        plan = self.plan(grid={"learning_rate": [0.1, 0.05]})

        def broken(suspect, *args, real=runner.train, **options):
            if suspect.attack == "clean":
                raise UsageError("no")
            return real(suspect, *args, **options)

        monkeypatch.setattr(runner, "train", broken)
        progress, said = run(plan, images, tmp_path / "r", tmp_path / "s")
        assert (progress.finished, progress.failed) == (0, [cell.id for cell in plan.cells])
        assert said[-1].startswith(f"failed: suspect {plan.cells[0].twin.id}, with its 2 cells")

    def test_so_does_a_model_that_a_suspect_is_made_of(self, images, tmp_path, monkeypatch):
        content = content_of({**TUNING, "group": "g", "attacks": ["lc"]})
        content["attacks"]["lc"] = {**ATTACK, "trigger": {"name": "lc", "steps": 1}, "poison_rate": 0.05}
        plan = Plan.from_dict(content)
        tried = []

        def broken(suspect, *args, **options):
            tried.append(suspect.id)
            raise UsageError("no")

        monkeypatch.setattr(runner, "train", broken)
        progress, _ = run(plan, images, tmp_path / "r", tmp_path / "s")
        assert tried == [plan.cells[0].suspect.start.id]
        assert progress.failed == [plan.cells[0].id]


class TestDevice:
    """Suspects and cells are worked on where the command is told to."""

    @pytest.mark.parametrize("use_cpu", [False, True])
    def test_is_passed_on(self, finished, images, tmp_path, monkeypatch, use_cpu):
        told = []

        def train(suspect, images, cache, *, use_cpu, real=suspects.train):
            told.append(("train", use_cpu))
            real(suspect, images, cache, use_cpu=True)

        def run_cell(cell, *args, use_cpu):
            told.append(("cell", use_cpu))
            return next(line for line in finished.lines if line["id"] == cell.id)

        monkeypatch.setattr(runner, "train", train)
        monkeypatch.setattr(runner, "run_cell", run_cell)
        run(finished.plan, images, tmp_path / "r", tmp_path / "s", only=["learning_rate=0.05"], use_cpu=use_cpu)
        assert told == [("train", use_cpu), ("cell", use_cpu)]

    def test_options_of_all_trainings(self, finished, images, tmp_path, monkeypatch):
        """What a cell trains, the method and the re-tuning attack, it trains on the CPU if it is told to."""
        told = []

        class Watched(TrainingArguments):
            def __post_init__(self):
                told.append(self.use_cpu)
                super().__post_init__()

        monkeypatch.setattr(fine_tuning, "TrainingArguments", Watched)
        for use_cpu in (True, False):
            told.clear()
            cell = plan_of({**TUNING, "group": "g", "retune": [1], "points": [1]}).cells[0]
            cells.run_cell(cell, images, finished.suspect.parent, use_cpu=use_cpu)
            assert told == [use_cpu] * 2

    @pytest.mark.gpu
    @pytest.mark.parametrize("number", [0, 1])
    def test_on_an_accelerator(self, finished, images, number):
        """TSC and fine-tuning, measured there; the suspect measures what it does on the CPU."""
        cell, line = finished.plan.cells[number], finished.lines[number]
        found = cells.run_cell(cell, images, finished.suspect.parent)
        assert found["environment"]["device"] != "cpu"
        assert found["before"]["report"]["accuracy"] == pytest.approx(line["before"]["report"]["accuracy"], abs=0.02)
        assert [path["path"] for path in found["paths"]] == [path["path"] for path in line["paths"]]


class TestRefused:
    @pytest.fixture(autouse=True)
    def nothing_is_run(self, monkeypatch):
        for name in ("run_cell", "train"):
            monkeypatch.setattr(runner, name, lambda *args, **options: pytest.fail("nothing must be run"))

    @pytest.mark.parametrize(
        ("name", "rows", "split"),
        [
            ("suspect", {"suspect": [160, 301], "clean": [0, 160]}, 300),
            ("clean", {"clean": [250, 301]}, 300),
            ("select", {"select": [60, 141], "report": [0, 60]}, 140),
            ("report", {"report": [100, 200]}, 140),
        ],
    )
    def test_rows_beyond_the_dataset(self, images, tmp_path, name, rows, split):
        plan = plan_of({**TUNING, "group": "g"}, rows=rows)
        with pytest.raises(
            UsageError, match=rf"rows of {name} end at {rows[name][1]}, and .* has {split} in that split"
        ):
            run(plan, images, tmp_path / "r", tmp_path / "s")
        assert not (tmp_path / "s").exists()
        assert read_lines(tmp_path / "r") == []

    def test_results_on_other_images(self, finished, dataset, tmp_path):
        results = finished.copy_lines(tmp_path / "r")
        before = results.read_bytes()
        others = opened(dataset, test_split="train")
        for refused in (lambda: lines_of(others, results), lambda: run(finished.plan, others, results, tmp_path)):
            with pytest.raises(UsageError, match=rf"r has results on other images \({finished.lines[0]['id']}\)"):
                refused()
        assert results.read_bytes() == before

    def test_lines_of_something_else(self, images, tmp_path):
        (tmp_path / "r").write_text('{"id": 1}\n')
        with pytest.raises(UsageError, match="r"):
            lines_of(images, tmp_path / "r")

    def test_another_run_writes(self, finished, images, tmp_path):
        results = tmp_path / "r"
        with open_lines(results), pytest.raises(UsageError, match="r is being written by another benchmark"):
            run(finished.plan, images, results, tmp_path / "s")

    def test_processes(self, finished, images, tmp_path):
        with pytest.raises(UsageError, match="processes=0: expected 1 or more"):
            run(finished.plan, images, tmp_path / "r", tmp_path / "s", processes=0)
        assert everything(tmp_path) == set()


class TestImages:
    def test_hash(self, images, dataset, tmp_path):
        """Of the images, wherever they are; another label or another split makes others of them."""
        DatasetDict(train=digits(*TRAIN), test=digits(*TEST)).save_to_disk(tmp_path / "copy")
        assert opened(tmp_path / "copy").hash == images.hash
        names = renamed(digits(*TRAIN), [f"digit {name}" for name in NAMES])
        DatasetDict(train=names, test=digits(*TEST)).save_to_disk(tmp_path / "names")
        assert opened(tmp_path / "names").hash == images.hash
        other = digits(*TRAIN).map(lambda row, i: {"label": (row["label"] + (i == 7)) % 10}, with_indices=True)
        DatasetDict(train=other, test=digits(*TEST)).save_to_disk(tmp_path / "label")
        assert opened(tmp_path / "label").hash != images.hash
        mirrored = digits(*TEST).map(lambda row: {"image": row["image"].rotate(180)})
        DatasetDict(train=digits(*TRAIN), test=mirrored).save_to_disk(tmp_path / "pixels")
        assert opened(tmp_path / "pixels").hash != images.hash
        assert opened(dataset, test_split="train").hash != images.hash

    def test_clean_rows(self, images):
        (cell, *_, other) = plan_of({**TUNING, "group": "g", "seeds": [0, 1], "held_out": 0.4}).cells
        rows, again = images.clean_rows(cell), images.clean_rows(cell)
        assert (len(rows.train), len(rows.held_out)) == (30, 20)
        both = [*rows.train.tolist(), *rows.held_out.tolist()]
        assert len(set(both)) == 50
        assert set(both) <= set(range(*CONTENT["rows"]["clean"]))
        assert set(images.train.labels[rows.train].tolist()) == set(range(10))
        assert rows.train.tolist() == again.train.tolist() != images.clean_rows(other).train.tolist()

    def test_without_labels(self, tmp_path):
        plain = digits(0, 20, labelled=False)
        DatasetDict(train=plain, test=plain).save_to_disk(tmp_path / "d")
        with pytest.raises(UsageError, match="no label column: name one with --label_column_name"):
            _ = opened(tmp_path / "d").hash


class TestSuspects:
    def test_is_what_the_plan_says(self, finished):
        record = read_json(finished.suspect / "suspect.json")
        assert (record["target_label"], record["trigger"], record["seed"]) == (0, {"name": "badnets"}, 0)
        poisoned = record["poisoned_indices"]
        assert len(poisoned) == 16
        assert set(poisoned) <= set(range(*CONTENT["rows"]["suspect"]))
        assert read_json(finished.suspect / "preprocessor_config.json")["size"] == {"height": 8, "width": 8}
        assert read_json(finished.suspect / "config.json").items() >= RESNET.items()
        assert read_json(finished.suspect / "times.json").keys() == {"seconds", "threads"}

    def test_in_bf16_without_an_accelerator(self, images, tmp_path):
        content = content_of({**TUNING, "group": "g"})
        content["models"]["resnet"]["suspect"]["bf16"] = True
        (cell,) = Plan.from_dict(content).cells
        suspects.train(cell.suspect, images, tmp_path)
        assert suspects.is_trained(cell.suspect, tmp_path)

    def test_clean_twin(self, images, tmp_path):
        (cell,) = plan_of({**TUNING, "group": "g", "attacks": ["clean"]}).cells
        suspects.train(cell.suspect, images, tmp_path)
        assert suspects.is_trained(cell.suspect, tmp_path)
        assert read_json(tmp_path / cell.suspect.id / "suspect.json")["poisoned_indices"] == []
        attack = suspects.attack_of(cell.suspect, tmp_path)  # what it is measured with all the same
        assert (attack.trigger, attack.target_label) == (BadNets(), 0)


class TestEstimate:
    @pytest.fixture(autouse=True)
    def a_hundredth_of_a_second_an_image(self, monkeypatch):
        monkeypatch.setattr(estimate, "_seconds_per_image", lambda suspect, device: 0.01)

    def test_without_results(self, finished, images, tmp_path):
        found = estimate_seconds(finished.plan.cells, [], images, tmp_path)
        trained = 2 * 3 * 16 + 2 * (2 * 2 * 16)  # two of fine-tuning, two of two curves
        assert found == {"suspects": pytest.approx(0.01 * 0.5 * 160), "cells": pytest.approx(1.5 * 0.01 * trained)}

    def test_of_a_preset(self, finished, images):
        """200 passes of 40 images for each of six curves."""
        cells = plan_of({**ON, "method": "tsc", "group": "g", "settings": {"preset": "paper"}}).cells
        found = estimate_seconds(cells, [], images, finished.cache)
        assert found["cells"] == pytest.approx(1.5 * 0.01 * 6 * 200 * 40)

    def test_from_results(self, finished, images):
        """The median of cells of the same model and method, by images; one that diverged tells nothing."""
        _, slow, fast, wild = finished.lines
        lines = [
            {**slow, "seconds": {"all": 96.0}},
            {**fast, "seconds": {"all": 48.0}},
            {**fast, "model": "vit", "seconds": {"all": 1e6}},
            {**wild, "seconds": {"all": 1e6}},
        ]
        cells = plan_of({**TUNING, "group": "g", "grid": {"steps": [30]}}, {**TSC, "group": "h"}).cells
        found = estimate_seconds(cells, lines, images, finished.cache)
        assert found == {"suspects": 0, "cells": pytest.approx(1.5 * 480 + 1.5 * 0.01 * 64)}


class TestCommand:
    @pytest.fixture
    def command(self, dataset, tmp_path, capsys):
        """Runs `hf-tsc benchmark` on a plan: exit code, output and errors."""

        def call(content, *options, cache=tmp_path / "suspects"):
            file = tmp_path / "plan.yaml"
            if content is not None:
                written(file, content)
            argv = ["benchmark", str(file), "--dataset_name", str(dataset), "--cache_dir", str(cache)]
            capsys.readouterr()
            code = main([*argv, "--results", str(tmp_path / "r"), *options])
            out, err = capsys.readouterr()
            return code, out, err

        return call

    @pytest.fixture
    def refused(self, command, tmp_path):
        """One line of error, and nothing written."""

        def call(content, message, *options):
            code, out, err = command(content, *options)
            assert (code, out) == (2, "")
            assert err.startswith("hf-tsc: error: ")
            assert err.count("\n") == 1
            assert re.search(message, err), err
            assert everything(tmp_path) <= {"plan.yaml"}

        return call

    def test_dry_run(self, command, finished, tmp_path):
        code, out, err = command(CONTENT, "--dry_run")
        *cells, last = out.splitlines()
        assert (code, err) == (0, "")
        assert cells == [str(cell) for cell in finished.plan.cells]
        assert re.fullmatch(
            r"4 of 4 cells to run: about \d+ minutes on 1 process\(es\), \d+ of them for suspects", last
        )
        assert everything(tmp_path) == {"plan.yaml"}

    def test_dry_run_of_what_is_left(self, command, finished, tmp_path):
        finished.copy_lines(tmp_path / "r", without=[cell.id for cell in finished.plan.cells[1:]])
        _, out, _ = command(CONTENT, "--dry_run", "--only", "fine_tuning", "learning_rate=0.05")
        assert out.splitlines()[0] == str(finished.plan.cells[2])
        assert "\n1 of 4 cells to run" in out
        assert everything(tmp_path) == {"plan.yaml", "r"}

    def test_words_of_no_cell(self, refused):
        refused(CONTENT, "--only rates nonsense: no cell of the plan has these words", "--only", "rates", "nonsense")

    def test_run(self, command, finished, tmp_path):
        options = ["--only", "rates", "learning_rate=0.05"]
        code, out, err = command(CONTENT, *options, cache=finished.cache)
        (line,) = read_lines(tmp_path / "r")
        assert (code, err) == (0, "")
        assert out.splitlines() == [summary(line), f"1 cells finished, in {tmp_path / 'r'}"]
        assert but_seconds(line) == but_seconds(finished.lines[2])
        assert command(CONTENT, *options, cache=finished.cache) == (0, f"0 cells finished, in {tmp_path / 'r'}\n", "")

    def test_what_fails_takes_nothing_else_along(self, command, images, tmp_path):
        """A suspect only its own cells, a cell only itself; no line, so that the next run tries again."""
        odd = {**TUNING, "models": ["odd"], "group": "odd", "retune": [0]}
        greedy = {**TUNING, "attacks": ["greedy"], "group": "greedy", "grid": {"steps": [1, 2]}}
        content = content_of(greedy, odd, {**TUNING, "group": "fine"})
        content["models"]["odd"] = {**CONTENT["models"]["resnet"], "retuning": {"images": 40, "poisoned": 40}}
        cells = Plan.from_dict(content).cells
        for finished_now in (1, 0):
            code, out, err = command(content)
            assert code == 1
            assert err.startswith("hf-tsc: error: 3 cells failed: ")
            assert err.count("\n") == 1
            assert all(cell.id in err for cell in cells[:3])
            assert re.search(
                rf"failed: suspect {cells[0].suspect.id}, with its 2 cells: .*poison_rate=0\.99 asks for", out
            )
            assert re.search(rf"failed: {cells[2].id} odd .*re-tuning poisons 40 images", out)
            assert out.endswith(f"{finished_now} cells finished, in {tmp_path / 'r'}\n")
            assert [line["id"] for line in read_lines(tmp_path / "r")] == [cells[3].id]
        suspects_left = {path.name for path in (tmp_path / "suspects" / images.hash).iterdir()}
        assert suspects_left == {cells[2].suspect.id, cells[3].suspect.id}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, r"plan\.yaml: expected a benchmark plan in YAML"),
            ([1], r"plan\.yaml: .*; see hf_tsc/benchmark/plan\.py"),
            ({**CONTENT, "attacks": {}}, r"plan\.yaml: 'badnets' is none of the attacks"),
            (content_of({**TUNING, "group": "g", "method": "magic"}), "method 'magic': expected one of"),
            (content_of({**TUNING, "group": "g"}, {**TUNING, "group": "h"}), "the same cell twice"),
        ],
        ids=["missing", "no plan", "attack", "method", "twice"],
    )
    @pytest.mark.parametrize("options", [[], ["--dry_run"]], ids=["run", "dry run"])
    def test_wrong_plan(self, refused, content, message, options):
        refused(content, message, *options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--processes", "0"], "processes=0: expected 1 or more"),
            (["--test_split", "nope"], "Got split=nope, but"),
            (["--dataset_name", "./nope"], "'./nope' .*cannot be loaded"),
            (["--no_such_option", "1"], "--no_such_option"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_wrong_options(self, refused, options, message):
        refused(CONTENT, message, *options)

    def test_dry_run_on_no_process(self, command):
        assert command(CONTENT, "--dry_run", "--processes", "0")[0] == 2

    def test_dry_run_without_steps(self, command):
        content = content_of({**TUNING, "group": "g", "settings": {"learning_rate": 0.1}})
        assert command(content, "--dry_run")[0] == 2


def test_plan_of_these_tests():
    """It is JSON as well as YAML: no number of it is read as a text."""
    assert yaml.safe_load(yaml.safe_dump(CONTENT)) == json.loads(json.dumps(CONTENT)) == CONTENT


TEXT = {
    "hidden_size": 10,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 9,
    "max_position_embeddings": 16,
}
PAIRWISE = {**QUICK, "num_train_epochs": 1, "augmentation": "simclr", "dataloader_drop_last": True}
OTHER_MODELS = {
    "encoder": {
        "kind": "encoder",
        "config": RESNET,
        "image_size": 8,
        "suspect": PAIRWISE,
        "bad_encoder": {**QUICK, "augmentation": "crop"},
    },
    "clip": {
        "kind": "dual_encoder",
        "config": {
            "model_type": "clip",
            "text_config": TEXT,
            "vision_config": {key: v for key, v in TRANSFORMER.items() if key != "num_labels"},
            "projection_dim": 7,
        },
        "image_size": 8,
        "suspect": {**PAIRWISE, "augmentation": "none"},
    },
}
OTHER_ATTACKS = {
    "ctrl": {"trigger": {"name": "ctrl"}, "target_label": 0, "poison_rate": 0.05},
    "tuned": {"trigger": {"name": "square"}, "target_label": 0, "poison_rate": 0, "method": "bad_encoder"},
    "badnets": ATTACK,
    "clean": {**ATTACK, "poison_rate": 0},
}


class TestOtherKinds:
    """Encoders and dual encoders: probes and prompts in place of a classifier."""

    def plan(self, *groups, **changes) -> Plan:
        content = {**content_of(*groups), "models": OTHER_MODELS, "attacks": OTHER_ATTACKS}
        return Plan.from_dict({**content, **changes})

    @pytest.mark.parametrize(
        ("model", "attack", "objective"),
        [("encoder", "ctrl", "simclr"), ("encoder", "tuned", "distillation"), ("clip", "badnets", "image_text")],
    )
    def test_a_line_of_each_method(self, tmp_path, images, model, attack, objective):
        on = {"group": "g", "models": [model], "attacks": [attack], "seeds": [0], "report": [1]}
        ridge = {**ON, "method": "ridge", "settings": {"penalty": 0.5}}
        groups = [{**group, **on} for group in (TSC, TUNING, ridge)]
        for group in groups:
            group["settings"] = {**group["settings"], "objective": objective}
            if group["method"] != "ridge":
                group["settings"]["augmentation"] = "crop"
            elif objective != "distillation":
                group["settings"]["batch_size"] = 16
        plan = self.plan(*groups)
        run_plan(plan, images, results=tmp_path / "lines", cache=tmp_path / "cache", say=lambda text: None)
        lines = read_lines(tmp_path / "lines")
        assert sorted(line["method"] for line in lines) == ["fine_tuning", "ridge", "tsc"]
        for line in lines:
            assert line["arguments"]["objective"] == objective
            for place, count in (("select", 60), ("report", 80)):
                assert line["before"][place]["n"] == count
                assert 0 < line["before"][place]["accuracy"] <= 1
            points = line["paths"][-1]["points"]
            assert all(0 <= point["held_out"]["score"] <= 1 for point in points)
            assert all("attack_success_rate" in point["select"] for point in points)
        assert estimate_seconds(plan.cells, [], images, tmp_path / "cache")["suspects"] == 0

    def test_a_dual_encoder_learns_captions_and_is_measured_by_a_prompt(self, tmp_path, images):
        group = {**TUNING, "group": "g", "models": ["clip"], "attacks": ["badnets"]}
        (cell,) = self.plan(group).cells
        suspects.train(cell.suspect, images, tmp_path)
        bench = cells._Bench(cell, images, tmp_path, use_cpu=True)
        assert len(bench.case.train[0]["captions"]) == len(CAPTIONS)
        source = resolve_model(str(tmp_path / cell.suspect.id), local=True)
        first, last = (TEST[0] + row for row in CONTENT["rows"]["select"])
        expected = evaluate_source(source, digit_data(first, last), attack=Attack(BadNets(), 0))
        assert bench.suspect_measures()["select"] == pytest.approx(expected, abs=1e-6)

    def test_images_of_the_probe(self, tmp_path, images, monkeypatch):
        """As many as the model's entry says, told in the line; another number makes another cell."""
        group = {**TUNING, "group": "g", "models": ["encoder"], "attacks": ["ctrl"]}
        group["settings"] = {**group["settings"], "objective": "distillation"}
        few = {"models": {"encoder": {**OTHER_MODELS["encoder"], "probe_images": 40}}}
        (usual,), (cell,) = self.plan(group).cells, self.plan(group, **few).cells
        assert cell.id != usual.id
        assert cell.suspect.id == usual.suspect.id
        assert "probe_images" not in usual.describe()
        assert cell.describe()["probe_images"] == 40
        fitted = []
        monkeypatch.setattr(cells, "LinearProbe", lambda dataset: fitted.append(len(dataset)))
        for one in (usual, cell):
            suspects.train(one.suspect, images, tmp_path)
            cells._Bench(one, images, tmp_path, use_cpu=True)
        assert fitted == [160, 40]

    def test_a_probe_is_fitted_once_for_a_network(self):
        fitted = []

        def reader(forward, device):
            fitted.append(forward)
            return lambda inputs: inputs

        once, one, other = ReadOnce(reader), object(), object()
        for forward in (one, one, other, other, one):
            once(forward, "cpu")
        assert fitted == [one, other, one]

    def test_a_bad_encoder_starts_from_the_clean_twin(self, tmp_path, images):
        cell = {**TUNING, "group": "g", "models": ["encoder"], "attacks": ["tuned"]}
        cell["settings"] = {**cell["settings"], "objective": "distillation"}
        plan = self.plan(cell)
        run_plan(plan, images, results=tmp_path / "lines", cache=tmp_path / "cache", say=lambda text: None)
        (folder,) = (tmp_path / "cache").iterdir()
        assert sorted(path.name.split("-")[1] for path in folder.iterdir()) == ["clean", "tuned"]

    @pytest.mark.parametrize(
        ("attacks", "passes"),
        [(["ctrl"], 2), (["clean", "tuned"], 2 + 0.5 * (3 + 1 / 3)), (["tuned"], 2 + 0.5 * (3 + 1 / 3))],
    )
    def test_seconds_of_encoders(self, tmp_path, images, monkeypatch, attacks, passes):
        """An epoch with two views; half an epoch of BadEncoder, beside the clean encoder that it starts from."""
        monkeypatch.setattr(estimate, "_seconds_per_image", lambda suspect, device: 0.01)
        group = {**TUNING, "models": ["encoder"], "attacks": attacks}
        group["settings"] = {**group["settings"], "objective": "distillation"}
        views = {**group, "group": "v", "settings": {**group["settings"], "objective": "simclr"}}
        found = estimate_seconds(self.plan({**group, "group": "g"}, views).cells, [], images, tmp_path)
        assert found["suspects"] == pytest.approx(0.01 * passes * 160)
        assert found["cells"] == pytest.approx(len(attacks) * 1.5 * 0.01 * 3 * 16 * (1 + 2))

    def test_seconds_of_what_trains_nothing(self, tmp_path, images, monkeypatch):
        """As long as other cells of the method took."""
        monkeypatch.setattr(estimate, "_seconds_per_image", lambda suspect, device: 0.01)
        ridge = {**ON, "group": "r", "models": ["clip"], "method": "ridge", "settings": {"objective": "image_text"}}
        (cell,) = self.plan(ridge).cells
        line = {**cell.describe(), "seconds": {"all": 30.0}}
        assert estimate_seconds([cell], [line], images, tmp_path)["cells"] == pytest.approx(30)

    def test_a_timed_step_is_of_both_towers_and_augmented(self, monkeypatch):
        augmented, called = [], set()
        augmentation = estimate.Augmentation

        def spied(name):
            return lambda pixels, seed: augmented.append(name) or augmentation(name)(pixels, seed=seed)

        monkeypatch.setattr(estimate, "Augmentation", spied)
        plan = self.plan({**TUNING, "group": "g", "models": ["clip", "encoder"], "attacks": ["badnets"]})
        see = torch.nn.modules.module.register_module_forward_hook(
            lambda module, *_: called.add(type(module).__name__)
        )
        with see:
            for suspect in plan.suspects:
                assert estimate._seconds_per_image(suspect, torch.device("cpu")) > 0
        assert set(augmented) == {"none", "simclr"}
        assert {"CLIPTextEmbeddings", "CLIPVisionEmbeddings"} <= called

    @pytest.mark.parametrize(
        ("cell", "changes", "message"),
        [
            ({"retune": [1]}, {}, "the re-tuning attack is for classifiers"),
            ({"models": ["clip"], "attacks": ["tuned"]}, {}, "attack tuned is for encoders, and clip is none"),
            (
                {"attacks": ["tuned"]},
                {"attacks": {"tuned": OTHER_ATTACKS["tuned"]}},
                "starts from a clean model: add an attack with poison_rate 0",
            ),
            (
                {},
                {"models": {"encoder": {**OTHER_MODELS["encoder"], "kind": "nope"}}},
                "of kind 'nope': expected one of",
            ),
            (
                {},
                {"models": {"encoder": {**OTHER_MODELS["encoder"], "probe_images": 161}}},
                "probe_images 161: expected, of an encoder, at most the 160 rows",
            ),
            (
                {"models": ["clip"], "attacks": ["badnets"]},
                {"models": {"clip": {**OTHER_MODELS["clip"], "probe_images": 9}}},
                "probe_images 9: expected, of an encoder",
            ),
            (
                {"attacks": ["odd"]},
                {"attacks": {"odd": {**ATTACK, "method": "magic"}}},
                "method 'magic' of attack odd: expected poison, bad_encoder or adaptive",
            ),
        ],
    )
    def test_refused(self, cell, changes, message):
        group = {**TUNING, "group": "g", "models": ["encoder"], "attacks": ["ctrl"], **cell}
        with pytest.raises(ValueError, match=message):
            self.plan(group, **changes)
