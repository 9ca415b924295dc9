"""Evidence in reports, cards and on the command line: purify and evaluate, with and without it."""

import json
import re
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from suspects_and_digits import classifier, digit_data, digits, processor, read_json, save
from test_report import report
from test_tasks import tokenizer
from tiny import model as tiny_model
from transformers import AutoModel, AutoModelForImageClassification, ResNetModel

from hf_tsc import PurificationReport, UsageError, purify
from hf_tsc.benchmark.lines import read_lines
from hf_tsc.cli import main
from hf_tsc.evidence.gather import find_triggers
from hf_tsc.evidence.rows import NO_VERDICT, comparison_rows, trigger_rows
from hf_tsc.evidence.settings import EvidenceSettings
from hf_tsc.images import ImagePipeline, pixel_dataset
from hf_tsc.tasks import Classification, ImageTextMatching

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
recipe = pytest.importorskip("evidence")
QUICK = EvidenceSettings(images=20, restarts=2, epochs=2, seed=4)
CONFIG = {
    "curve_steps": 3,
    "sweep_points": 3,
    "save_strategy": "no",
    "per_device_train_batch_size": 16,
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_strategy": "no",
}
CLASSES = {
    "kind": "classes",
    "images": 200,
    "pixels": 1024,
    "norms": [[3.25, None]] * 10,
    "easiest": 3,
    "norm": 3.25,
    "success": 0.985,
    "median": 40.0,
    "index": 3.456,
    "chance": 0.124,
    "flagged": 3,
}
UNSAID = {**CLASSES, "easiest": None, "norm": None, "median": None, "index": None, "chance": None, "flagged": None}
ENCODER = {"kind": "encoder", "images": 200, "norms": [4.0], "share": 0.0321, "success": 0.991, "similarity": 0.4}
EVIDENCE = {
    "settings": asdict(EvidenceSettings()),
    "before": CLASSES,
    "after": UNSAID,
    "agreement": {"n": 30, "top_1": 0.9666},
    "barrier": {"height": 1.25, "t": 0.4, "losses": [0.1, 0.1]},
    "seconds": 12.5,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random models, saved, and digits as a data set with two splits, one without labels."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    save(classifier("resnet"), folder / "resnet")
    save(ResNetModel(tiny_model("resnet").config), folder / "encoder")
    tokenizer().save_pretrained(save(tiny_model("clip"), folder / "clip"))
    DatasetDict(train=digits(0, 80), test=digits(80, 120)).save_to_disk(folder / "digits")
    digits(0, 80, labelled=False).save_to_disk(folder / "unlabelled")
    return folder


def run(folder, output, **options):
    config = {**CONFIG, **options.pop("config", {})}
    return purify(str(folder), digits(0, 80), output, config=config, budget=50, evidence=QUICK, **options)


@pytest.fixture(scope="module")
def purified(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("purified") / "out"
    return folder, run(folders / "resnet", folder)


class TestPurify:
    def test_the_report_is_of_suspect_and_result(self, purified, folders):
        """What is said of the suspect is of its weights as they were, whatever became of the copies of it."""
        folder, made = purified
        rows = np.array([*made.dataset["train_indices"], *made.dataset["held_out_indices"]])
        images = pixel_dataset(digit_data(0, 80), rows, ImagePipeline(processor()))
        for name, place in (("before", folders / "resnet"), ("after", folder)):
            model = AutoModelForImageClassification.from_pretrained(place)
            assert made.evidence[name] == find_triggers(model, Classification, images, QUICK)
        assert made.evidence["before"] != made.evidence["after"]
        assert made.evidence["settings"] == asdict(QUICK)
        assert made.evidence["agreement"]["n"] == len(made.dataset["held_out_indices"])
        assert 0 <= made.evidence["agreement"]["top_1"] <= 1
        assert len(made.evidence["barrier"]["losses"]) == len(made.evidence["aligned_barrier"]["losses"]) == 11
        assert made.evidence["barrier"]["height"] >= 0
        assert made.evidence["seconds"] > 0

    def test_round_trip(self, purified):
        folder, made = purified
        assert PurificationReport.from_file(folder / "tsc_report.json") == made
        json.loads((folder / "tsc_report.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
        assert (
            str(PurificationReport.from_file(folder / "tsc_report.json").card()) == (folder / "README.md").read_text()
        )
        assert "## Without a trigger" in (folder / "README.md").read_text()

    def test_weights_do_not_depend_on_it(self, purified, folders, tmp_path):
        _, made = purified
        quiet = purify(str(folders / "resnet"), digits(0, 80), tmp_path / "out", config=CONFIG, budget=50)
        assert quiet.purified["files"] == made.purified["files"]
        assert quiet.evidence is None
        assert "evidence" not in quiet.request

    def test_by_a_baseline(self, folders, tmp_path):
        settings = {"method": "fine_tuning", "config": {"steps": 3, "use_cpu": True}, "budget": 50, "evidence": QUICK}
        made = purify(str(folders / "resnet"), digits(0, 80), tmp_path / "out", **settings)
        assert "aligned_barrier" not in made.evidence  # nothing was permuted
        assert "units re-aligned" not in (tmp_path / "out" / "README.md").read_text()

    def test_an_encoder(self, folders, tmp_path):
        made = run(folders / "encoder", tmp_path / "out", config={"objective": "simclr"})
        assert made.evidence["before"]["kind"] == made.evidence["after"]["kind"] == "encoder"
        assert -1 <= made.evidence["agreement"]["cosine"] <= 1
        assert "top_1" not in made.evidence["agreement"]
        assert "the features of all images alike" in (tmp_path / "out" / "README.md").read_text()

    def test_a_dual_encoder(self, folders, tmp_path):
        made = run(folders / "clip", tmp_path / "out")
        rows = np.array([*made.dataset["train_indices"], *made.dataset["held_out_indices"]])
        images = pixel_dataset(digit_data(0, 80), rows, ImagePipeline(processor()))
        model = AutoModel.from_pretrained(tmp_path / "out")
        assert made.evidence["after"] == find_triggers(model, ImageTextMatching, images, QUICK)
        assert set(made.evidence["agreement"]) == {"n", "top_1", "cosine"}

    def test_several_processes_are_refused(self, folders, tmp_path, monkeypatch):
        module = import_module("hf_tsc.purify")
        monkeypatch.setattr(module, "number_of_processes", lambda: 2)
        with pytest.raises(UsageError, match="--evidence works in one process: leave it out, and search both models"):
            run(folders / "resnet", tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


class TestCard:
    def text(self, **changes) -> str:
        return " ".join(str(report(evidence={**EVIDENCE, **changes}).card()).split())

    def test_numbers(self):
        text = self.text()
        for row in (
            "| searched on 200 clean images | before | after |",
            "| smallest mask | 3.2 of 1024 pixels, class 3 | none found |",
            "| median of the classes | 40.0 pixels | cannot be said |",
            "| anomaly index | 3.46 | cannot be said |",
            "| as large an index by chance | 12 % | cannot be said |",
            "| result and suspect, on 30 held-out images | |",
            "| the suspect's answer given | 96.7 % |",
            "| loss barrier to the suspect | 1.250 at t = 0.4 |",
        ):
            assert row in text, row

    def test_words_are_careful(self):
        for text in (self.text(), self.text(before=ENCODER, after=ENCODER)):
            assert "It is evidence and no verdict" in text
            assert "a model need not be clean" in text
            assert "need not be backdoored" in text
            assert "stay unseen" in text
            assert "not that a backdoor is gone" in text
            section = text.split("## Without a trigger")[1].split("## What was not shown")[0]
            assert not re.search(r"\b(is clean|no backdoor|proves|certif|safe|removed|flagged)", section)

    def test_an_encoder(self):
        text = self.text(before=ENCODER, after={**ENCODER, "share": None, "success": None})
        assert "| smallest mask | 3.21 % of the picture | none found |" in text
        assert "| cosine between clean images | 0.400 | 0.400 |" in text
        assert "Neural Cleanse" not in text

    def test_aligned(self):
        aligned = {"height": 0.0, "t": 0.0, "losses": [0.1, 0.1]}
        assert "| loss barrier, units re-aligned | 0.000 |" in self.text(aligned_barrier=aligned)
        lost = {"height": None, "t": 0.5, "losses": [0.1, None]}
        text = self.text(aligned_barrier=lost)
        assert "| loss barrier, units re-aligned | the loss is not finite at t = 0.5 |" in text

    def test_without_evidence_nothing_is_said_of_it(self):
        text = str(report().card())
        assert "Without a trigger" not in text
        whole = str(report(evidence=EVIDENCE).card())
        start, end = whole.index("\n## Without a trigger"), whole.index("\n## What was not shown")
        assert whole[:start] + whole[end:] == text

    def test_an_old_report_can_be_read(self, tmp_path):
        old = {key: value for key, value in report().to_dict().items() if key != "evidence"}
        (tmp_path / "tsc_report.json").write_text(json.dumps(old))
        assert PurificationReport.from_file(tmp_path / "tsc_report.json") == report()

    def test_the_command_asks_for_it_again(self):
        request = {"budget": "5%", "held_out": 0.2, "preset": "default", "arguments": {}}
        dataset = {**report().dataset, "place": "folder"}
        asked = asdict(EvidenceSettings(images=20))
        command = report(request={**request, "evidence": asked}, dataset=dataset).command()
        assert command.replace(" \\\n   ", "").endswith("--evidence --evidence_images 20 --output_dir purified")


class TestRows:
    def test_one_model(self):
        assert trigger_rows(CLASSES)[0] == ("smallest mask", "3.2 of 1024 pixels, class 3")

    def test_features(self):
        found = comparison_rows({**EVIDENCE, "agreement": {"n": 3, "cosine": 0.5}})
        assert found[0] == ("cosine to the suspect's features", "0.500")


class TestRecipe:
    """recipes/evidence.py on models that look like suspects."""

    def test_searches_what_has_no_line(self, folders, tmp_path):
        for name, label in (("bad", 0), ("clean", None)):
            save(classifier("resnet"), tmp_path / "suspects" / name)
            trigger = None if label is None else {"name": "badnets"}
            record = {"trigger": trigger, "target_label": label, "seed": 7}
            (tmp_path / "suspects" / name / "suspect.json").write_text(json.dumps(record))
        options = {"cache_dir": tmp_path / "suspects", "dataset_name": folders / "unlabelled"}
        options |= {"images": 10, "restarts": 1, "epochs": 1, "output": tmp_path / "out" / "lines.jsonl"}
        argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        recipe.main([*argv, "--only", "clean"])
        (first,) = read_lines(options["output"])
        assert (first["id"], first["attack"], first["seed"]) == ("clean-10-1-1-0", "clean twin", 7)
        recipe.main(argv)
        lines = read_lines(options["output"])
        assert [line["attack"] for line in lines] == ["clean twin", "badnets"]
        assert lines[0] == first  # not searched again
        assert options["output"].with_suffix(".md").read_text() == recipe.table(lines)
        with pytest.raises(UsageError, match=r"expected folders with a suspect.json and \['other'\] in their names"):
            recipe.main([*argv, "--only", "other"])

    def test_table(self):
        nothing = {"norm": None, "index": None, "flagged": None}
        rows = [("clean twin", {"target_label": None, "index": 1.0, "flagged": None}), ("badnets", {})]
        rows += [("badnets", {"norm": 1.0, "flagged": 1}), ("wanet", nothing)]
        line = {"kind": "classes", "pixels": 50, "norm": 2.0, "index": 3.0, "flagged": 4, "target_label": 4}
        text = recipe.table({"model": "ResNet", "attack": attack, **line, **changes} for attack, changes in rows)
        assert text.splitlines()[2:] == [
            "| ResNet | badnets | 2 | 3.00 % (2.00 to 4.00) | 3.00 (3.00 to 3.00) | 2 of 2 | 1 |",
            "| ResNet | wanet | 1 | none found | none found |  | 0 |",
            "| ResNet | clean twin | 1 | 4.00 % (4.00 to 4.00) | 1.00 (1.00 to 1.00) | 0 of 1 |  |",
        ]


class TestCommands:
    OPTIONS = ("--evidence", "--evidence_images", "20", "--evidence_restarts", "2", "--evidence_epochs", "2")

    def test_purify(self, folders, tmp_path, capsys):
        quick = ["--budget", "50", "--curve_steps", "2", "--sweep_points", "3", "--use_cpu"]
        quick += ["--disable_tqdm", "true", "--logging_strategy", "no"]
        argv = ["purify", str(folders / "resnet"), "--dataset_name", str(folders / "digits"), *quick, *self.OPTIONS]
        assert main([*argv, "--output_dir", str(tmp_path / "out")]) == 0
        out = capsys.readouterr().out
        made = read_json(tmp_path / "out" / "tsc_report.json")
        assert made["evidence"]["settings"] == {"images": 20, "restarts": 2, "epochs": 2, "seed": 0}
        assert made["request"]["evidence"] == made["evidence"]["settings"]
        for name, before, after in trigger_rows(made["evidence"]["before"], made["evidence"]["after"]):
            assert re.search(rf"{re.escape(name)} +{re.escape(before)} +{re.escape(after)}", out)
        assert NO_VERDICT in out

    @pytest.mark.parametrize("data", ["digits", "unlabelled"])
    def test_evaluate(self, folders, capsys, data):
        argv = ["evaluate", str(folders / "resnet"), "--dataset_name", str(folders / data), *self.OPTIONS]
        assert main([*argv, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        model = AutoModelForImageClassification.from_pretrained(folders / "resnet")
        images = pixel_dataset(digit_data(0, 80), np.arange(80), ImagePipeline(processor()))
        settings = EvidenceSettings(images=20, restarts=2, epochs=2)
        assert found["evidence"] == find_triggers(model, Classification, images, settings)
        assert ("accuracy" in found) == (data == "digits")
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert all(
            re.search(rf"^{name} +{re.escape(text)}$", out, re.M) for name, text in trigger_rows(found["evidence"])
        )
        assert NO_VERDICT in out

    @pytest.mark.parametrize("command", ["purify", "evaluate"])
    def test_settings_without_it(self, folders, capsys, command):
        argv = [command, str(folders / "resnet"), "--dataset_name", str(folders / "digits"), "--evidence_images", "9"]
        assert main([*argv, *(["--output_dir", "unused"] if command == "purify" else [])]) == 2
        assert "go with --evidence" in capsys.readouterr().err

    def test_too_few_images(self, folders, capsys):
        argv = ["evaluate", str(folders / "resnet"), "--dataset_name", str(folders / "digits"), "--evidence"]
        assert main([*argv, "--evidence_images", "1"]) == 2
        assert "evidence: images=1, expected 2 or more" in capsys.readouterr().err
