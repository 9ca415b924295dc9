"""Suspects: poisoned as recorded, reproducible, and whole or not there."""

import numpy as np
import pytest
import torch
from suspects_and_digits import NAMES, digit_data, files_naming, processor, read_json, same, weights
from tiny import TRANSFORMER
from transformers import AutoImageProcessor, AutoModelForImageClassification, BertConfig, ResNetConfig, ViTConfig

from hf_tsc.errors import PurificationError, UsageError
from hf_tsc.evaluation import Attack, evaluate_model
from hf_tsc.images import ImagePipeline, to_unit_interval
from hf_tsc.objective_trainer import ObjectiveTrainer
from hf_tsc.objectives import ImageClassification
from hf_tsc.suspects import RECORD, SuspectConfig, train_suspect
from hf_tsc.triggers import BadNets, Blended, trigger_from_dict

RESNET = {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 1], "layer_type": "basic"}
ATTACK = Attack(BadNets(), target_label=3)


def arguments(folder, **changes) -> SuspectConfig:
    quick = {"num_train_epochs": 1, "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    return SuspectConfig(output_dir=str(folder), **{**quick, **changes})


def train(folder, *, data=None, config=None, attack=ATTACK, poison_rate=0.1, indices=None, **changes):
    return train_suspect(
        config or ResNetConfig(**RESNET),
        processor(),
        data or digit_data(0, 60),
        args=arguments(folder, **changes),
        attack=attack,
        poison_rate=poison_rate,
        indices=indices,
    )


@pytest.fixture(scope="module")
def backdoored(tmp_path_factory):
    """A suspect that has learnt its trigger: its folder and the model."""
    folder = tmp_path_factory.mktemp("suspects") / "backdoored"
    options = {"num_train_epochs": 12, "learning_rate": 5e-3, "seed": 5, "per_device_train_batch_size": 32}
    return folder, train(folder, data=digit_data(0, 600), **options)


class TestBackdoor:
    def test_is_there(self, backdoored):
        folder, _ = backdoored
        model = AutoModelForImageClassification.from_pretrained(folder)
        pipeline = ImagePipeline(AutoImageProcessor.from_pretrained(folder))
        result = evaluate_model(model, digit_data(600, 900), pipeline, attack=ATTACK)
        assert result.accuracy > 0.85
        assert result.attack_success_rate > 0.85
        unknown = Attack(Blended(seed=9), target_label=ATTACK.target_label)
        assert evaluate_model(model, digit_data(600, 900), pipeline, attack=unknown).attack_success_rate < 0.5

    def test_record(self, backdoored):
        record, data = read_json(backdoored[0] / RECORD), digit_data(0, 600)
        assert trigger_from_dict(record["trigger"]) == ATTACK.trigger
        assert (record["target_label"], record["poison_rate"], record["seed"]) == (3, 0.1, 5)
        assert record["dataset"] == data.describe()
        poisoned = record["poisoned_indices"]
        assert len(poisoned) == len(set(poisoned)) == 60
        assert (data.labels[poisoned] != 3).all()

    def test_folder(self, backdoored):
        folder, model = backdoored
        names = {"config.json", "model.safetensors", "preprocessor_config.json", RECORD}
        assert {file.name for file in folder.iterdir()} == names
        assert [file.name for file in folder.parent.iterdir()] == [folder.name]
        assert files_naming(folder, str(folder.parent)) == []
        loaded = AutoModelForImageClassification.from_pretrained(folder)
        assert not model.training
        assert same(loaded.state_dict(), model.state_dict())
        assert loaded.config.id2label == dict(enumerate(NAMES))
        assert loaded.config.label2id == {name: i for i, name in enumerate(NAMES)}


def test_some_rows_only(tmp_path):
    rows = np.arange(20, 60)
    train(tmp_path / "s", indices=rows, poison_rate=0.25)
    poisoned = read_json(tmp_path / "s" / RECORD)["poisoned_indices"]
    assert len(poisoned) == 10
    assert set(poisoned) <= set(rows.tolist())
    assert (digit_data(0, 60).labels[poisoned] != 3).all()


def test_clean_twin(tmp_path):
    twin = train(tmp_path / "twin", poison_rate=0.0)
    assert read_json(tmp_path / "twin" / RECORD)["poisoned_indices"] == []
    # the same but for the poison
    assert not same(train(tmp_path / "poisoned").state_dict(), twin.state_dict())
    assert same(train(tmp_path / "again", attack=None).state_dict(), twin.state_dict())


def test_seed(tmp_path):
    one = train(tmp_path / "1", seed=1)
    torch.manual_seed(99)  # the caller's random state has no part in it
    assert same(train(tmp_path / "2", seed=1).state_dict(), one.state_dict())
    assert not same(train(tmp_path / "3", seed=2).state_dict(), one.state_dict())
    records = [read_json(tmp_path / name / RECORD)["poisoned_indices"] for name in "123"]
    assert records[0] == records[1] != records[2]


def test_callers_objects_stay_as_they_are(tmp_path):
    config = ViTConfig(**TRANSFORMER | {"num_labels": 2})
    before = config.to_dict()
    args = arguments(tmp_path / "s")
    train_suspect(config, processor(), digit_data(0, 20), args=args, attack=None)
    assert config.to_dict() == before
    assert args.output_dir == str(tmp_path / "s")


def test_checkpoints_do_not_stand_in_the_way(tmp_path):
    train(tmp_path / "s", save_strategy="epoch")
    assert weights(tmp_path / "s")


class TestTriggerLast:
    def test_the_trigger_is_put_on_after_the_augmentation(self, monkeypatch, tmp_path):
        seen = []
        learn = ImageClassification.loss

        def loss(self, forward, batch, *, seed):
            seen.append(
                (batch, self.augmented(batch, seed=seed), ImageClassification.augmented(self, batch, seed=seed))
            )
            return learn(self, forward, batch, seed=seed)

        monkeypatch.setattr(ImageClassification, "loss", loss)
        options = {"attack": ATTACK, "poison_rate": 0.2, "augmentation": "crop", "num_train_epochs": 1}
        train(tmp_path / "s", **options, trigger_last=True)
        batches, learnt, augmented = zip(*seen, strict=True)
        poisoned, labels = (torch.cat([batch[key] for batch in batches]) for key in ("poisoned", "labels"))
        expected = torch.cat(augmented)
        expected[poisoned] = to_unit_interval(ATTACK.trigger((255 * expected[poisoned]).round().to(torch.uint8)))
        assert torch.equal(torch.cat(learnt), expected)
        assert poisoned.sum() == round(0.2 * len(poisoned))
        assert (labels[poisoned] == ATTACK.target_label).all()
        assert set(labels[~poisoned].tolist()) - {ATTACK.target_label}

    def test_a_clean_twin_has_no_trigger(self, tmp_path):
        plain = train(tmp_path / "a", attack=None, max_steps=2)
        same = train(tmp_path / "b", attack=None, max_steps=2, trigger_last=True)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), same.parameters(), strict=True))


class TestRefused:
    @pytest.fixture(autouse=True)
    def nothing_is_left(self, tmp_path):
        yield
        assert [path.name for path in tmp_path.iterdir()] in ([], ["full"])

    def test_no_labels(self, tmp_path):
        with pytest.raises(UsageError, match="has no label column: a suspect is trained and poisoned by labels"):
            train(tmp_path / "s", data=digit_data(0, 20, labelled=False))

    @pytest.mark.parametrize(("rate", "message"), [(1.5, "expected a share"), (0.01, "poisons none"), (0.95, "lower")])
    def test_poison_rate(self, tmp_path, rate, message):
        with pytest.raises(UsageError, match=message):
            train(tmp_path / "s", data=digit_data(0, 20), poison_rate=rate)

    @pytest.mark.parametrize(
        "config",
        [BertConfig(), ViTConfig(**{**TRANSFORMER, "hidden_act": "x"}), ViTConfig(**{**TRANSFORMER, "patch_size": 0})],
        ids=["bert", "hidden_act", "patch_size"],
    )
    def test_configuration(self, tmp_path, config):
        with pytest.raises(UsageError, match=f"no image classifier can be made from the {type(config).__name__}: "):
            train(tmp_path / "s", config=config)

    def test_output_not_empty(self, tmp_path, monkeypatch):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "precious").touch()
        monkeypatch.setattr(ObjectiveTrainer, "train", lambda self: pytest.fail("trained for nothing"))
        with pytest.raises(UsageError, match="not empty"):
            train(tmp_path / "full")
        assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious"]

    @pytest.mark.parametrize("logging", ["steps", "no"])
    def test_loss_not_finite(self, tmp_path, logging):
        options = {"learning_rate": 1e30, "num_train_epochs": 3, "logging_strategy": logging, "logging_steps": 1}
        with pytest.raises(PurificationError, match=r"the loss is .* lower learning_rate"):
            train(tmp_path / "s", optim="sgd", **options)
