"""The command line: what it writes and prints, and one line of error for every wrong input."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, Value
from suspects_and_digits import (
    NAMES,
    classifier,
    digit_data,
    digits,
    edit_json,
    edit_weights,
    processor,
    read_json,
    renamed,
    save,
    two_image_columns,
    weights,
)
from transformers import AutoModelForImageClassification, BertConfig, ResNetConfig

from hf_tsc import Attack, BadNets, PurificationReport, TSCTrainer, __version__, evaluate_model
from hf_tsc.cli import COMMANDS, main
from hf_tsc.images import ImagePipeline

QUICK = ["--use_cpu", "--disable_tqdm", "true", "--logging_strategy", "no"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with the random suspects `resnet` and `vit`, not to be written to."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("resnet", "vit"):
        save(classifier(family), folder / family)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of data sets, each right or wrong in its own way."""
    folder = tmp_path_factory.mktemp("data")
    rows = digits(0, 80)
    sets = {
        "digits": rows,
        "splits": DatasetDict(train=rows, test=digits(80, 120)),
        "unlabelled": digits(0, 80, labelled=False),
        "two_images": two_image_columns(rows),
        "no_images": rows.remove_columns("image"),
        "five_classes": renamed(rows.filter(lambda label: label < 5, input_columns="label"), NAMES[:5]),
        "other_names": renamed(rows, [f"digit {i}" for i in range(10)]),
        "other_order": renamed(rows, [*NAMES[1:], "0"]),
        "too_large": rows.cast_column("label", Value("int64")).map(lambda row: {"label": row["label"] + 3}),
        "empty": rows.select([]),
    }
    for name, made in sets.items():
        made.save_to_disk(folder / name)
    return folder


@pytest.fixture
def suspect(models, tmp_path) -> Path:
    """A ViT to tamper with."""
    return Path(shutil.copytree(models / "vit", tmp_path / "suspect"))


def purify_args(model, dataset, output, *options) -> list[str]:
    quick = ["--budget", "50", "--curve_steps", "2", "--sweep_points", "3", *QUICK]
    return ["purify", str(model), "--dataset_name", str(dataset), "--output_dir", str(output), *quick, *options]


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a command that must fail: exit code, one line of error, nothing written."""

    def run(argv, message, *, code=2):
        before = everything(tmp_path)
        capsys.readouterr()
        assert main(list(map(str, argv))) == code
        out, err = capsys.readouterr()
        assert err.startswith("hf-tsc: error: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert "Traceback" not in out + err
        assert re.search(message, err), err
        assert everything(tmp_path) == before

    return run


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_of_each_command(self, command, capsys):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        out, err = capsys.readouterr()
        assert f"usage: hf-tsc {command} " in out
        assert "--output_dir" in out or command in ("evaluate", "push", "spec", "benchmark")
        assert err == ""

    def test_overview(self, capsys):
        assert main(["--help"]) == 0
        out = capsys.readouterr().out
        assert all(re.search(rf"^  {command} +[A-Z]", out, re.MULTILINE) for command in COMMANDS)
        assert main([]) == 2

    def test_version(self, capsys):
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"hf_tsc {__version__}\n"


class TestPurify:
    def test_result(self, models, data, tmp_path, capsys):
        assert main(purify_args(models / "resnet", data / "splits", tmp_path / "out", "--test_split", "test")) == 0
        report = PurificationReport.from_file(tmp_path / "out" / "tsc_report.json")
        out = capsys.readouterr().out
        for label, n, before, after in report.rows():
            assert re.search(rf"{re.escape(label)} +{n} +{re.escape(before)} +{re.escape(after)}", out)
        assert f"are in {tmp_path / 'out'}" in out
        assert (report.before["held_out"]["n"], report.before["test"]["n"]) == (10, 40)
        assert report.dataset["name"] == "splits"
        # the options that were given, the others as this family has them
        assert (report.arguments["stages"], report.arguments["objective"]) == (1, "distillation")
        assert everything(tmp_path) == {"out", *(f"out/{file.name}" for file in (tmp_path / "out").iterdir())}

    def test_dashes_for_underscores(self, models, data, tmp_path):
        argv = purify_args(models / "vit", data / "digits", tmp_path / "out", "--curve1_t", "0.6", "--seed", "9")
        assert main([re.sub("_(?=.*)", "-", a) if a.startswith("--") else a for a in argv]) == 0
        report = PurificationReport.from_file(tmp_path / "out" / "tsc_report.json")
        expected = {"curve1_t": 0.6, "seed": 9, "curve_steps": 2, "sweep_points": 3, "stages": 1}
        assert expected.items() <= report.arguments.items()
        assert len(report.dataset["train_indices"]) == 40

    def test_preset(self, models, data, tmp_path):
        options = ["--preset", "paper", "--rounds", "1", "--stages", "1", "--learning_rate", "0.5"]
        assert main(purify_args(models / "resnet", data / "digits", tmp_path / "out", *options)) == 0
        arguments = PurificationReport.from_file(tmp_path / "out" / "tsc_report.json").arguments
        expected = {"rounds": 1, "stages": 1, "learning_rate": 0.5, "curve1_t": 0.4, "weight_decay": 5e-4}
        assert {**expected, "objective": "cross_entropy"}.items() <= arguments.items()

    def test_folder_by_its_bare_name(self, models, data, tmp_path, monkeypatch, refused):
        monkeypatch.chdir(models.parent)
        name = f"{models.name}/vit"
        refused(
            purify_args(name, data / "digits", tmp_path / "out"),
            rf"Could not find {name}: .* write `\./{name}` or add `--local`",
        )
        argv = ["evaluate", name, "--local", "--dataset_name", str(data / "digits")]
        assert main(argv) == 0


class TestEvaluate:
    @pytest.fixture(scope="class")
    @classmethod
    def record(cls, tmp_path_factory):
        file = tmp_path_factory.mktemp("record") / "suspect.json"
        file.write_text(json.dumps({"trigger": {"name": "badnets"}, "target_label": 4}))
        return file

    @pytest.mark.parametrize("attack", [None, Attack(BadNets(), 4)], ids=["clean", "attack"])
    def test_is_that_of_the_library(self, models, data, capsys, attack, record):
        model = AutoModelForImageClassification.from_pretrained(models / "resnet")
        expected = evaluate_model(model, digit_data(0, 80), ImagePipeline(processor()), attack=attack).to_dict()
        argv = ["evaluate", str(models / "resnet"), "--dataset_name", str(data / "digits")]
        spellings = [["--trigger", "badnets", "--target_label", "4"], ["--trigger", str(record)]] if attack else [[]]
        for options in spellings:
            assert main([*argv, *options, "--json"]) == 0
            assert json.loads(capsys.readouterr().out) == expected
            assert main([*argv, *options]) == 0
            lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
            assert lines == {k: f"{100 * v:.1f} %" if isinstance(v, float) else str(v) for k, v in expected.items()}

    def test_target_label_overrules_the_record(self, models, data, capsys, record):
        argv = ["evaluate", str(models / "vit"), "--dataset_name", str(data / "digits"), "--json"]
        main([*argv, "--trigger", str(record), "--target_label", "7"])
        other = json.loads(capsys.readouterr().out)
        main([*argv, "--trigger", "badnets", "--target_label", "7"])
        assert json.loads(capsys.readouterr().out) == other
        main([*argv, "--trigger", str(record)])
        assert json.loads(capsys.readouterr().out)["n_triggered"] != other["n_triggered"]

    @pytest.mark.parametrize(
        ("model", "dataset", "message"),
        [
            ("missing", "digits", "does not exist"),
            ("vit", "unlabelled", "accuracy needs labels"),
            ("vit", "five_classes", "The dataset has 5 classes, the model 10"),
            ("vit", "other_order", "Class 0 is '1' in the dataset and '0' in the model"),
            ("vit", "two_images", r"choose one with --image_column_name"),
        ],
    )
    def test_refused(self, models, data, refused, model, dataset, message):
        refused(["evaluate", models / model, "--dataset_name", data / dataset], message)

    def test_multi_label_refused(self, suspect, data, refused):
        edit_json(suspect / "config.json", problem_type="multi_label_classification")
        refused(["evaluate", suspect, "--dataset_name", data / "digits"], "is a multi-label classifier")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--trigger", "badnets"], "badnets needs --target_label"),
            (["--target_label", "3"], "--target_label without a trigger: name one with --trigger"),
            (
                ["--trigger", "nope", "--target_label", "3"],
                "--trigger nope: expected one of badnets, blended, square, ctrl, .*, input_aware, or a sus",
            ),
            (["--trigger", "badnets", "--target_label", "10"], "target_label=10: the model has the classes 0 to 9"),
            (
                ["--trigger", "badnets", "--target_label", "x"],
                "--target_label x: expected the number of a class, or next",
            ),
        ],
    )
    def test_attack_refused(self, models, data, refused, options, message):
        refused(["evaluate", models / "vit", "--dataset_name", data / "digits", *options], message)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "with a trigger"),
            ("[]", "with a trigger"),
            ('{"trigger": null, "target_label": null}', "with a trigger"),  # a clean twin's
            ('{"trigger": {"name": "nope"}, "target_label": 1}', "Got the trigger name 'nope'"),
            ('{"trigger": {"name": "blended", "alpha": "x"}, "target_label": 1}', "with a trigger"),
            ('{"trigger": {"name": "badnets"}, "target_label": "1"}', "with a trigger"),
            ('{"trigger": {"name": "badnets"}}', "needs --target_label"),
        ],
    )
    def test_record_refused(self, models, data, tmp_path, refused, content, message):
        file = tmp_path / "suspect.json"
        file.write_text(content)
        refused(["evaluate", models / "vit", "--dataset_name", data / "digits", "--trigger", file], message)


class TestSpec:
    @pytest.mark.parametrize("family", ["resnet", "vit"])
    def test_json(self, models, capsys, family):
        assert main(["spec", str(models / family), "--json"]) == 0
        spec = json.loads(capsys.readouterr().out)
        model = AutoModelForImageClassification.from_pretrained(models / family)
        assert spec["tensors"].keys() >= dict(model.named_parameters()).keys()
        assert spec["relative_error"] < 1e-10
        used = set()
        for name, axes in spec["tensors"].items():
            assert [axis["size"] for axis in axes] == list(model.state_dict()[name].shape)
            for axis in axes:
                spaces = set(re.findall(r"[a-z][\w.]*", axis["axis"]))
                assert spaces <= spec["spaces"].keys()
                assert bool(spaces) != bool(axis.get("frozen")), (name, axis)
                used |= spaces
        assert used == spec["spaces"].keys()
        assert all(space["taps"] for space in spec["spaces"].values())

    def test_text(self, models, capsys):
        assert main(["spec", str(models / "vit")]) == 0
        out = capsys.readouterr().out
        assert out.startswith("ViTForImageClassification: 9 spaces; all moved at once, the output changes by ")
        for part in (
            "vit.layers.residual  12  residual",
            "3 x 4  qk, one permutation a head",
            "model output: classifier.w",
        ):
            assert part in out, part

    def test_no_classifier(self, tmp_path, capsys):
        tiny.model("clip").save_pretrained(tmp_path / "clip")
        assert main(["spec", str(tmp_path / "clip")]) == 0
        assert capsys.readouterr().out.startswith("CLIPModel: ")

    def test_that_does_not_verify(self, models, monkeypatch, refused):
        monkeypatch.setattr(import_module("hf_tsc.derive.verify"), "TOLERANCE", -1)
        refused(["spec", models / "vit"], "ViTForImageClassification does not keep its function", code=1)


class TestTrainSuspect:
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("config")
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic").save_pretrained(folder)
        return folder / "config.json"

    def args(self, config, data, output, *options):
        argv = ["train-suspect", str(config), "--dataset_name", str(data), "--output_dir", str(output), *QUICK]
        return [*argv, "--image_size", "8", "--num_train_epochs", "1", *map(str, options)]

    def test_backdoored(self, config, data, tmp_path, capsys):
        options = ["--trigger", "blended", "--target_label", 2, "--poison_rate", 0.2, "--seed", 1]
        assert main(self.args(config, data / "digits", tmp_path / "out", *options)) == 0
        assert f"The suspect and its suspect.json are in {tmp_path / 'out'}" in capsys.readouterr().out
        record = read_json(tmp_path / "out" / "suspect.json")
        assert (record["trigger"]["name"], record["target_label"], record["poison_rate"]) == ("blended", 2, 0.2)
        assert len(record["poisoned_indices"]) == 16
        labels = digit_data(0, 80).labels
        assert (labels[record["poisoned_indices"]] != 2).all()
        evaluate = ["evaluate", str(tmp_path / "out"), "--dataset_name", str(data / "digits"), "--json"]
        assert main([*evaluate, "--trigger", str(tmp_path / "out" / "suspect.json")]) == 0
        assert json.loads(capsys.readouterr().out)["n_triggered"] == (labels != 2).sum()

    def test_clean_twin(self, config, data, tmp_path):
        assert main(self.args(config.parent, data / "digits", tmp_path / "out", "--poison_rate", 0)) == 0
        record = read_json(tmp_path / "out" / "suspect.json")
        assert (record["poisoned_indices"], record["trigger"], record["poison_rate"]) == ([], None, 0.0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "--trigger is missing: name one of badnets, blended, .*, input_aware, or give --poison_rate 0"),
            (["--trigger", "badnets"], "needs --target_label"),
            (["--trigger", "badnets", "--target_label", 11], "target_label=11, expected one of the labels"),
            (
                ["--trigger", "badnets", "--target_label", 1, "--poison_rate", -0.1],
                "poison_rate=-0.1, expected a share",
            ),
            (["--poison_rate", -0.1], "--trigger is missing"),
        ],
    )
    def test_refused(self, config, data, tmp_path, refused, options, message):
        refused(self.args(config, data / "digits", tmp_path / "out", *options), message)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "expected the config.json of a transformers image classifier"),
            ("{", "expected the config.json of a transformers image classifier"),
            ("[1]", "expected the config.json of a transformers image classifier"),
            ('{"hidden_size": 8}', "with its model_type"),
            ('{"model_type": "nope"}', "with its model_type"),
            ('{"model_type": "resnet", "layer_type": "nope"}', "layer_type=nope is not one of"),
            (
                '{"model_type": "vit", "hidden_act": "nope", "image_size": 8, "patch_size": 4}',
                "can be made from the ViT",
            ),
            ('{"model_type": "bert"}', "can be made from the BertConfig"),
        ],
    )
    def test_configuration_refused(self, data, tmp_path, refused, content, message):
        file = tmp_path / "config.json"
        if content is not None:
            file.write_text(content)
        refused(self.args(file, data / "digits", tmp_path / "out", "--poison_rate", 0), message)

    def test_no_output_folder(self, config, data, refused):
        argv = ["train-suspect", config, "--dataset_name", data / "digits", "--poison_rate", "0"]
        refused(argv, "--output_dir is missing")

    def test_image_size_of_two_numbers(self, data, tmp_path):
        content = {"model_type": "vit", **tiny.TRANSFORMER, "image_size": [8, 4]}
        (tmp_path / "config.json").write_text(json.dumps(content))
        argv = self.args(tmp_path, data / "digits", tmp_path / "out", "--poison_rate", 0)
        assert main(argv) == 0
        size = read_json(tmp_path / "out" / "preprocessor_config.json")["size"]
        assert size == {"height": 8, "width": 4}


class TestWrongInput:
    """Of `purify`: nothing is written, not even a folder for checkpoints."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--curve1_t", "0"], r"curve1_t=0\.0: t must lie strictly between 0 and 1"),
            (["--curve2_t", "1"], r"curve2_t=1\.0: t must lie strictly between 0 and 1"),
            (["--curve_steps", "-1", "--curve_epochs", "0"], "no optimisation step"),
            (["--curve_steps", "0"], "no optimisation step"),
            (["--rounds", "0"], "no optimisation step"),
            (["--budget", "0"], "budget=0, expected a positive number"),
            (["--budget", "0%"], "budget=0.0, expected a positive number"),
            (["--budget", "all"], "budget='all', expected a number of images"),
            (["--budget", "9"], r"leaves 7 to train on, expected at least 10, one for each class"),
            (["--budget", "81"], "expected at most the dataset's 80 images"),
            (["--held_out", "1"], "held_out=1.0, expected a share"),
            (["--held_out", "0"], "to train on and none to measure on: raise the budget, or the share"),
            (["--max_steps", "5"], "max_steps=5, .*: how long a curve is trained, curve_steps and curve_epochs say"),
            (
                ["--feature_weight", "5", "--objective", "cross_entropy"],
                "hidden states are followed in a distillation",
            ),
            (["--objective", "nope"], "argument --objective.*invalid choice"),
            (["--preset", "nope"], "argument --preset.*invalid choice"),
            (["--matching", "nope"], "argument --matching.*invalid choice"),
            (["--lr_scheduler_type", "polynomial"], "lr_scheduler_type='polynomial': expected one of"),
            (["--learning_rate", "fast"], "argument --learning_rate.*invalid float value"),
            (["--no_such_option", "1"], "--no_such_option"),
            (["--budge", "50"], "--budge"),
            (["--image_column_name", "label"], r"--image_column_name label, which is .* expected the type Image"),
            (["--label_column_name", "nope"], "--label_column_name nope, expected one of the columns"),
            (["--dataset_split", "nope"], "split='nope'"),
            (["--test_split", "nope"], "split='nope'"),
            (["--revision", "main"], "only Hub repos have revisions"),
            (["--trigger", "badnets"], "needs --target_label"),
            (["--trigger", "badnets", "--target_label", "10"], "the model has the classes 0 to 9"),
            (["--push_to_hub"], "expected one argument"),
            (["--push_to_hub", "me"], r"expected a repo id .`owner/name`."),
            (["--create_pr"], "go with --push_to_hub"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_options(self, models, data, tmp_path, refused, options, message):
        refused(purify_args(models / "vit", data / "digits", tmp_path / "out", *options), message)

    @pytest.mark.parametrize(
        ("dataset", "message"),
        [
            ("missing", "cannot be loaded"),
            ("two_images", r"columns \['image', 'thumbnail'\] are all of type Image; choose one with --image_column"),
            ("no_images", "No column is of type Image"),
            ("five_classes", "The dataset has 5 classes, the model 10"),
            ("other_names", "Class 0 is 'digit 0' in the dataset and '0' in the model"),
            ("other_order", "Class 0 is '1' in the dataset and '0' in the model"),
            ("empty", "has no rows: expected images"),
        ],
    )
    def test_dataset(self, models, data, tmp_path, refused, dataset, message):
        refused(purify_args(models / "vit", data / dataset, tmp_path / "out"), message)

    def test_without_labels(self, models, data, tmp_path, refused):
        argv = purify_args(models / "vit", data / "unlabelled", tmp_path / "out", "--objective", "cross_entropy")
        refused(argv, "no label column and the objective is cross_entropy: .*--objective distillation")

    def test_label_out_of_range(self, models, data, tmp_path, refused):
        argv = purify_args(models / "vit", data / "too_large", tmp_path / "out", "--label_column_name", "label")
        refused(argv, "The dataset has the label 12, but the model's 10 labels are 0..9")

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["purify"], "MODEL is missing: name repo ids or folders"),
            (["purify", "./x", "--dataset_name", "y"], "--output_dir is missing"),
            (["purify", "--dataset_name"], "expected one argument"),
            (["evaluate"], "the following arguments are required: MODEL"),
            (["spec"], "MODEL is missing: name a repo id or a folder, or give --list"),
            (["train-suspect"], "the following arguments are required: CONFIG"),
            (["spec", "./x", "y"], "y"),
            (["demo", "--models", "bert"], "invalid choice: 'bert'"),
            (["cleanse"], "unknown command 'cleanse': expected one of purify, push, evaluate"),
            (["evaluate", "./no/such/folder"], "The folder no/such/folder does not exist"),
            (["spec", "nobody/nothing"], "Could not find nobody/nothing: there is no such repo"),
            (["spec", "no name/"], "this is not a repo id"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_command_lines(self, refused, argv, message):
        refused(argv, message)

    def test_no_dataset(self, models, tmp_path, refused):
        refused(["purify", models / "vit", "--output_dir", tmp_path / "out"], "--dataset_name is missing")

    @pytest.mark.parametrize("dataset", ["./no/such", "nobody/nothing"])
    def test_no_such_dataset(self, models, tmp_path, refused, dataset):
        refused(purify_args(models / "vit", dataset, tmp_path / "out"), f"The dataset '{dataset}' .*cannot be loaded")

    def test_model_folder_missing(self, data, tmp_path, refused):
        refused(
            purify_args(tmp_path / "nope", data / "digits", tmp_path / "out"), "nope does not exist: give a folder"
        )

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_not_finite(self, suspect, data, tmp_path, refused, value):
        edit_weights(suspect, "classifier.bias", value)
        refused(
            purify_args(suspect, data / "digits", tmp_path / "out"), "classifier.bias` of .* holds NaN or infinity"
        )

    def test_only_a_pickle(self, suspect, data, tmp_path, refused):
        torch.save(weights(suspect), suspect / "pytorch_model.bin")
        (suspect / "model.safetensors").unlink()
        refused(purify_args(suspect, data / "digits", tmp_path / "out"), r"has no model\.safetensors .*never loaded")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"problem_type": "multi_label_classification"}, "suspect is a multi-label classifier: expected one with"),
            ({"problem_type": "regression"}, "expected a classifier with two classes or more"),
            ({"model_type": "bert"}, "expected an image classifier that transformers defines"),
            ({"model_type": "nope"}, "expected an image classifier that transformers defines"),
            ({"hidden_size": 24}, "do not fit its config.json"),
            ({"hidden_size": "wide"}, "expected int, got str"),
            ({"num_attention_heads": 5}, "do not fit its config.json"),  # 12 units in 5 heads: taken as 5 of 2
            ({"hidden_act": "nope"}, r"config\.json makes no model: KeyError: 'nope'; correct the field"),
            ({"patch_size": 0}, "makes no model: ZeroDivisionError"),
            ({"image_size": 16}, "do not fit its config.json"),
            ({"auto_map": {"AutoConfig": "x.X"}}, "which is never run"),
        ],
        ids=str,
    )
    def test_configuration(self, suspect, data, tmp_path, refused, changes, message):
        edit_json(suspect / "config.json", **changes)
        refused(purify_args(suspect, data / "digits", tmp_path / "out"), message)

    def test_one_output(self, data, tmp_path, refused):
        save(classifier("vit", num_labels=1), tmp_path / "one")
        refused(purify_args(tmp_path / "one", data / "digits", tmp_path / "out"), r"one has 1 output\(s\): expected")

    def test_no_tokenizer(self, data, tmp_path, refused):
        tiny.model("clip").save_pretrained(tmp_path / "clip")
        processor().save_pretrained(tmp_path / "clip")
        refused(purify_args(tmp_path / "clip", data / "digits", tmp_path / "out"), "clip has no tokenizer")

    def test_no_model_of_images(self, models, data, tmp_path, refused):
        shutil.copytree(models / "vit", tmp_path / "bert")
        BertConfig().save_pretrained(tmp_path / "bert")
        refused(purify_args(tmp_path / "bert", data / "digits", tmp_path / "out"), "expected an image classifier")

    @pytest.mark.parametrize("height", [4, 16])
    def test_processor_of_another_size(self, suspect, data, tmp_path, refused, height):
        edit_json(suspect / "preprocessor_config.json", size={"height": height, "width": 8})
        message = rf"makes images of \({height}, 8\), the model takes \(8, 8\): correct the `size`"
        refused(purify_args(suspect, data / "digits", tmp_path / "out"), message)

    def test_no_processor(self, suspect, data, tmp_path, refused):
        (suspect / "preprocessor_config.json").write_text("{")
        refused(purify_args(suspect, data / "digits", tmp_path / "out"), "is not JSON")

    def test_output_not_empty(self, models, data, tmp_path, refused):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
        refused(purify_args(models / "vit", data / "digits", tmp_path / "out"), "out exists and is not empty")
        refused(purify_args(models / "vit", data / "digits", tmp_path / "out" / "precious"), "is a file")

    def test_output_where_none_can_be(self, models, data, tmp_path, refused):
        (tmp_path / "file").touch()
        refused(purify_args(models / "vit", data / "digits", tmp_path / "file" / "out"), "file", code=1)

    def test_output_is_the_current_folder(self, models, data, tmp_path, monkeypatch, refused):
        monkeypatch.chdir(tmp_path)
        refused(purify_args(models / "vit", data / "digits", "."), "has no name of its own")


class TestFailure:
    def test_spec_that_does_not_verify(self, models, data, tmp_path, monkeypatch, refused):
        monkeypatch.setattr(import_module("hf_tsc.derive.verify"), "TOLERANCE", -1)
        argv = purify_args(models / "vit", data / "digits", tmp_path / "out")
        refused(argv, "the permutation spec of ViTForImageClassification does not keep its function", code=1)

    @pytest.mark.parametrize(("family", "logged"), [("resnet", False), ("vit", True)])
    def test_loss_not_finite(self, models, data, tmp_path, refused, family, logged):
        options = ["--learning_rate", "1e30", "--curve_steps", "4", "--save_steps", "1", "--warmup_steps", "0"]
        options += ["--logging_strategy", "steps", "--logging_steps", "1"] if logged else []
        argv = purify_args(models / family, data / "digits", tmp_path / "out", *options)
        refused(argv, r"not finite|the loss is (nan|inf)", code=1)

    def test_accuracy_budget(self, models, data, tmp_path, refused):
        options = ["--max_accuracy_drop", "-100"]
        argv = purify_args(models / "vit", data / "digits", tmp_path / "out", *options)
        refused(argv, r"no point of the last curve .* before, at best [\d.]+ % at t=", code=4)

    def test_interrupted(self, models, data, tmp_path, monkeypatch, capsys):
        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr("hf_tsc.many.purify", stop)
        assert main(purify_args(models / "vit", data / "digits", tmp_path / "out")) == 130
        err = capsys.readouterr().err
        assert err.startswith("hf-tsc: interrupted")
        assert err.count("\n") == 1


def test_resume(models, data, tmp_path, monkeypatch, refused):
    argv = purify_args(models / "vit", data / "digits", tmp_path / "out", "--save_steps", "1", "--stages", "2")
    with monkeypatch.context() as patch:

        def stop(trainer, *args, real=TSCTrainer.training_step, **kwargs):
            if trainer.state.global_step == 3:
                raise KeyboardInterrupt
            return real(trainer, *args, **kwargs)

        patch.setattr(TSCTrainer, "training_step", stop)
        assert main(argv) == 130
    refused(argv, r"out\.work is left from an interrupted run: go on with --resume, or remove it")
    refused([*argv, "--resume", "--seed", "5"], "from a run with other images, arguments: give the same arguments")
    assert main([*argv, "--resume"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_as_a_program(tmp_path):
    """Importing says nothing either: the error is all there is."""
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    done = subprocess.run(
        [sys.executable, "-m", "hf_tsc.cli", "evaluate", "./nope"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("hf-tsc: error: The folder nope does not exist")


def test_data_of_these_tests(data):
    """The wrong data sets are wrong in one way only."""
    assert {folder.name for folder in data.iterdir()} >= {"digits", "two_images", "other_order"}
    assert Dataset.load_from_disk(str(data / "two_images")).column_names == ["image", "label", "thumbnail"]
    assert max(Dataset.load_from_disk(str(data / "too_large"))["label"]) == 12


@pytest.mark.parametrize(
    ("command", "code", "failed"), [(["spec", "--list"], 0, False), (["spec", "./none"], 2, True)]
)
def test_processes_part_at_the_end_and_after_a_failure(command, code, failed, monkeypatch):
    """Gloo's threads must not outlive the interpreter, which would turn the exit code into that of an abort."""
    seen = []
    monkeypatch.setattr("hf_tsc.cli.leave_processes", lambda **how: seen.append(how))
    assert main(command) == code
    assert seen == [{"failed": failed}]
