"""recipes/benchmark/visibility.py: networks that learn to tell triggered images from clean ones."""

import sys
from pathlib import Path

import pytest
import yaml
from datasets import DatasetDict
from suspects_and_digits import digits

from hf_tsc.benchmark.lines import read_lines

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "benchmark"))
visibility = pytest.importorskip("visibility")

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
PLAN = {
    "rows": {"suspect": [0, 300], "clean": [300, 400], "select": [0, 20], "report": [20, 60]},
    "models": {"resnet": {"config": RESNET, "image_size": 8}},
    "attacks": {
        "badnets": {"trigger": {"name": "badnets"}, "target_label": 0, "poison_rate": 0.1},
        "wanet": {
            "trigger": {"name": "wanet", "strength": 0},
            "target_label": 0,
            "poison_rate": 0.1,
        },  # changes nothing
        "input_aware": {"trigger": {"name": "input_aware"}, "target_label": 0, "poison_rate": 0.1},
        "clean": {"trigger": {"name": "badnets"}, "target_label": 0, "poison_rate": 0},
        "knows_tsc": {
            "trigger": {"name": "badnets"},
            "target_label": 0,
            "poison_rate": 0.1,
            "method": "adaptive",
            "settings": {"bend_steps": 1},
        },
    },
}
CELLS = {"group": "all", "models": ["resnet"], "seeds": [0], "budget": 50, "method": "fine_tuning"}


@pytest.fixture
def argv(tmp_path) -> list[str]:
    DatasetDict(train=digits(0, 400), test=digits(400, 460)).save_to_disk(tmp_path / "digits")
    plan = {
        **PLAN,
        "cells": [{**CELLS, "attacks": list(PLAN["attacks"]), "settings": {"steps": 1, "learning_rate": 0.1}}],
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    options = {"dataset_name": tmp_path / "digits", "output": tmp_path / "out" / "seen.jsonl"}
    options |= {"images": 200, "held_out": 100, "batch_size": 20, "learning_rate": 0.02, "epochs": 8}
    return [
        str(tmp_path / "plan.yaml"),
        *(word for key, value in options.items() for word in (f"--{key}", str(value))),
    ]


def test_what_is_seen_and_what_is_not(argv, tmp_path):
    visibility.main(argv)
    lines = {line["attack"]: line for line in read_lines(tmp_path / "out" / "seen.jsonl")}
    assert set(lines) == {
        "badnets",
        "wanet",
    }  # neither clean twins, nor what is learnt, nor what starts from a suspect
    assert min(lines["badnets"]["clean"], lines["badnets"]["triggered"]) > 0.9
    assert lines["wanet"]["clean"] + lines["wanet"]["triggered"] == pytest.approx(1)  # each image is told as it was
    assert lines["badnets"]["probe"]["images"] == 200


def test_goes_on(argv, tmp_path):
    output = tmp_path / "out" / "seen.jsonl"
    visibility.main([*argv, "--only", "wanet"])
    (first,) = read_lines(output)
    visibility.main(argv)
    lines = read_lines(output)
    assert lines[0] == first
    assert [line["attack"] for line in lines] == ["wanet", "badnets"]
    assert output.with_suffix(".md").read_text() == visibility.table(lines)


def test_table():
    line = {"id": "a", "model": "vit", "attack": "bpp", "trigger": {"name": "bpp", "levels": 3}}
    text = visibility.table([{**line, "clean": 0.921, "triggered": 0.5}])
    assert text.splitlines()[2] == "| vit | bpp | levels 3 | 92.1 | 50.0 |"


def test_the_table_in_the_docs_is_that_of_its_lines():
    docs = Path(__file__).parents[1] / "docs/benchmark"
    assert visibility.table(read_lines(docs / "visibility.jsonl")) == (docs / "visibility.md").read_text(
        encoding="utf-8"
    )
