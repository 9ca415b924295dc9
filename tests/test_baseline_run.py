"""purify by a baseline: in Python and on the command line, with a report and card that speak of no curves."""

import json
import re

import pytest
import torch
from suspects_and_digits import classifier, digit_data, digits, read_json, same, save, weights
from tiny import TRANSFORMER
from transformers import AutoModelForImageClassification, ViTConfig, ViTModel

from hf_tsc import Attack, BadNets, PurificationReport, TSCConfig, UsageError, baseline_run, purify
from hf_tsc.baselines.registry import BASELINES
from hf_tsc.cli import main
from hf_tsc.folders import CARD_FILE, PLOT_FILE, REPORT_FILE
from hf_tsc.hub import PushOptions, push_folder

CLEAN = digits(0, 60)
TOKEN = "hf_baselines"
QUICK = {"steps": 2, "batch_size": 16, "seed": 3, "use_cpu": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random suspects, not to be written to, and a folder of digits."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("resnet", "vit"):
        save(classifier(family), folder / family)
    torch.manual_seed(0)
    save(ViTModel(ViTConfig(**TRANSFORMER)), folder / "encoder")
    CLEAN.save_to_disk(folder / "digits")
    return folder


def run(model, output, method, **options):
    config = {**QUICK, **options.pop("config", {})}
    return purify(str(model), CLEAN, output, **{"method": method, "config": config, "budget": 50, **options})


@pytest.fixture(scope="module")
def purified(models, tmp_path_factory):
    """A ResNet by a method with a path, measured with a trigger: folder and report."""
    folder = tmp_path_factory.mktemp("purified") / "resnet"
    options = {"test": digit_data(60, 90), "attack": Attack(BadNets(), target_label=0)}
    return folder, run(models / "resnet", folder, "mcr", config={"t": 0.4, "learning_rate": 0.5}, **options)


class TestResult:
    def test_files(self, purified):
        folder, report = purified
        found = {file.name for file in folder.iterdir()}
        assert found == {CARD_FILE, REPORT_FILE, "config.json", "model.safetensors", "preprocessor_config.json"}
        assert [path.name for path in folder.parent.iterdir()] == ["resnet"]
        assert PurificationReport.from_file(folder / REPORT_FILE) == report

    def test_loads_changed(self, purified, models):
        folder, _ = purified
        _, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        old, new = weights(models / "resnet"), weights(folder)
        assert old.keys() == new.keys()
        assert sum(not torch.equal(old[name], new[name]) for name in old) > 0.8 * len(old)

    def test_report(self, purified):
        _, report = purified
        assert (report.curves, report.spec) == ([], {})
        assert {"t": 0.4, "steps": 2, "seed": 3, "weight_decay": 5e-4}.items() <= report.arguments.items()
        assert report.cost["gradient_evaluations"] == 4
        assert (report.method["name"], report.method["paper"]) == ("mcr", "2005.00060")
        assert report.method["paths"] == [{"path": "curve", "taken": 0.4}]
        assert report.request["method"] == "mcr"
        for measured in (report.before, report.after):
            assert (measured["held_out"]["n"], measured["test"]["n"]) == (10, 30)
            assert "attack_success_rate" in measured["test"]

    def test_card(self, purified):
        folder, _ = purified
        text = (folder / CARD_FILE).read_text(encoding="utf-8")
        assert "purification by [mode connectivity repair (MCR)](https://hf.co/papers/2005.00060)" in text
        assert "Point taken: 0.4 (curve)" in text
        assert "Zhao et al., ICLR 2020, *Bridging Mode Connectivity" in text
        assert "arxiv:2005.00060" in text
        assert "4 gradient evaluations of batch 16" in text
        assert "| `t` | 0.4 |" in text
        assert "BadNets".casefold() in text.casefold()

    @pytest.mark.parametrize("method", ["fine_tuning", "anp"])
    def test_card_says_nothing_of_tsc(self, purified, method):
        """Nor of curves, permutations, or a paper that there is not."""
        _, report = purified
        baseline = BASELINES[method]
        described = {key: getattr(baseline, key) for key in report.method if hasattr(baseline, key)}
        changed = {"method": {**report.method, **described, "paths": [{"path": "line", "taken": 1.0}]}}
        text = str(PurificationReport(**{**report.to_dict(), **changed, "request": None}).card())
        assert not re.search(r"symmetr|permut|2506\.07467|bezier|curve|Peng|match on", text, re.IGNORECASE)
        assert "None" not in text
        assert ("arxiv" in text.casefold()) == (method == "anp")
        assert PLOT_FILE not in text

    def test_the_command_does_the_same(self, models, tmp_path, monkeypatch, capsys):
        """From the card, in the folder where model and images are."""
        options = {"method": "anp", "config": {"steps": 3, "use_cpu": True, "threshold": 0.9, "learning_rate": 1e5}}
        monkeypatch.chdir(tmp_path)
        for name in ("vit", "digits"):
            (tmp_path / name).symlink_to(models / name)
        report = purify("./vit", "./digits", tmp_path / "first", budget=50, **options)
        command = report.command().replace("\\\n", " ").split()
        assert command[:5] == ["hf-tsc", "purify", "./vit", "--method", "anp"]
        assert main([*command[1:], "--use_cpu"]) == 0
        assert same(weights(tmp_path / "first"), weights(tmp_path / "purified"))
        assert not same(weights(tmp_path / "first"), weights(models / "vit"))

    def test_trigger_has_no_influence(self, purified, models, tmp_path):
        run(models / "resnet", tmp_path / "out", "mcr", config={"t": 0.4, "learning_rate": 0.5})
        assert same(weights(tmp_path / "out"), weights(purified[0]))

    def test_without_labels(self, models, tmp_path):
        options = {"method": "nad", "config": {**QUICK, "teacher_steps": 1, "objective": "distillation"}, "budget": 50}
        report = purify(str(models / "vit"), digits(0, 60, labelled=False), tmp_path / "out", **options)
        assert report.score_name == "agreement"
        assert 0 <= report.after["held_out"]["agreement"] <= 1


class TestEncoders:
    def test_interpolated(self, models, tmp_path):
        config = {"alpha": 0.25, "learning_rate": 0.5}
        report = run(models / "encoder", tmp_path / "out", "wise_ft", config=config)
        assert (report.arguments["objective"], report.arguments["augmentation"]) == ("simclr", "simclr")
        assert report.method["paths"] == [{"path": "interpolation", "taken": 0.25}]
        assert not same(weights(tmp_path / "out"), weights(models / "encoder"))

    @pytest.mark.parametrize("method", [name for name, baseline in BASELINES.items() if not baseline.any_objective])
    def test_refused(self, models, tmp_path, method):
        with pytest.raises(UsageError, match=f"{method} needs an image classifier.*one of tsc, fine_tuning, wise_ft"):
            purify(str(models / "encoder"), CLEAN, tmp_path / "out", method=method, budget=50)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "magic"}, "method='magic': expected one of tsc, fine_tuning"),
            ({"config": {"curve_steps": 2}}, r"fst has no setting\(s\) curve_steps: it knows"),
            ({"config": {"shift": -1}}, "shift=-1: expected a number of 0 or more"),
            ({"config": TSCConfig(use_cpu=True)}, "method fst has settings of its own"),
            ({"preset": "paper"}, "preset='paper' is one of tsc"),
            ({"resume": True}, "method fst leaves no checkpoints"),
        ],
        ids=["method", "unknown setting", "wrong setting", "TSCConfig", "preset", "resume"],
    )
    def test_in_python(self, models, tmp_path, options, message):
        with pytest.raises(UsageError, match=message):
            purify(str(models / "vit"), CLEAN, tmp_path / "out", **{"method": "fst", "budget": 50, **options})
        assert list(tmp_path.iterdir()) == []

    def test_several_processes(self, models, tmp_path, monkeypatch):
        monkeypatch.setattr(baseline_run, "number_of_processes", lambda: 2)
        with pytest.raises(UsageError, match="method fst trains in one process"):
            run(models / "vit", tmp_path / "out", "fst")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                ["--method", "ft_sam", "--curve_steps", "2"],
                r"--curve_steps 2: ft_sam knows .*--learning_rate, .*--rho",
            ),
            (["--method=ft_sam", "--rho", "-1"], r"rho=-1\.0: expected a number of 0 or more"),
            (["--method", "ft_sam", "--rho", "much"], "argument --rho: invalid float value"),
            (["--method", "magic"], "argument --method: invalid choice: 'magic'"),
            (["--method", "fst", "--resume"], "method fst leaves no checkpoints"),
            (["--method", "fst", "--preset", "paper"], "preset='paper' is one of tsc"),
            (["--method", "fst", "--accelerate_config", "multi_cpu"], "method fst trains in one process"),
            (["--rho", "2"], "--rho 2: no option of this command"),
        ],
    )
    def test_on_the_command_line(self, models, tmp_path, capsys, options, message):
        argv = ["purify", str(models / "vit"), "--dataset_name", str(models / "digits"), "--use_cpu"]
        assert main([*argv, "--output_dir", str(tmp_path / "out"), *options]) == 2
        err = capsys.readouterr().err
        assert re.search(message, err), err
        assert err.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


class TestCommandLine:
    @pytest.mark.parametrize(
        ("method", "option"), [("ft_sam", "--rho"), ("nad", "--teacher_steps"), ("tsc", "--stages")]
    )
    def test_help(self, capsys, method, option):
        with pytest.raises(SystemExit):
            main(["purify", "--method", method, "--help"])
        out = capsys.readouterr().out
        assert option in out
        assert ("--stages" in out) == (method == "tsc")

    def test_many(self, models, tmp_path, capsys):
        """Each with its folder and line; done already is skipped, and refused by another method."""
        argv = ["purify", str(models / "resnet"), str(models / "vit"), "--dataset_name", str(models / "digits")]
        argv += ["--output_dir", str(tmp_path), "--budget", "50", "--json", "--use_cpu"]
        options = ["--steps", "2", "--learning-rate", "0.1"]
        assert main([*argv, "--method", "ft_sam", *options, "--rho", "0.5"]) == 0
        assert [json.loads(line)["status"] for line in capsys.readouterr().out.splitlines()] == ["done", "done"]
        assert read_json(tmp_path / "vit" / REPORT_FILE)["arguments"]["rho"] == 0.5
        assert main([*argv, "--method", "ft_sam", *options, "--rho", "0.5"]) == 0
        assert [json.loads(line)["status"] for line in capsys.readouterr().out.splitlines()] == ["skipped", "skipped"]
        assert main([*argv, "--method", "fine_tuning", *options]) == 3
        assert "other settings" in json.loads(capsys.readouterr().out.splitlines()[0])["error"]

    def test_dry_run(self, models, capsys):
        argv = ["purify", str(models / "vit"), "--dataset_name", str(models / "digits"), "--budget", "50", "--use_cpu"]
        assert main([*argv, "--dry_run", "--method", "ft_sam", "--steps", "5", "--batch_size", "8"]) == 0
        out = capsys.readouterr().out
        assert re.search(r"^method +FT-SAM$", out, re.MULTILINE)
        assert re.search(r"^steps +10 gradient evaluations of 8 images$", out, re.MULTILINE)
        assert "spaces" not in out
        assert "curve" not in out


def test_pushed(hub, purified):
    """What the folder of a baseline holds is what a push takes."""
    folder, _ = purified
    hub.reset()
    hub.add_user("me", token=TOKEN)
    push_folder(folder, PushOptions("me/baseline-purified", token=TOKEN))
    assert {REPORT_FILE, CARD_FILE, "model.safetensors"} <= set(hub.files("me/baseline-purified"))
