"""purify end to end on tiny models: the folder, the report, the card; repeating, interrupting and resuming."""

import hashlib
import json
import os
import re
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets
from huggingface_hub import ModelCard
from suspects_and_digits import (
    NAMES,
    classifier,
    digit_data,
    digits,
    edit_json,
    files_naming,
    processor,
    read_json,
    same,
    save,
    sha256,
    weights,
)
from transformers import AutoImageProcessor, AutoModelForImageClassification, ResNetConfig, pipeline

from hf_tsc import AccuracyBudgetError, Attack, BadNets, PurificationReport, TSCConfig, TSCTrainer, UsageError, purify
from hf_tsc.curve_result import CurveResult
from hf_tsc.suspects import SuspectConfig, train_suspect
from hf_tsc.tasks.classification import UNCORRECTED_TRANSFORMER

FAMILIES = ("resnet", "vit")
ATTACK = Attack(BadNets(), target_label=0)
CLEAN, TEST = digits(400, 500), digit_data(500, 560)
BUDGET = 50
CONFIG = {
    "curve_steps": 3,
    "stages": 2,
    "sweep_points": 3,
    "save_steps": 2,
    "seed": 3,
    "per_device_train_batch_size": 16,
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_strategy": "no",
}


def run(suspect, output, *, data=CLEAN, test=TEST, **options) -> PurificationReport:
    config = {**CONFIG, **options.pop("config", {})}
    return purify(str(suspect), data, output, **{"config": config, "budget": BUDGET, "test": test, **options})


@pytest.fixture(scope="module")
def suspects(tmp_path_factory):
    """A ResNet that has learnt the digits and a trigger, and a random ViT with dropout."""
    folder = tmp_path_factory.mktemp("suspects")
    config = ResNetConfig(embedding_size=12, hidden_sizes=[12, 20], depths=[2, 1], layer_type="basic")
    quick = {"num_train_epochs": 15, "learning_rate": 5e-3, "per_device_train_batch_size": 32, "use_cpu": True}
    args = SuspectConfig(output_dir=str(folder / "resnet"), disable_tqdm=True, logging_strategy="no", **quick)
    train_suspect(config, processor(), digit_data(0, 400), args=args, attack=ATTACK)
    return {"resnet": folder / "resnet", "vit": save(classifier("vit"), folder / "vit")}


@pytest.fixture(scope="module")
def purified(suspects, tmp_path_factory):
    """Each suspect, purified in one go without a trigger: folder and report."""
    folder = tmp_path_factory.mktemp("purified")
    return {family: (folder / family, run(suspects[family], folder / family)) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


class TestFolder:
    def test_files(self, purified, family):
        folder, _ = purified[family]
        names = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
        assert {file.name for file in folder.iterdir()} == names | {"tsc_report.json", "tsc_curves.png"}
        assert {path.name for path in folder.parent.iterdir()} == set(FAMILIES)  # neither .work nor temporary folders

    def test_loads_unchanged(self, purified, suspects, family, tmp_path):
        folder, _ = purified[family]
        model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        model.save_pretrained(tmp_path)
        assert same(weights(tmp_path), weights(folder))
        old, new = weights(suspects[family]), weights(folder)
        assert {name: (t.shape, t.dtype) for name, t in old.items()} == {n: (t.shape, t.dtype) for n, t in new.items()}
        changed = [name for name in old if not torch.equal(old[name], new[name])]
        assert len(changed) > 0.8 * len(old)
        assert read_json(folder / "config.json") == read_json(suspects[family] / "config.json")
        old_processor = AutoImageProcessor.from_pretrained(suspects[family])
        assert AutoImageProcessor.from_pretrained(folder).to_dict() == old_processor.to_dict()

    def test_no_local_path(self, purified, suspects, family):
        folder, _ = purified[family]
        for place in (folder.parent.parent, suspects[family].parent, Path.cwd(), Path.home()):
            assert files_naming(folder, str(place)) == []

    def test_accuracy_is_that_of_a_pipeline(self, purified, family):
        folder, report = purified[family]
        classify = pipeline("image-classification", model=str(folder), device="cpu")

        def accuracy(rows):
            answers = classify([picture.convert("RGB") for picture in rows["image"]], top_k=1)
            return np.mean([a["label"] == NAMES[label] for (a,), label in zip(answers, rows["label"], strict=True)])

        assert report.after["held_out"]["accuracy"] == accuracy(CLEAN.select(report.dataset["held_out_indices"]))
        assert report.after["test"]["accuracy"] == accuracy(TEST.rows)
        assert report.after["test"]["n"] == len(TEST.rows)


class TestReport:
    def test_file(self, purified, family):
        folder, report = purified[family]
        assert PurificationReport.from_file(folder / "tsc_report.json") == report
        json.loads((folder / "tsc_report.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity

    def test_images(self, purified, family):
        data = purified[family][1].dataset
        train, held_out = data["train_indices"], data["held_out_indices"]
        assert (len(train), len(held_out)) == (40, 10)
        assert len({*train, *held_out}) == BUDGET
        assert {*train, *held_out} <= set(range(len(CLEAN)))
        assert {CLEAN[i]["label"] for i in train} == set(range(10))
        expected = hashlib.sha256(np.array([*train, *held_out], dtype="<i8").tobytes()).hexdigest()
        assert data["indices_hash"] == expected
        assert (data["rows"], data["label_column"]) == (100, "label")

    def test_what_was_done(self, purified, suspects, family):
        folder, report = purified[family]
        assert report.suspect["name"] == family
        assert (report.suspect["repo_id"], report.suspect["revision"]) == (None, None)
        assert report.suspect["files"] == {"model.safetensors": sha256(suspects[family] / "model.safetensors")}
        assert report.purified == {
            "dtype": "float32",
            "files": {"model.safetensors": sha256(folder / "model.safetensors")},
        }
        assert report.environment["versions"]["torch"] == version("torch")
        assert report.arguments["seed"] == 3
        assert report.cost["gradient_evaluations"] == 6
        assert report.spec["relative_error"] < 1e-10 < report.spec["negative_control"]
        curves = [CurveResult.from_dict(curve) for curve in report.curves]
        assert [(c.round, c.stage, c.step) for c in curves] == [(1, 1, 3), (1, 2, 6)]
        assert all(c.moved > 0 for c in curves)
        # what was measured at the end of the course is what the saved model does
        taken = TSCConfig(**{k: v for k, v in report.arguments.items() if k.startswith("curve")}, use_cpu=True)
        assert [c.t_star for c in curves] == [taken.curve1_t, taken.curve2_t]

    def test_before_is_the_suspect(self, purified, suspects):
        _, report = purified["resnet"]
        assert report.before["test"]["accuracy"] > 0.75
        assert report.before["test"]["accuracy"] != report.after["test"]["accuracy"]
        assert report.attack is None
        assert "attack_success_rate" not in json.dumps(report.to_dict())

    def test_card(self, purified, family):
        folder, report = purified[family]
        card = ModelCard.load(folder / "README.md")
        assert card.data.pipeline_tag == "image-classification"
        assert "arxiv:2506.07467" in card.data.tags
        assert f"# {family}-purified" in card.text
        for place in ("held_out", "test"):
            before, after = (f"{100 * measured[place]['accuracy']:.1f}" for measured in (report.before, report.after))
            name, n = place.replace("_", "-"), report.before[place]["n"]
            assert f"| clean accuracy ({name}) | {n} | {before} % | {after} % |" in card.text
        for target in re.findall(r"\]\((?!http)([^)]+)\)", card.text):
            assert (folder / target).is_file()


def test_repeated_from_its_report(purified, suspects, tmp_path, family):
    folder, report = purified[family]
    torch.manual_seed(77)  # the caller's random state has no part in it
    known = {k: v for k, v in report.arguments.items() if k in TSCConfig.__dataclass_fields__}
    config = TSCConfig(output_dir=str(tmp_path / "unused"), use_cpu=True, **known)
    again = purify(str(suspects[family]), CLEAN, tmp_path / "again", config=config, budget=0.5)
    assert same(weights(tmp_path / "again"), weights(folder))
    assert again.purified == report.purified
    assert again.after == {"held_out": report.after["held_out"]}


def test_trigger_has_no_influence(purified, suspects, tmp_path, family):
    folder, report = purified[family]
    attacked = run(suspects[family], tmp_path / "out", attack=ATTACK)
    assert same(weights(tmp_path / "out"), weights(folder))
    assert attacked.attack == {"trigger": {"name": "badnets"}, "target_label": 0}
    for place in ("held_out", "test"):
        for measured, plain in ((attacked.before, report.before), (attacked.after, report.after)):
            assert plain[place].items() <= measured[place].items()
            assert {"n_triggered", "attack_success_rate", "robust_accuracy"} <= measured[place].keys()
    others = sum(label != 0 for label in TEST.rows["label"])
    assert attacked.before["test"]["n_triggered"] == others
    rates = [[p["monitors"]["attack_success_rate"] for p in curve["sweep"]] for curve in attacked.curves]
    assert [len(rate) for rate in rates] == [3, 3]
    assert all(0 <= rate <= 1 for curve in rates for rate in curve)
    assert {name for curve in report.curves for p in curve["sweep"] for name in p["monitors"]} == {"test_accuracy"}
    if family == "resnet":
        assert attacked.before["test"]["attack_success_rate"] > 0.8
    else:  # without BatchNorm, the curve's first point is the suspect itself
        assert rates[0][0] == attacked.before["test"]["attack_success_rate"]
        assert report.curves[0]["sweep"][0]["monitors"]["test_accuracy"] == report.before["test"]["accuracy"]
    assert "| attack success rate (test) |" in (tmp_path / "out" / "README.md").read_text()


def test_without_labels(suspects, tmp_path):
    config = {"objective": "distillation", "stages": 1}
    report = run(suspects["vit"], tmp_path / "out", data=digits(400, 500, labelled=False), config=config)
    assert report.score_name == "agreement"
    assert report.before["held_out"] == {"n": 10, "agreement": 1.0}
    assert 0 <= report.after["held_out"]["agreement"] <= 1
    assert report.before["test"]["n"] == len(TEST.rows)
    assert len(report.dataset["train_indices"]) == 40
    assert "| agreement with the suspect on clean images (held-out) | 10 | 100.0 % |" in str(report.card())
    assert "The clean images had no labels" in str(report.card())


def test_bfloat16_and_an_attention_of_its_own(tmp_path):
    suspect = save(classifier("vit"), tmp_path / "suspect", dtype=torch.bfloat16)
    original = read_json(suspect / "config.json")
    assert original["dtype"] == "bfloat16"
    edit_json(suspect / "config.json", attn_implementation="eager")
    before = {file.name: sha256(file) for file in suspect.iterdir()}
    report = run(suspect, tmp_path / "out", config={"stages": 1, "curve_steps": 1}, test=None)
    assert {file.name: sha256(file) for file in suspect.iterdir()} == before
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert report.purified["dtype"] == "bfloat16"
    assert read_json(tmp_path / "out" / "config.json") == original
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16


def test_from_the_hub(hub, purified, suspects, tmp_path):
    repo = "someone/digits-resnet"
    files = {file.name: file.read_bytes() for file in suspects["resnet"].iterdir()}
    sha = hub.commit(repo, files)
    hub.commit(repo, {**files, "README.md": b"# later"})
    config = {**CONFIG}
    report = purify(repo, CLEAN, tmp_path / "out", config=config, budget=BUDGET, revision=sha)
    assert (report.suspect["repo_id"], report.suspect["revision"]) == (repo, sha)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == repo
    assert f"`{repo}` at commit `{sha}`" in card.text
    assert same(weights(tmp_path / "out"), weights(purified["resnet"][0]))
    for place in (tmp_path, Path(os.environ["HF_HOME"])):
        assert files_naming(tmp_path / "out", str(place)) == []


def interrupt(monkeypatch, step):
    """Ctrl-C in optimisation step `step` (from 0), or when the result is being saved."""

    def stop(*args, real=TSCTrainer.training_step, **kwargs):
        if step == "saving" or args[0].state.global_step == step:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    if step == "saving":
        monkeypatch.setattr(import_module("hf_tsc.purify"), "_save_model", stop)
    else:
        monkeypatch.setattr(TSCTrainer, "training_step", stop)


@pytest.fixture(scope="module")
def left(suspects, tmp_path_factory):
    """The output folder of an interrupted run."""
    output = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(suspects["vit"], output)
    return output


class TestInterrupted:
    # Curves end at steps 3 and 6: in the middle of one, on the boundary, and after the last step.
    @pytest.mark.parametrize(
        ("family", "save_steps", "step", "checkpoint"),
        [("resnet", 2, 5, 4), ("vit", 2, 3, 2), ("vit", 3, 5, 3), ("resnet", 3, "saving", 6)],
    )
    def test_resumed(self, purified, suspects, tmp_path, monkeypatch, family, save_steps, step, checkpoint):
        output, options = tmp_path / "out", {"config": {"save_steps": save_steps}}
        with monkeypatch.context() as patch:
            interrupt(patch, step)
            with pytest.raises(KeyboardInterrupt):
                run(suspects[family], output, **options)
        assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
        assert (tmp_path / "out.work" / f"checkpoint-{checkpoint}").is_dir()
        steps = []

        def counted(trainer, *args, real=TSCTrainer.training_step, **kwargs):
            steps.append(trainer.state.global_step)
            return real(trainer, *args, **kwargs)

        monkeypatch.setattr(TSCTrainer, "training_step", counted)
        report = run(suspects[family], output, resume=True, **options)
        assert steps == list(range(checkpoint, 6))
        assert same(weights(output), weights(purified[family][0]))
        expected = purified[family][1]
        assert (report.curves, report.before, report.after) == (expected.curves, expected.before, expected.after)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_damaged_checkpoint_is_left_out(self, purified, suspects, tmp_path, monkeypatch, caplog):
        output, options = tmp_path / "out", {"config": {"save_steps": 1}}
        with monkeypatch.context() as patch:
            interrupt(patch, 4)
            with pytest.raises(KeyboardInterrupt):
                run(suspects["vit"], output, **options)
        with (tmp_path / "out.work" / "checkpoint-4" / "optimizer.pt").open("r+b") as file:
            file.truncate(100)
        run(suspects["vit"], output, resume=True, **options)
        assert "checkpoint-4 is left out: optimizer.pt is damaged" in caplog.text
        assert same(weights(output), weights(purified["vit"][0]))

    def test_seconds_before_the_interruption_count(self, suspects, tmp_path, monkeypatch):
        def slow(trainer, *args, real=TSCTrainer.training_step, **kwargs):
            if trainer.state.global_step == 4:
                raise KeyboardInterrupt
            trainer._since -= 1e6  # as if a step took that long
            return real(trainer, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(TSCTrainer, "training_step", slow)
            with pytest.raises(KeyboardInterrupt):
                run(suspects["vit"], tmp_path / "out")
        report = run(suspects["vit"], tmp_path / "out", resume=True)
        assert 1e6 < report.cost["seconds"] < 5e6

    def test_the_same_arguments_as_another_kind_of_sequence(self, suspects, tmp_path, monkeypatch):
        options = {"config": {"curve1_window": (0.5, 0.9)}}
        with monkeypatch.context() as patch:
            interrupt(patch, 4)
            with pytest.raises(KeyboardInterrupt):
                run(suspects["vit"], tmp_path / "out", **options)
        run(suspects["vit"], tmp_path / "out", resume=True, **options)

    def test_not_asked_to_resume(self, suspects, left):
        with pytest.raises(
            UsageError, match=r"out\.work is left from an interrupted run: go on with --resume, or rem"
        ):
            run(suspects["vit"], left)
        assert (left.with_name("out.work") / "checkpoint-2").is_dir()

    @pytest.mark.parametrize(
        ("options", "differing"),
        [
            ({"config": {"learning_rate": 0.5}}, "arguments"),
            ({"config": {"seed": 4}}, "images, arguments"),
            ({"budget": 60}, "images"),
            ({"data": digits(400, 501)}, "images, dataset"),
        ],
    )
    def test_other_arguments(self, suspects, left, options, differing):
        with pytest.raises(UsageError, match=f"from a run with other {differing}: give the same arguments"):
            run(suspects["vit"], left, resume=True, **options)
        assert (left.with_name("out.work") / "checkpoint-2").is_dir()

    def test_other_model(self, suspects, left):
        with pytest.raises(UsageError, match="from a run with other model"):
            run(suspects["resnet"], left, resume=True)

    def test_before_the_first_checkpoint(self, suspects, tmp_path, monkeypatch):
        interrupt(monkeypatch, 1)
        with pytest.raises(KeyboardInterrupt):
            run(suspects["vit"], tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", [None, ".request.json.tmp"])
    def test_killed_while_the_folder_was_made(self, suspects, tmp_path, name):
        (tmp_path / "out.work").mkdir()
        if name:
            (tmp_path / "out.work" / name).write_text("{")
        run(suspects["vit"], tmp_path / "out", resume=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("resume", [False, True])
    def test_a_folder_of_that_name_is_not_touched(self, suspects, tmp_path, resume):
        (tmp_path / "out.work").mkdir()
        (tmp_path / "out.work" / "precious").touch()
        with pytest.raises(UsageError, match="was not made for checkpoints"):
            run(suspects["vit"], tmp_path / "out", resume=resume)
        assert (tmp_path / "out.work" / "precious").exists()


class TestRefused:
    @pytest.fixture(autouse=True)
    def nothing_is_left(self, tmp_path):
        yield
        assert list(tmp_path.iterdir()) == []

    def test_accuracy_budget(self, suspects, tmp_path):
        config = {"max_accuracy_drop": 0.0, "stages": 1, "curve_steps": 2, "learning_rate": 1e-9, "save_steps": 1}
        with pytest.raises(AccuracyBudgetError, match=r"before, at best [\d.]+ % at t=0\.5; allow a larger drop"):
            run(suspects["resnet"], tmp_path / "out", config=config)

    def test_trigger_without_labels_to_measure_on(self, suspects, tmp_path):
        data = digits(400, 500, labelled=False)
        config = {"objective": "distillation"}
        with pytest.raises(UsageError, match="a trigger was given but no labelled images to measure it on"):
            run(suspects["vit"], tmp_path / "out", data=data, config=config, attack=ATTACK, test=None)

    def test_test_images_without_labels(self, suspects, tmp_path):
        with pytest.raises(UsageError, match="expected labelled images"):
            run(suspects["vit"], tmp_path / "out", test=digits(500, 560, labelled=False))

    def test_nothing_held_out(self, suspects, tmp_path):
        with pytest.raises(UsageError, match="to train on and none to measure on: raise the budget"):
            run(suspects["vit"], tmp_path / "out", held_out=0.0)

    def test_several_processes(self, suspects, tmp_path, monkeypatch):
        config = TSCConfig(output_dir=str(tmp_path), **CONFIG)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UsageError, match="WORLD_SIZE=2, but this process would train alone"):
            purify(str(suspects["vit"]), CLEAN, tmp_path / "out", config=config, budget=BUDGET)


def test_test_images_must_be_others(suspects, tmp_path):
    with pytest.raises(UsageError, match=r"measured on are those used to purify \(--test_split\): name another"):
        run(suspects["resnet"], tmp_path / "out", test=CLEAN)
    with pytest.raises(UsageError, match=r"of the 60 images of .* that are measured on were used to purify"):
        run(suspects["resnet"], tmp_path / "out", test=CLEAN.select(range(60)))
    assert list(tmp_path.iterdir()) == []


def test_a_copy_among_many_test_images_is_told(suspects, purified, tmp_path):
    """Data sets have copies of their own: the report says so."""
    used = purified["resnet"][1].dataset["train_indices"][:1]  # the same seed draws the same images
    test = concatenate_datasets([CLEAN.select(used), digits(500, 620)])
    report = run(suspects["resnet"], tmp_path / "out", test=test, config={"curve_steps": 1, "stages": 1})
    (note,) = (note for note in report.notes if "measured on" in note)
    assert note.startswith("1 of the 121 images of ")
    assert note in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("family", "errors", "warned"), [("resnet", "keep", False), ("vit", "drop", False), ("vit", "keep", True)]
)
def test_distilled_transformers_come_with_a_word_of_warning(suspects, tmp_path, family, errors, warned):
    config = {"objective": "distillation", "teacher_errors": errors}
    report = run(suspects[family], tmp_path / "out", config=config)
    assert (UNCORRECTED_TRANSFORMER in report.notes) == warned
    assert (UNCORRECTED_TRANSFORMER[:40] in str(report.card())) == warned


class TestLoss:
    @pytest.mark.parametrize(("before", "after", "noted"), [(0.98, 0.1, True), (0.9, 0.8, False), (0.5, 0.9, False)])
    def test_a_large_one_is_noted(self, before, after, noted):
        measures = [{"held_out": {"n": 30, "view_retrieval": value}} for value in (before, after)]
        notes = import_module("hf_tsc.purify").notes_on_loss(*measures, "view_retrieval")
        assert bool(notes) == noted
        if noted:
            assert "The view retrieval on the held-out images fell from 98.0 % to 10.0 %" in notes[0]

    def test_in_the_report(self, suspects, tmp_path, monkeypatch):
        monkeypatch.setattr(import_module("hf_tsc.purify"), "LARGE_LOSS", -1.0)
        report = run(suspects["resnet"], tmp_path / "out")
        assert "The accuracy on the held-out images fell from" in report.notes[-1]
        assert report.notes[-1] in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
