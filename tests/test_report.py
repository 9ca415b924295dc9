"""The report as JSON, table, model card and picture; the card of a suspect with a hostile name."""

import json
import os
import platform
import re
import shlex
import socket
from importlib.metadata import version

import pytest
import tiny
import torch
import yaml
from huggingface_hub import ModelCard

from hf_tsc.curve_result import CurvePoint, CurveResult
from hf_tsc.folders import PLOT_FILE, REPORT_FILE
from hf_tsc.report import PurificationReport, environment, plot_curves, summarise_spec

CURVES = [
    CurveResult(1, 1, 4, 0.5, [CurvePoint(t, 2.0, s) for t, s in ((0.0, 0.9), (0.5, 0.8), (1.0, 0.9))], 0.6),
    CurveResult(1, 2, 8, 0.4, [CurvePoint(t, 2.0, s) for t, s in ((0.0, 0.9), (0.5, 0.7), (1.0, 0.8))], 0.3),
]
TRIGGER = {"trigger": {"name": "badnets"}, "target_label": 3}


def report(**changes) -> PurificationReport:
    fields = {
        "suspect": {"name": "digits", "repo_id": None, "revision": None, "architecture": "ViT", "files": {}},
        "dataset": {
            "name": "digits",
            "fingerprint": "abc",
            "train_indices": [1, 5, 7],
            "held_out_indices": [2],
            "indices_hash": "0123456789abcdef" * 4,
        },
        "spec": {"spaces": {"hidden": 3, "stream": 1}, "relative_error": 2e-14},
        "arguments": {
            "seed": 7,
            "rounds": 1,
            "stages": 2,
            "objective": "cross_entropy",
            "per_device_train_batch_size": 64,
        },
        "curves": [curve.to_dict() for curve in CURVES],
        "before": {"held_out": {"n": 30, "accuracy": 0.9666}},
        "after": {"held_out": {"n": 30, "accuracy": 0.9}},
        "score_name": "accuracy",
        "attack": None,
        "purified": {"dtype": "float32", "files": {}},
        "environment": {"versions": {"hf_tsc": "9.9"}, "device": "cpu"},
        "cost": {"gradient_evaluations": 8, "seconds": 1.6},
    }
    return PurificationReport(**{**fields, **changes})


def attacked(**changes) -> PurificationReport:
    def measures(acc, asr, robust):
        triggered = {"n_triggered": 27, "attack_success_rate": asr, "robust_accuracy": robust}
        return {"held_out": {"n": 30, "accuracy": acc}, "test": {"n": 31, "accuracy": acc, **triggered}}

    return report(before=measures(0.95, 1.0, 0.0), after=measures(0.94, 0.051, 0.9), attack=TRIGGER, **changes)


def named(name: str) -> PurificationReport:
    plain = report()
    return report(
        suspect={**plain.suspect, "name": name},
        dataset={**plain.dataset, "name": name},
    )


def front_matter(text: str) -> dict:
    _, block, _ = text.split("---\n", 2)
    return yaml.safe_load(block)


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.split("## What was not shown")[0].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


class TestJson:
    def test_round_trip(self, tmp_path):
        made = attacked(notes=["a note"])
        file = tmp_path / REPORT_FILE
        file.write_text(json.dumps(made.to_dict()))
        assert PurificationReport.from_file(file) == made
        assert str(PurificationReport.from_file(file).card()) == str(made.card())

    def test_rows(self):
        assert attacked().rows() == [
            ("clean accuracy (held-out)", 30, "95.0 %", "94.0 %"),
            ("clean accuracy (test)", 31, "95.0 %", "94.0 %"),
            ("attack success rate (test)", 27, "100.0 %", "5.1 %"),
            ("triggered images classified correctly (test)", 27, "0.0 %", "90.0 %"),
        ]

    def test_rows_without_labels(self):
        agreement = {"held_out": {"n": 30, "agreement": 1.0}}
        (row,) = report(before=agreement, after=agreement, score_name="agreement").rows()
        assert row == ("agreement with the suspect on clean images (held-out)", 30, "100.0 %", "100.0 %")


class TestCard:
    def test_front_matter(self):
        text = str(report().card())
        accuracy = {"type": "accuracy", "value": 0.9, "name": "clean accuracy"}
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": "digits (held-out)", "type": "digits"},
            "metrics": [accuracy],
        }
        assert front_matter(text) == {
            "library_name": "transformers",
            "pipeline_tag": "image-classification",
            "tags": ["hf-tsc", "backdoor-purification", "arxiv:2506.07467"],
            "model-index": [{"name": "digits-purified", "results": [result]}],
        }
        assert ModelCard(text).data.to_dict() == front_matter(text)

    def test_the_model_index_holds_what_the_test_images_gave(self):
        (entry,) = front_matter(str(attacked().card()))["model-index"]
        (result,) = entry["results"]
        assert result["dataset"] == {"name": "digits (test)", "type": "digits"}
        accuracy, success = result["metrics"]
        assert (accuracy["type"], accuracy["value"]) == ("accuracy", 0.94)
        assert (success["type"], success["value"], success["args"]) == (
            "attack_success_rate",
            0.051,
            {"target_label": 3},
        )

    def test_the_model_index_names_the_data_that_the_test_images_are_of(self):
        asked = {"test": {"name": "someone/other"}, "preset": "default", "budget": "5%", "held_out": 0.2}
        made = attacked(request={**asked, "arguments": {}})
        ((result,),) = (entry["results"] for entry in front_matter(str(made.card()))["model-index"])
        assert result["dataset"] == {"name": "someone/other (test)", "type": "someone/other"}

    def test_dataset_and_license_of_the_hub(self):
        made = report()
        text = str(
            report(
                dataset={**made.dataset, "name": "someone/digits", "revision": "d" * 40},
                suspect={**made.suspect, "license": "apache-2.0"},
            ).card()
        )
        assert front_matter(text)["datasets"] == ["someone/digits"]
        assert front_matter(text)["license"] == "apache-2.0"
        assert f"commit `{'d' * 40}`" in text

    def test_settings_and_versions(self):
        text = str(report().card())
        assert "| `objective` | cross_entropy |" in text
        assert "hf_tsc 9.9." in text

    def test_the_command_that_repeats_it(self):
        made = report()
        request = {"budget": "5%", "held_out": 0.2, "preset": "paper", "arguments": {"rounds": 2, "seed": 7}}
        request["arguments"]["move_spaces"] = ["hidden", "heads"]
        suspect = {**made.suspect, "name": "someone/vit", "repo_id": "someone/vit", "revision": "f" * 40}
        dataset = {**made.dataset, "name": "a/b", "revision": "d" * 40, "split": "train", "image_column": "image"}
        dataset["place"] = "hub"
        command = report(request=request, suspect=suspect, dataset=dataset).command()
        assert max(map(len, command.splitlines())) <= 102
        assert command.replace(" \\\n   ", "") == (
            f"hf-tsc purify someone/vit --revision {'f' * 40} --dataset_name a/b --dataset_split train "
            f"--dataset_revision {'d' * 40} --image_column_name image --budget 5% --held_out 0.2 --preset paper "
            "--rounds 2 --seed 7 --move_spaces hidden heads --output_dir purified"
        )
        local = report(request=request, dataset={**made.dataset, "place": "folder"}).command()
        assert local.startswith("hf-tsc purify ./digits --dataset_name ./digits --budget 5%")
        assert report(request=request, dataset={**made.dataset, "place": "memory"}).command() is None
        assert report().command() is None
        assert "hf-tsc purify" not in str(report().card())
        assert command in str(report(request=request, suspect=suspect, dataset=dataset).card())

    def test_a_hostile_name_is_one_word_of_the_command(self):
        made = report()
        request = {"budget": "5%", "held_out": 0.2, "preset": "default", "arguments": {}}
        dataset = {**made.dataset, "name": "x; rm -rf $HOME `id` \n'\"&", "split": "a b", "place": "folder"}
        words = shlex.split(report(request=request, dataset=dataset).command())
        assert words[3:5] == ["--dataset_name", "./x; rm -rf $HOME _id_ _'\"&"]
        assert words[5:7] == ["--dataset_split", "a b"]

    def test_base_model(self):
        suspect = {**report().suspect, "name": "someone/vit", "repo_id": "someone/vit", "revision": "f" * 40}
        text = str(report(suspect=suspect).card())
        assert front_matter(text)["base_model"] == "someone/vit"
        assert front_matter(text)["base_model_relation"] == "finetune"
        assert f"at commit `{'f' * 40}`" in text

    @pytest.mark.parametrize("made", [report(), attacked()], ids=["plain", "attacked"])
    def test_numbers(self, made):
        rows = table_rows(str(made.card()))
        assert [[m, int(n), b, a] for m, n, b, a in rows] == [list(row) for row in made.rows()]

    def test_says_what_it_must(self):
        text = str(report(notes=["The labels have no names."]).card())
        for part in (
            "# digits-purified\n",
            "One run with seed 7:",
            "4 images of `digits`",
            "3 to train and match on",
            "1 held out",
            "`0123456789abcdef`",
            "t = 0.5 (round 1, curve 1), t = 0.4 (round 1, curve 2).",
            "4 permutable spaces",
            "by 2e-14",
            "8 gradient evaluations of batch 64",
            "- The labels have no names.",
            f"![curves]({PLOT_FILE})",
            f"[`{REPORT_FILE}`]({REPORT_FILE})",
            "`hf_tsc` 9.9",
        ):
            assert part in text, part

    def test_an_attack_is_named_only_if_there_was_one(self):
        unknown = "No trigger was known, so none was tried"
        assert unknown in " ".join(str(report().card()).split())
        text = " ".join(str(attacked().card()).split())
        assert unknown not in text
        assert "one known trigger (`badnets`, target label 3)" in text

    def test_one_stage_has_no_second_curve(self):
        text = str(report(arguments={**report().arguments, "stages": 1}).card())
        assert "a second curve" in str(report().card())
        assert "a second curve" not in text

    @pytest.mark.parametrize(
        "name",
        [
            "<script>alert(1)</script>",
            "<img src=x onerror=alert(1)>",
            "[click](http://evil.example)",
            "![](http://evil.example/x.png)",
            "x\n---\nlicense: mit\nbase_model: evil/x\n---\n# Safe",
            "---\nlicense: mit\n---",
            "a|b|c",
            "`code` **bold** ~~gone~~",
            "{{ 7 * 7 }}{% raw %}",
            "x\r\n\u2028## Certified clean",
            "&lt;b&gt;",
            "x" * 5000,
        ],
    )
    def test_hostile_names_are_harmless(self, name):
        # The card is that of a harmless name, with nothing but letters, digits and ` ._/-` in the name's place.
        text, harmless = str(named(name).card()), str(named("HARMLESS").card())
        body = harmless.split("---\n", 2)[2]
        match = re.fullmatch(re.escape(body).replace("HARMLESS", r"([\w./ =%:-]{1,100})"), text.split("\n---\n", 1)[1])
        assert match
        assert len(set(match.groups())) == 1
        assert "://" not in match[1]
        front = json.dumps(front_matter(harmless)).replace("HARMLESS", match[1])
        assert front_matter(text) == json.loads(front)

    def test_hostile_fingerprint_is_harmless(self):  # `state.json` of a saved dataset may hold any
        plain = report()
        text = str(report(dataset={**plain.dataset, "fingerprint": "`<b>\n# x"}).card())
        assert text.count("\n") == str(plain.card()).count("\n")
        assert "<b>" not in text


class TestPlot:
    def test_curves(self, tmp_path):
        figure = plot_curves(CURVES, score_name="agreement", title="digits")
        assert [axis.get_title() for axis in figure.axes] == ["round 1, curve 1", "round 1, curve 2"]
        for axis, curve in zip(figure.axes, CURVES, strict=True):
            score, mark = axis.get_lines()
            assert list(score.get_xdata()) == [0.0, 0.5, 1.0]
            assert list(score.get_ydata()) == pytest.approx([100 * p.score for p in curve.sweep])
            assert mark.get_xdata()[0] == curve.t_star
        (label,) = [text.get_text() for text in figure.legends[0].get_texts()]
        assert label == "clean agreement, held-out"
        figure.savefig(tmp_path / PLOT_FILE)
        assert (tmp_path / PLOT_FILE).read_bytes().startswith(b"\x89PNG")

    def test_monitors(self):
        points = [CurvePoint(t, 1.0, 0.9, {"attack_success_rate": 1 - t}) for t in (0.0, 0.5, 1.0)]
        figure = plot_curves([CurveResult(1, 1, 4, 0.5, points, 0.5)])
        lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].get_lines()}
        assert lines["attack success rate"] == [100, 50, 0]

    def test_no_curves(self):
        assert len(plot_curves([]).axes) == 1


def test_spec_summary():
    spec = tiny.spec("vit")
    summary = summarise_spec(spec, 1e-14, 0.3)
    kinds = [space.kind for space in spec.spaces.values()]
    assert summary["spaces"] == {kind: kinds.count(kind) for kind in set(kinds)}
    described = [axis for axes in spec.to_dict()["tensors"].values() for axis in axes]
    assert summary["moved_axes"] + sum(summary["frozen_axes"].values()) == len(described)
    assert (summary["relative_error"], summary["negative_control"]) == (1e-14, 0.3)
    json.dumps(summary)


def test_environment_is_complete_and_names_nobody():
    found = environment(torch.device("cpu"))
    for package in ("hf_tsc", "torch", "transformers", "datasets", "accelerate"):
        assert found["versions"][package] == version(package)
    assert found["versions"]["python"] == platform.python_version()
    text = json.dumps(found)
    assert socket.gethostname() not in text
    assert os.getcwd() not in text
