"""Encoders and dual encoders from end to end: which kind a model is, purify, evaluate, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from suspects_and_digits import NAMES, classifier, digit_data, digits, processor, read_json, save
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    ResNetModel,
    ViTModel,
    pipeline,
)

from hf_tsc import Attack, BadNets, PurificationReport, UsageError, purify
from hf_tsc.captions import find_caption_column
from hf_tsc.cli import main
from hf_tsc.data import open_images
from hf_tsc.derive import example_inputs
from hf_tsc.hub import resolve_model
from hf_tsc.images import ImagePipeline
from hf_tsc.objectives import features_of
from hf_tsc.tasks import Classification, Encoding, ImageTextMatching, Options, is_classifier, task_of
from hf_tsc.tasks.evaluate import evaluate_source

CONFIG = {
    "curve_steps": 3,
    "stages": 2,
    "sweep_points": 3,
    "save_strategy": "no",
    "per_device_train_batch_size": 16,
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_strategy": "no",
}
ATTACK = Attack(BadNets(), target_label=0)
WORDS = ("a", "photo", "of", ".", *NAMES)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate((*WORDS, "<unk>", "<pad>"))} | {"<s>": 18, "</s>": 19}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 18), ("</s>", 19)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Random models, saved."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    found = {
        "resnet": save(ResNetModel(tiny.model("resnet").config), folder / "resnet"),
        "vit": save(ViTModel(tiny.model("vit").config), folder / "vit"),
        "clip": save(tiny.model("clip"), folder / "clip"),
        "classifier": save(classifier("vit"), folder / "classifier"),
    }
    tokenizer().save_pretrained(found["clip"])
    return found


def captioned(start: int, stop: int, captions=lambda label: f"a {label}") -> Dataset:
    rows = digits(start, stop)
    return rows.add_column("caption", [captions(label) for label in rows["label"]])


def run(folder: Path, output: Path, data: Dataset, **options) -> PurificationReport:
    config = {**CONFIG, **options.pop("config", {})}
    return purify(str(folder), data, output, **{"config": config, "budget": 60, **options})


@pytest.mark.parametrize(
    ("name", "task"),
    [("resnet", Encoding), ("vit", Encoding), ("clip", ImageTextMatching), ("classifier", Classification)],
)
def test_kind(folders, name, task):
    assert task_of(resolve_model(str(folders[name]))) is task


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"architectures": ["DeiTForImageClassificationWithTeacher"]}, True),
        ({"architectures": ["PerceiverForImageClassificationLearned"]}, True),
        ({"architectures": ["ViTModel"]}, False),
        ({"architectures": None, "num_classes": 10}, True),  # timm's
        ({}, False),
    ],
)
def test_classifiers(config, found):
    assert is_classifier(config) is found


def test_kind_without_a_class_is_a_classifier(folders, tmp_path):
    for file in folders["classifier"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = read_json(tmp_path / "config.json")
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert task_of(resolve_model(str(tmp_path))) is Classification


class TestEncoder:
    @pytest.mark.parametrize(("family", "objective"), [("resnet", "simclr"), ("vit", "distillation")])
    def test_purified(self, folders, tmp_path, family, objective):
        out = tmp_path / "out"
        report = run(
            folders[family],
            out,
            digits(0, 300),
            config={"objective": objective},
            test=digit_data(300, 360),
            attack=ATTACK,
        )
        assert report.task["kind"] == "image encoder"
        assert report.arguments["objective"] == objective
        score = {"simclr": "view_retrieval", "distillation": "explained_variance"}[objective]
        assert score in report.before["held_out"]
        for place, count in (("held_out", 12), ("test", 60)):
            assert report.before[place]["n"] == count
            assert 0.1 < report.before[place]["accuracy"] <= 1  # of the probe
            assert 0 <= report.after[place]["attack_success_rate"] <= 1
        _, info = AutoModel.from_pretrained(out, output_loading_info=True)
        assert not any(info.values())
        card = (out / "README.md").read_text()
        assert "pipeline_tag: image-feature-extraction" in card
        assert "linear-probe accuracy (test)" in card
        # what was measured is what a probe on the saved model gives, fitted on the same rows
        used = {*report.dataset["train_indices"], *report.dataset["held_out_indices"]}
        others = [row for row in range(300) if row not in used]
        found = evaluate_source(
            resolve_model(str(out)),
            digit_data(300, 360),
            attack=ATTACK,
            probe_data=open_images(digits(0, 300).select(others)),
        )
        assert found == report.after["test"]

    def test_features_are_kept_by_the_suspects_own_pipeline(self, folders, tmp_path):
        run(folders["vit"], tmp_path / "out", digits(0, 300, labelled=False))
        extract = pipeline("image-feature-extraction", model=str(tmp_path / "out"), device="cpu", pool=True)
        image = digits(0, 1)["image"][0].convert("RGB")
        model = AutoModel.from_pretrained(tmp_path / "out").eval()
        steps = ImagePipeline(processor())
        with torch.no_grad():
            expected = features_of(model, steps.model_input(steps.pixels(image)[None]))
        assert np.allclose(extract(image)[0], expected[0].numpy(), atol=1e-5)

    def test_without_labels_there_is_only_the_score(self, folders, tmp_path):
        report = run(folders["resnet"], tmp_path / "out", digits(0, 100, labelled=False))
        assert report.before == {"held_out": {"n": 12, "explained_variance": 1.0}}
        assert report.after["held_out"]["explained_variance"] < 1
        assert "no labels" in report.notes[0]

    def test_no_images_left_for_a_probe(self, folders, tmp_path):
        report = run(folders["resnet"], tmp_path / "out", digits(0, 60))
        assert set(report.before["held_out"]) == {"n", "explained_variance"}
        assert "none was left" in " ".join(report.notes)

    def test_a_probe_on_few_images(self, folders):
        """The number of images is what the option says: another probe, other answers."""
        source, test, rest = resolve_model(str(folders["vit"])), digit_data(300, 400), digit_data(0, 300)
        many, few = (
            evaluate_source(source, test, probe_data=rest, options=Options(probe_images=count)) for count in (300, 15)
        )
        assert many["accuracy"] > few["accuracy"]


class TestDualEncoder:
    @pytest.mark.parametrize("objective", [None, "image_text"])
    def test_purified_with_captions(self, folders, tmp_path, objective):
        data = captioned(0, 300)
        test = open_images(captioned(300, 360))
        config = {} if objective is None else {"objective": objective}
        report = run(folders["clip"], tmp_path / "out", data, test=test, attack=ATTACK, config=config)
        assert report.task["pipeline_tag"] == "zero-shot-image-classification"
        assert report.arguments["objective"] == (objective or "distillation")
        names = {"n", "accuracy", "n_triggered", "attack_success_rate", "robust_accuracy"}
        names |= {"image_to_text", "text_to_image"}
        assert set(report.after["test"]) == names
        assert set(report.after["held_out"]) == {*names, "retrieval"}
        assert "captions found for images (R@1) (test)" in (tmp_path / "out" / "README.md").read_text()
        assert AutoTokenizer.from_pretrained(tmp_path / "out")("a 3")["input_ids"] == [18, 0, WORDS.index("3"), 19]

    def test_purified_by_its_own_embeddings(self, folders, tmp_path):
        """Image tower alone, whose hidden states are followed; embeddings of texts stay bit by bit."""
        config = {"objective": "distillation", "train_towers": ["image"], "move_towers": ["image"]}
        report = run(folders["clip"], tmp_path / "out", captioned(0, 100), config=config)
        expected = {
            "objective": "distillation",
            "feature_weight": 2.0,
            "feature_states": "last",
            "learning_rate": 0.024,
        }
        assert {name: report.arguments[name] for name in expected} == expected
        suspect, purified = (AutoModel.from_pretrained(place).eval() for place in (folders["clip"], tmp_path / "out"))
        inputs = {name: tensor.cpu() for name, tensor in example_inputs(suspect).items()}
        with torch.no_grad():
            before, after = (model(**inputs) for model in (suspect, purified))
        assert torch.equal(before.text_embeds, after.text_embeds)
        assert not torch.allclose(before.image_embeds, after.image_embeds, atol=1e-4)

    def test_accuracy_is_that_of_a_pipeline(self, folders, tmp_path):
        """Prompts made of class names: no captions."""
        report = run(folders["clip"], tmp_path / "out", digits(0, 300), test=digit_data(300, 360))
        assert "prompts were made of class names" in report.notes[0]
        assert isinstance(AutoProcessor.from_pretrained(tmp_path / "out"), CLIPProcessor)
        classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "out"), device="cpu")
        rows = digits(300, 360)
        answers = classify(
            [picture.convert("RGB") for picture in rows["image"]],
            candidate_labels=NAMES,
            hypothesis_template="a photo of a {}.",
        )
        right = [
            max(a, key=lambda one: one["score"])["label"] == NAMES[y]
            for a, y in zip(answers, rows["label"], strict=True)
        ]
        assert report.after["test"]["accuracy"] == np.mean(right)

    def test_long_captions_are_cut_and_counted(self, folders, tmp_path):
        data = captioned(0, 100, lambda label: f"a {label} " + "of " * (9 if label == 3 else 0))
        report = run(folders["clip"], tmp_path / "out", data)
        assert "1 of 10 captions were longer" in " ".join(report.notes)

    def test_several_captions_an_image(self, folders, tmp_path):
        rows = digits(0, 100).add_column("texts", [["a photo", f"of {label}"] for label in digits(0, 100)["label"]])
        report = run(folders["clip"], tmp_path / "out", rows)
        assert {"image_to_text", "retrieval"} < set(report.after["held_out"])

    def test_templates(self, folders):
        source, test = resolve_model(str(folders["clip"])), digit_data(300, 400)
        one, other = (
            evaluate_source(source, test, options=Options(templates=templates))["accuracy"]
            for templates in (["a photo of a {}."], [". {}", "{}"])
        )
        assert one != other


@pytest.mark.parametrize(
    ("name", "config", "told"),
    [
        ("clip", {}, "clip is an image-text dual encoder, CLIPModel. Objective: distillation (its own embeddings"),
        ("resnet", {"objective": "simclr"}, "Objective: simclr (two views of each image, no labels), as asked for."),
        ("classifier", {}, "the default for one; --objective takes cross_entropy, too."),
    ],
)
def test_what_is_chosen_is_told(folders, tmp_path, capsys, name, config, told):
    run(folders[name], tmp_path / "out", digits(0, 100), config={**config, "disable_tqdm": False})
    assert told in capsys.readouterr().err


class TestRefused:
    def test_no_captions_and_no_class_names(self, folders, tmp_path):
        with pytest.raises(UsageError, match="neither captions nor class names"):
            run(folders["clip"], tmp_path / "out", digits(0, 100, labelled=False))
        assert not any(tmp_path.iterdir())

    def test_a_caption_is_missing(self, folders, tmp_path):
        with pytest.raises(UsageError, match=r"1\d row\(s\) without a caption"):
            run(folders["clip"], tmp_path / "out", captioned(0, 100, lambda label: " " if label == 3 else "a"))

    def test_two_columns_of_text(self, folders, tmp_path):
        with pytest.raises(UsageError, match=r"\['caption', 'text'\] are all text; choose one"):
            run(folders["clip"], tmp_path / "out", captioned(0, 100).add_column("text", ["a"] * 100))

    def test_names_of_files_are_no_captions_where_there_are_class_names(self):
        rows = digits(0, 30)
        named = rows.add_column("file_name", [f"{number}.png" for number in range(30)])
        assert find_caption_column(open_images(named)) is None
        assert find_caption_column(open_images(named, caption_column="file_name")) == "file_name"
        assert find_caption_column(open_images(captioned(0, 30))) == "caption"
        assert find_caption_column(open_images(named.remove_columns("label"))) == "file_name"

    def test_a_trigger_without_class_names(self, folders):
        rows = open_images(captioned(0, 30).remove_columns("label"))
        with pytest.raises(UsageError, match="no labels with names: the attack success rate of a dual encoder"):
            evaluate_source(resolve_model(str(folders["clip"])), rows, attack=ATTACK)

    def test_a_column_that_is_no_text(self, folders, tmp_path):
        data = open_images(digits(0, 100), caption_column="label")
        with pytest.raises(UsageError, match="--caption_column_name label, expected one of the columns of text"):
            run(folders["clip"], tmp_path / "out", data)

    @pytest.mark.parametrize("name", ["clip", "resnet"])
    def test_a_batch_of_one(self, folders, tmp_path, name):
        config = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
        config["objective"] = {"resnet": "simclr", "clip": "image_text"}[name]
        with pytest.raises(UsageError, match="accumulated batches do not count"):
            run(folders[name], tmp_path / "out", digits(0, 100), config=config)

    def test_no_whole_batch(self, folders, tmp_path):
        config = {"objective": "image_text", "per_device_train_batch_size": 64}
        with pytest.raises(UsageError, match="there are 48 images to train on, which makes no whole batch"):
            run(folders["clip"], tmp_path / "out", digits(0, 100), config=config)

    def test_an_objective_of_another_kind(self, folders, tmp_path):
        with pytest.raises(UsageError, match="cross_entropy does not fit resnet, which is an image encoder"):
            run(folders["resnet"], tmp_path / "out", digits(0, 100), config={"objective": "cross_entropy"})

    def test_an_encoder_without_pooled_output(self, tmp_path):
        torch.manual_seed(0)
        folder = save(ViTModel(tiny.model("vit").config, add_pooling_layer=False), tmp_path / "vit")
        with pytest.raises(UsageError):
            run(folder, tmp_path / "out", digits(0, 100))

    def test_no_tokenizer(self, tmp_path):
        folder = save(tiny.model("clip"), tmp_path / "clip")
        with pytest.raises(UsageError, match=r"has no tokenizer: add tokenizer\.json"):
            run(folder, tmp_path / "out", digits(0, 100))

    @pytest.mark.parametrize("named", ["AutoModel", "Trainer", "../../evil"])
    def test_a_tokenizer_class_that_is_none(self, folders, tmp_path, named):
        for file in folders["clip"].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = read_json(tmp_path / "tokenizer_config.json")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": named}))
        with pytest.raises(UsageError, match="expected the name of a tokenizer"):
            run(tmp_path, tmp_path / "out", digits(0, 100))

    def test_a_tokenizer_with_code(self, folders, tmp_path):
        for file in folders["clip"].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = read_json(tmp_path / "tokenizer_config.json")
        config["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(UsageError, match="auto_map"):
            run(tmp_path, tmp_path / "out", digits(0, 100))

    def test_evaluate_an_encoder_without_images_for_the_probe(self, folders):
        with pytest.raises(UsageError, match="name their split with --probe_split"):
            evaluate_source(resolve_model(str(folders["vit"])), digit_data(0, 50))

    def test_evaluate_a_probe_on_the_images_it_was_fitted_on(self, folders):
        with pytest.raises(UsageError, match=r"measured on are those used to fit the linear probe \(--probe_split\)"):
            evaluate_source(resolve_model(str(folders["vit"])), digit_data(0, 50), probe_data=digit_data(0, 50))
        with pytest.raises(UsageError, match=r"20 of the 50 images .* used to fit the linear probe \(--probe_split\)"):
            evaluate_source(resolve_model(str(folders["vit"])), digit_data(0, 50), probe_data=digit_data(30, 80))

    def test_a_template_without_a_place(self, folders):
        with pytest.raises(UsageError, match=r"--prompt_template 'a photo': expected one \{\}"):
            evaluate_source(resolve_model(str(folders["clip"])), digit_data(0, 50), options=Options(["a photo"]))


class TestCommandLine:
    def test_evaluate_an_encoder(self, folders, tmp_path, capsys):
        DatasetDict({"train": digits(0, 200), "test": digits(200, 260)}).save_to_disk(tmp_path / "data")
        options = [
            "--dataset_name",
            str(tmp_path / "data"),
            "--dataset_split",
            "test",
            "--probe_split",
            "train",
            "--json",
        ]
        assert main(["evaluate", str(folders["vit"]), *options, "--trigger", "badnets", "--target_label", "0"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found == evaluate_source(
            resolve_model(str(folders["vit"])), digit_data(200, 260), attack=ATTACK, probe_data=digit_data(0, 200)
        )

    def test_evaluate_clip_by_several_templates(self, folders, tmp_path, capsys):
        digits(200, 260).save_to_disk(tmp_path / "data")
        templates = ["--prompt_template", "a {}", "photo of {}"]
        assert (
            main(["evaluate", str(folders["clip"]), "--dataset_name", str(tmp_path / "data"), "--json", *templates])
            == 0
        )
        found = json.loads(capsys.readouterr().out)
        expected = Options(["a {}", "photo of {}"])
        assert found == evaluate_source(resolve_model(str(folders["clip"])), digit_data(200, 260), options=expected)
