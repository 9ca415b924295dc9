"""On a device of its own everything has to be where it is worked with; see pretend_device.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import DatasetDict
from suspects_and_digits import digit_data, digits, read_json
from tiny import TRANSFORMER

from hf_tsc.baselines.registry import BASELINES
from hf_tsc.benchmark.lines import read_lines
from hf_tsc.evaluation import Attack
from hf_tsc.hub import resolve_model
from hf_tsc.tasks.evaluate import evaluate_source
from hf_tsc.triggers import Square

HERE = Path(__file__).parent
QUICK = {"num_train_epochs": 1, "per_device_train_batch_size": 32}
PAIRWISE = {**QUICK, "augmentation": "simclr", "dataloader_drop_last": True}
RESNET = {"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"}
TEXT = {"hidden_size": 10, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 9}
VISION = {key: value for key, value in TRANSFORMER.items() if key != "num_labels"}
CLIP = {"model_type": "clip", "text_config": {**TEXT, "max_position_embeddings": 16}, "vision_config": VISION}
SQUARE = {"trigger": {"name": "square"}, "target_label": 0}
SMALL = {"image_size": 8, "suspect": QUICK}
RETUNING = {"images": 40, "poisoned": 10, "epochs": 1, "batch_size": 16}
REACTIVATION = {"images": 20, "poisoned": 10, "epochs": 1, "hidden": 8}
MODELS = {
    "resnet": {"config": RESNET, **SMALL, "adaptive": QUICK, "retuning": RETUNING, "reactivation": REACTIVATION},
    "vit": {"config": {"model_type": "vit", **TRANSFORMER}, **SMALL, "retuning": RETUNING},
    "encoder": {"kind": "encoder", "config": RESNET, **SMALL, "suspect": PAIRWISE, "bad_encoder": QUICK},
    "clip": {"kind": "dual_encoder", "config": {**CLIP, "projection_dim": 7}, **SMALL},
}
ATTACKS = {
    "square": {**SQUARE, "poison_rate": 0.1},
    "learnt": {"trigger": {"name": "input_aware"}, "target_label": 0, "poison_rate": 0.1},
    "adversarial": {"trigger": {"name": "lc"}, "target_label": 0, "poison_rate": 0.05},
    "knowing": {**SQUARE, "poison_rate": 0.1, "method": "adaptive", "settings": {"bend_steps": 1}},
    "tuned": {**SQUARE, "poison_rate": 0, "method": "bad_encoder"},
    "clean": {**SQUARE, "poison_rate": 0},
}
TSC = {"method": "tsc", "settings": {"curve_steps": 2, "per_device_train_batch_size": 16, "optim": "sgd"}}
TUNING = {"method": "fine_tuning", "settings": {"steps": 2, "learning_rate": 0.05, "batch_size": 16}}


def cells(model, attack, what, **options):
    on = {"models": [model], "attacks": [attack], "seeds": [0], "budget": 50, "points": [1], "report": [1]}
    return {"group": f"{model}-{attack}", **on, **what, **options}


def with_settings(what, **settings):
    return {**what, "settings": {**what["settings"], **settings}}


def baseline(name):
    size = {"batch_size": 16}
    settings = {"i_bau": size, "ridge": {}}.get(name, {**size, "steps": 2})
    return {"method": name, "settings": settings}


CELLS = [
    cells("resnet", "square", TSC, retune=[1], reactivate=[1]),
    cells("vit", "square", TSC, retune=[1]),
    cells("vit", "square", with_settings(TSC, objective="cross_entropy", matching="correlation")),
    cells("resnet", "square", with_settings(TUNING, objective="distillation", feature_weight=1.0, mixup_alpha=1.0)),
    *(cells("resnet", "square", baseline(name)) for name in BASELINES if name != "fine_tuning"),
    cells("vit", "square", baseline("anp")),
    *(cells("resnet", attack, TUNING) for attack in ("learnt", "adversarial", "knowing")),
    *(cells("encoder", "tuned", with_settings(TSC, objective=name)) for name in ("simclr", "distillation")),
    cells("encoder", "tuned", with_settings(TUNING, objective="distillation")),
    *(cells("clip", "square", one) for one in (TSC, TUNING)),
]  # fmt: skip
ROWS = {"suspect": [0, 160], "clean": [160, 300], "select": [0, 10], "report": [10, 30]}
PURIFIED = {"resnet": "square", "vit": "square", "encoder": "tuned", "clip": "square"}
SEARCHED = ["--evidence", "--evidence_images", "16", "--evidence_restarts", "1", "--evidence_epochs", "1"]
EVIDENCE = {"resnet": SEARCHED, "encoder": SEARCHED}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    DatasetDict(train=digits(0, 300), test=digits(300, 330)).save_to_disk(folder / "digits")
    content = {"rows": ROWS, "models": MODELS, "attacks": ATTACKS, "cells": CELLS}
    (folder / "plan.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A benchmark of every kind, and each kind of its suspects purified, on the device."""
    place = tmp_path_factory.mktemp("device")
    images = ["--dataset_name", str(data / "digits")]
    benchmark = ["benchmark", str(data / "plan.yaml"), *images, "--cache_dir", str(place / "suspects")]
    benchmark += ["--results", str(place / "lines.jsonl")]
    options = [*images, "--budget", "50", "--test_split", "test", "--trigger", "square", "--target_label", "0"]
    options += ["--curve_steps", "2", "--stages", "2", "--per_device_train_batch_size", "16"]
    commands = [[*benchmark, "--dry_run"], benchmark]
    for kind, attack in PURIFIED.items():
        suspect = place / "suspects" / "*" / f"{kind}-{attack}-*"
        commands.append(["purify", str(suspect), "--output_dir", str(place / kind), *options, *EVIDENCE.get(kind, [])])
    program = [sys.executable, str(HERE / "pretend_device.py"), json.dumps(commands)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0] * len(commands), done.stdout + done.stderr
    return place


def test_every_cell_of_a_benchmark(finished):
    lines = read_lines(finished / "lines.jsonl")
    assert len(lines) == len(CELLS)
    assert {line["environment"]["device"] for line in lines} == {"pretend"}


@pytest.mark.parametrize("kind", PURIFIED)
def test_a_purification_of_every_kind(finished, kind):
    assert read_json(finished / kind / "tsc_report.json")["environment"]["device"] == "pretend"


def test_figures_are_those_of_the_processor(finished):
    line = next(line for line in read_lines(finished / "lines.jsonl") if line["model"] == "resnet")
    (suspect,) = (finished / "suspects").glob(f"*/{line['suspect']}")
    measured = evaluate_source(
        resolve_model(str(suspect), local=True), digit_data(310, 330), attack=Attack(Square(), 0)
    )
    assert {key: line["before"]["report"][key] for key in measured} == pytest.approx(measured, abs=1e-6)


def test_the_device_refuses_to_mix():
    """Or the tests above could not fail."""
    program = "import pretend_device; print(pretend_device.refuses_to_mix())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    assert done.stdout.split() == ["True"]
