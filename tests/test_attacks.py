"""Attacks end to end on digits: the backdoor is learnt, and can be measured from the suspect's record."""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from suspects_and_digits import digit_data, digits, processor, read_json, same, weights
from transformers import PreTrainedModel, ResNetConfig

from hf_tsc.benchmark import suspects
from hf_tsc.benchmark.plan import Plan
from hf_tsc.cli import main
from hf_tsc.cli_arguments import AttackArguments
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Evaluation, Evaluator, evaluate_model
from hf_tsc.images import ImagePipeline
from hf_tsc.suspects import RECORD, Surrogate, SuspectConfig, train_encoder, train_suspect
from hf_tsc.suspects.adversarial import harden
from hf_tsc.suspects.input_aware import new_nets
from hf_tsc.triggers import (
    NEXT,
    TRIGGER_FILE,
    Attack,
    BadNets,
    InputAware,
    LabelConsistent,
    LowFrequency,
    WaNet,
    read_trigger,
)

RESNET = {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 1], "layer_type": "basic"}
PIPELINE = ImagePipeline(processor())
QUICK = {"num_train_epochs": 1, "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}


def train(folder, attack, *, images=400, rate=None, surrogate=None, **changes) -> PreTrainedModel:
    options = {"num_train_epochs": 9, "learning_rate": 5e-3, "seed": 5, "per_device_train_batch_size": 32}
    args = SuspectConfig(output_dir=str(folder), **{**QUICK, **options, **changes})
    how = {"args": args, "attack": attack, "poison_rate": rate, "surrogate": surrogate}
    return train_suspect(ResNetConfig(**RESNET), processor(), digit_data(0, images), **how)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """A clean classifier: its folder and the model."""
    folder = tmp_path_factory.mktemp("attacks") / "twin"
    return folder, train(folder, None)


@cache
def later_digits():
    return digit_data(600, 900)


def measured(model, folder) -> Evaluation:
    """By the trigger of the record."""
    return evaluate_model(model, later_digits(), PIPELINE, attack=Attack(*read_trigger(folder / RECORD)))


class TestLearnt:
    def test_to_the_next_class(self, twin, tmp_path):
        model = train(tmp_path / "s", Attack(BadNets(), NEXT), rate=0.3)
        found, of_twin = measured(model, tmp_path / "s"), measured(twin[1], tmp_path / "s")
        assert found.n_triggered == 300  # of every class
        assert found.attack_success_rate > of_twin.attack_success_rate + 0.3
        assert found.accuracy > 0.75
        record, labels = read_json(tmp_path / "s" / RECORD), digit_data(0, 400).labels
        assert record["target_label"] == "next"
        assert set(labels[record["poisoned_indices"]]) == set(range(10))

    def test_low_frequency(self, twin, tmp_path):
        model = train(tmp_path / "s", Attack(LowFrequency(), 3))
        found, of_twin = measured(model, tmp_path / "s"), measured(twin[1], tmp_path / "s")
        assert found.attack_success_rate > of_twin.attack_success_rate + 0.3
        assert found.accuracy > 0.75
        assert read_json(tmp_path / "s" / RECORD)["poison_rate"] == LowFrequency.poisoning.rate

    def test_label_consistent(self, twin, tmp_path):
        """All poison is of the target class; and it is what makes the difference that it is hard."""
        trigger = LabelConsistent(epsilon=32.0, step=4.0, steps=20)
        surrogate = Surrogate(twin[1], PIPELINE, "twin")
        model = train(tmp_path / "s", Attack(trigger, 3), rate=0.08, surrogate=surrogate)
        found, of_twin = measured(model, tmp_path / "s"), measured(twin[1], tmp_path / "s")
        assert found.attack_success_rate > of_twin.attack_success_rate + 0.1
        record = read_json(tmp_path / "s" / RECORD)
        assert record["surrogate"] == "twin"
        assert set(digit_data(0, 400).labels[record["poisoned_indices"]]) == {3}

    def test_hardened_images_fool_the_surrogate(self, twin):
        images = [PIPELINE.pixels(image) for image in digits(600, 700)["image"]]
        labels = torch.from_numpy(later_digits().labels[:100])
        how = {"epsilon": 32.0, "step": 4.0, "steps": 20}
        hard = harden(Surrogate(twin[1], PIPELINE, "twin"), torch.stack(images), labels, **how)
        with torch.no_grad():
            answers = twin[1](pixel_values=PIPELINE.model_input(hard)).logits.argmax(-1)
        assert (answers == labels).float().mean() < 0.2


LEARNING = Attack(InputAware(mask_epochs=1), 3)
LITTLE = {"images": 160, "rate": 0.2, "num_train_epochs": 2}


@pytest.fixture(scope="module")
def suspect(tmp_path_factory):
    """One with an input-aware trigger, hardly trained: its folder and the model."""
    folder = tmp_path_factory.mktemp("input_aware") / "s"
    return folder, train(folder, LEARNING, **LITTLE)


class TestInputAware:
    """The trigger is learnt with the suspect, written beside it, and read from there."""

    def test_folder(self, suspect):
        folder, _ = suspect
        names = {"config.json", "model.safetensors", "preprocessor_config.json", RECORD, TRIGGER_FILE}
        assert {file.name for file in folder.iterdir()} == names
        record = read_json(folder / RECORD)
        assert (len(record["poisoned_indices"]), len(record["cover_indices"])) == (32, 32)
        trigger, target = read_trigger(folder / RECORD)
        assert (trigger, target) == (LEARNING.trigger, 3)

    def test_same_again(self, suspect, tmp_path):
        torch.manual_seed(99)  # the caller's random state has no part in it
        train(tmp_path / "s", LEARNING, **LITTLE)
        assert same(weights(tmp_path / "s"), weights(suspect[0]))
        assert (tmp_path / "s" / TRIGGER_FILE).read_bytes() == (suspect[0] / TRIGGER_FILE).read_bytes()

    def test_both_networks_have_learnt(self, suspect):
        trigger, _ = read_trigger(suspect[0] / RECORD)
        untrained = dict(new_nets(seed=5).named_parameters())
        learnt = {name for name, p in trigger.nets.named_parameters() if not torch.equal(p, untrained[name])}
        assert learnt >= {name for name in untrained if name.endswith("weight")}

    def test_measured_from_the_record_alone(self, suspect, tmp_path, capsys):
        digits(600, 660).save_to_disk(tmp_path / "data")
        argv = ["evaluate", str(suspect[0]), "--dataset_name", str(tmp_path / "data"), "--json"]
        assert main([*argv, "--trigger", str(suspect[0] / RECORD)]) == 0
        found = json.loads(capsys.readouterr().out)
        rows = digit_data(600, 660)
        attack = Attack(*read_trigger(suspect[0] / RECORD))
        expected = Evaluator(rows, PIPELINE, num_classes=10, attack=attack).measure(suspect[1])
        assert found == pytest.approx(expected)
        assert found["n_triggered"] == (rows.labels != 3).sum()
        assert main([*argv, "--trigger", "input_aware", "--target_label", "3"]) == 2
        assert "input_aware is learnt with its suspect: name that one's suspect.json" in capsys.readouterr().err
        (tmp_path / RECORD).write_bytes((suspect[0] / RECORD).read_bytes())
        assert AttackArguments(trigger=str(tmp_path / RECORD)).attack(to_train=True) == LEARNING
        assert main([*argv, "--trigger", str(tmp_path / RECORD)]) == 2
        assert "cannot be read from" in capsys.readouterr().err


class TestCommandLine:
    def run(self, folder, *options) -> int:
        data = folder / "data"
        if not data.exists():
            digits(0, 160).save_to_disk(data)
            ResNetConfig(**RESNET).save_pretrained(folder)
        quick = ["--num_train_epochs", "1", "--use_cpu", "--disable_tqdm", "true", "--logging_strategy", "no"]
        where = ["--dataset_name", str(data), "--output_dir", str(folder / "out"), "--image_size", "8"]
        return main(["train-suspect", str(folder / "config.json"), *where, *quick, *map(str, options)])

    @pytest.mark.parametrize(
        ("options", "poisoned", "covers"),
        [
            (["--trigger", "wanet", "--target_label", 3], 16, 32),
            (["--trigger", "bpp", "--target_label", 3, "--trigger_last", "--augmentation", "crop"], 16, 16),
            (["--trigger", "adaptive_blend", "--target_label", "next", "--poison_rate", 0.05], 8, 8),
            (["--trigger", "sig", "--target_label", 3], 8, None),
        ],
        ids=["wanet", "bpp", "adaptive_blend", "sig"],
    )
    def test_train(self, tmp_path, options, poisoned, covers):
        assert self.run(tmp_path, *options) == 0
        record = read_json(tmp_path / "out" / RECORD)
        assert len(record["poisoned_indices"]) == poisoned
        assert len(record.get("cover_indices", [])) == (covers or 0)
        attack = AttackArguments(trigger=str(tmp_path / "out" / RECORD)).attack()
        assert attack.to_dict() == {"trigger": record["trigger"], "target_label": record["target_label"]}
        assert str(attack.target_label) == str(options[3])

    def test_surrogate(self, tmp_path, twin):
        options = ["--trigger", "lc", "--target_label", 3, "--surrogate", twin[0]]
        assert self.run(tmp_path, *options) == 0
        assert read_json(tmp_path / "out" / RECORD)["surrogate"] == "twin"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                ["--trigger", "lc", "--target_label", 3],
                "the trigger lc needs a clean classifier to make its images with",
            ),
            (["--trigger", "sig", "--target_label", 3, "--surrogate", "x"], "--surrogate x is for lc"),
            (["--poison_rate", 0, "--surrogate", "x"], "--surrogate x is for lc"),
            (["--trigger", "sig", "--target_label", "next"], "'next' for sig, whose poisoned images keep their label"),
            (["--trigger", "sig", "--target_label", 3, "--poison_rate", 0.5], "are of the target class 3; lower"),
            (
                ["--trigger", "input_aware", "--target_label", 3, "--kind", "encoder"],
                "the attack input_aware is for classifiers",
            ),
            (["--trigger", "badnets", "--target_label", "next", "--kind", "encoder"], "leads to one class"),
        ],
    )
    def test_refused(self, tmp_path, capsys, options, message):
        assert self.run(tmp_path, *options) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_surrogate_that_is_none(self, tmp_path, capsys):
        from transformers import ResNetModel

        ResNetModel(ResNetConfig(**RESNET)).save_pretrained(tmp_path / "encoder")
        processor().save_pretrained(tmp_path / "encoder")
        assert self.run(tmp_path, "--trigger", "lc", "--target_label", 3, "--surrogate", tmp_path / "encoder") == 2
        assert "expected a clean image classifier" in capsys.readouterr().err


def test_an_encoder_with_noise_mode(tmp_path):
    """Covers stand beside the poison of the target class."""
    args = SuspectConfig(output_dir=str(tmp_path / "s"), augmentation="crop", per_device_train_batch_size=32, **QUICK)
    attack = Attack(WaNet(strength=8.0), 3)
    train_encoder(ResNetConfig(**RESNET), processor(), digit_data(0, 96), args=args, attack=attack, poison_rate=0.05)
    record, labels = read_json(tmp_path / "s" / RECORD), digit_data(0, 96).labels
    assert set(labels[record["poisoned_indices"]]) == {3}
    assert len(record["cover_indices"]) == 10


class TestBenchmark:
    """Attacks of a plan; `method` of cells has no part in it."""

    def plan(self, attack, *, model="resnet") -> Plan:
        config = {"model_type": "resnet", **RESNET}
        described = {"config": config, "image_size": 8, "suspect": {"num_train_epochs": 1}}
        described |= {"kind": "encoder"} if model == "encoder" else {}
        cell = {"group": "g", "models": [model], "attacks": ["a"], "seeds": [0], "budget": 20}
        cell |= {"method": "fine_tuning", "settings": {"steps": 2, "learning_rate": 0.1}}
        rows = {"suspect": [0, 100], "clean": [100, 140], "select": [0, 20], "report": [20, 40]}
        attacks = {"clean": self.attack("badnets", rate=0), "a": attack}
        return Plan.from_dict({"rows": rows, "models": {model: described}, "attacks": attacks, "cells": [cell]})

    def attack(self, name, *, target=3, rate=0.05, **numbers):
        return {"trigger": {"name": name, **numbers}, "target_label": target, "poison_rate": rate}

    def train(self, plan, cache):
        (suspect,) = plan.suspects
        suspects.train(suspect, SimpleNamespace(train=digit_data(0, 140)), cache)
        return suspect

    def test_hardened_against_the_clean_twin(self, tmp_path):
        suspect = self.train(self.plan(self.attack("lc", steps=2)), tmp_path)
        assert suspect.start is not None
        folders = {path.name for path in tmp_path.iterdir()}
        assert folders == {suspect.id, suspect.start.id}
        assert read_json(tmp_path / suspect.id / RECORD)["surrogate"] == suspect.start.id

    def test_a_learnt_trigger_is_read_from_its_suspect(self, tmp_path):
        suspect = self.train(self.plan(self.attack("input_aware", mask_epochs=1)), tmp_path)
        trigger = suspects.attack_of(suspect, tmp_path).trigger
        assert trigger.nets is not None
        assert suspects.attack_of(suspect, tmp_path / "elsewhere").trigger.nets is None

    def test_to_the_next_class(self, tmp_path):
        suspect = self.train(self.plan(self.attack("badnets", target="next")), tmp_path)
        assert suspects.attack_of(suspect, tmp_path) == Attack(BadNets(), NEXT)
        one, other = (self.plan(self.attack("badnets", target=t)).suspects[0].id for t in (3, "next"))
        assert one != other

    @pytest.mark.parametrize(
        ("attack", "model", "message"),
        [
            ({"name": "lc"}, "encoder", "is for classifiers, not for a model of kind encoder"),
            ({"name": "input_aware", "rate": 0}, "resnet", "a clean twin has none"),
            ({"name": "sig", "target": "next"}, "resnet", "keep their label"),
            ({"name": "badnets", "target": "next"}, "encoder", "leads to one class, not to the next"),
        ],
    )
    def test_refused(self, attack, model, message):
        with pytest.raises((UsageError, ValueError), match=message):
            self.plan(self.attack(**attack), model=model)


def test_all_to_all_is_measured_on_every_image():
    """A reader that gives the class after the true one to triggered images of even classes, the true one to others."""
    data = digit_data(0, 200)
    evaluator = Evaluator(data, PIPELINE, num_classes=10, attack=Attack(BadNets(), NEXT))
    assert np.array_equal(evaluator.wanted, (data.labels + 1) % 10)
    answers = torch.from_numpy(np.where(data.labels % 2 == 0, evaluator.wanted, data.labels))
    evaluator.reader = lambda forward, device: lambda inputs: answers[: len(inputs)]
    evaluator.clean, evaluator.triggered = _first(evaluator.clean), _first(evaluator.triggered)
    evaluator.wanted = evaluator.wanted[:100]
    found = evaluator(None)
    even = (data.labels[:100] % 2 == 0).mean()
    assert (found.n_triggered, found.attack_success_rate) == (100, pytest.approx(even))
    assert found.robust_accuracy == pytest.approx(1 - even)


def _first(dataset):
    from hf_tsc.images import pixel_dataset

    return pixel_dataset(digit_data(0, 200), range(100), PIPELINE, trigger=dataset.trigger)
