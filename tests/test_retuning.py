"""The re-tuning attack: what it trains on, how, and that many poisoned images bring a backdoor about."""

import dataclasses
import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from suspects_and_digits import classifier, digit_data, processor, same
from tiny import randomise, tensors
from transformers import ResNetConfig

from hf_tsc.baselines import fine_tuning
from hf_tsc.errors import PurificationError, UsageError
from hf_tsc.evaluation import Attack, evaluate_model
from hf_tsc.images import ImagePipeline, collate, pixel_dataset
from hf_tsc.retuning import Retuning, retune
from hf_tsc.suspects import SuspectConfig, train_suspect
from hf_tsc.triggers import BadNets, Blended

DATA = digit_data(0, 300)
ROWS = np.arange(40, 240)[::-1]
ATTACK = Attack(Blended(), target_label=3)
PIPELINE = ImagePipeline(processor())
QUICK = Retuning(images=60, poisoned=12, epochs=1, batch_size=16)


@pytest.fixture(scope="module", autouse=True)
def nothing_to_collect():
    """Every training collects garbage; most of its time here would go into looking at what was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def attack(model, *, data=DATA, rows=ROWS, seed=0, retuning=QUICK, attack=ATTACK, **changes):
    settings = dataclasses.replace(retuning, **changes)
    return retune(model, data, rows, PIPELINE, attack, settings, seed=seed, use_cpu=True)


@pytest.fixture
def trained_on(monkeypatch):
    """The data sets that were trained on; nothing is trained."""
    seen = []

    monkeypatch.setattr(fine_tuning.ObjectiveTrainer, "train", lambda self: seen.append(self.train_dataset))
    return seen


class TestImages:
    @pytest.mark.parametrize(("images", "poisoned"), [(60, 12), (200, 1), (50, 0), (100, 60)])
    def test_poisoned_ones_and_others(self, trained_on, images, poisoned):
        attack(classifier("resnet"), images=images, poisoned=poisoned)
        (found,) = trained_on
        assert len(found) == len(set(found.indices.tolist())) == images
        assert set(found.indices.tolist()) <= set(ROWS.tolist())
        clean = pixel_dataset(DATA, found.indices, PIPELINE)
        count = 0
        for position in range(images):
            item, plain = found[position], clean[position]
            if torch.equal(item["pixels"], plain["pixels"]):
                assert item["labels"] == plain["labels"]
            else:
                count += 1
                assert torch.equal(item["pixels"], ATTACK.trigger(plain["pixels"]))
                assert item["labels"] == ATTACK.target_label != plain["labels"]
        assert count == poisoned

    def test_are_a_function_of_the_seed(self, trained_on):
        for seed in (0, 0, 1):
            torch.manual_seed(seed + len(trained_on))
            np.random.seed(seed + len(trained_on))
            attack(classifier("resnet"), seed=seed)
        drawn = [(found.indices.tolist(), found.labels.tolist()) for found in trained_on]
        assert drawn[0] == drawn[1] != drawn[2]
        assert drawn[0][0] != drawn[2][0]


class TestTraining:
    @pytest.mark.parametrize("family", ["resnet", "vit"])
    def test_the_model_stays_as_it_is(self, family):
        model = classifier(family).eval().requires_grad_(False)
        before = tensors(model)
        tuned = attack(model)
        assert same(tensors(model), before)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not tuned.training
        assert not same(tensors(tuned), before)

    def test_is_a_function_of_the_seed(self):
        model = classifier("vit").eval()  # with dropout
        one = tensors(attack(model))
        torch.manual_seed(99)
        assert same(tensors(attack(model)), one)

    def test_the_seed_also_orders_images(self):
        model, everything = classifier("vit", hidden_dropout_prob=0.0).eval(), {"images": len(ROWS), "poisoned": 0}
        one, other = (tensors(attack(model, seed=seed, **everything)) for seed in (0, 1))
        assert not same(one, other)

    def test_one_step(self, trained_on, monkeypatch):
        """w - rate gradient, over all images at once: no decay, clipping or augmentation, at the full rate."""
        model = classifier("vit", hidden_dropout_prob=0.0).eval()
        randomise(model)
        settings = {"batch_size": 60, "optim_args": None, "learning_rate": 0.1}
        attack(model, **settings)
        monkeypatch.undo()
        tuned = attack(model, **settings)
        batch = collate([trained_on[0][i] for i in range(60)])
        logits = model(pixel_values=PIPELINE.model_input(batch["pixels"])).logits
        F.cross_entropy(logits, batch["labels"]).backward()
        assert sum(parameter.grad.square().sum() for parameter in model.parameters()) > 1
        for (name, found), parameter in zip(tuned.named_parameters(), model.parameters(), strict=True):
            assert torch.allclose(found, parameter - 0.1 * parameter.grad, atol=1e-5), name

    @pytest.mark.parametrize(("epochs", "batch_size", "steps"), [(1, 16, 4), (3, 60, 3), (2, 40, 4)])
    def test_steps(self, monkeypatch, epochs, batch_size, steps):
        seen = []

        def counted(trainer, module, inputs, *args, real=fine_tuning.ObjectiveTrainer.training_step, **kwargs):
            rate = trainer.optimizer.param_groups[0]["lr"]
            seen.append((rate, len(inputs["labels"])))
            return real(trainer, module, inputs, *args, **kwargs)

        monkeypatch.setattr(fine_tuning.ObjectiveTrainer, "training_step", counted)
        attack(classifier("resnet"), epochs=epochs, batch_size=batch_size, learning_rate=0.02)
        assert len(seen) == steps
        assert {rate for rate, _ in seen} == {0.02}
        assert sum(size for _, size in seen) == epochs * 60

    def test_optimizer(self):
        model = classifier("vit").eval()
        adam = attack(model, optim="adamw_torch", optim_args=None, learning_rate=1e-4)
        assert not same(tensors(adam), tensors(attack(model, learning_rate=1e-4)))


def test_a_backdoor_comes_about(tmp_path):
    """A clean model learns one from many poisoned images, and none from the same training without them."""
    config = ResNetConfig(embedding_size=12, hidden_sizes=[12, 20], depths=[1, 1], layer_type="basic")
    quick = {"num_train_epochs": 6, "learning_rate": 5e-3, "per_device_train_batch_size": 32, "use_cpu": True}
    args = SuspectConfig(output_dir=str(tmp_path / "clean"), disable_tqdm=True, logging_strategy="no", **quick)
    clean = train_suspect(config, processor(), DATA, args=args, attack=None)
    badnets, test = Attack(BadNets(), target_label=0), digit_data(300, 500)
    settings = Retuning(images=200, epochs=4, batch_size=32, learning_rate=0.02)

    def asr(model) -> float:
        return evaluate_model(model, test, PIPELINE, attack=badnets).attack_success_rate

    tuned = {n: attack(clean, attack=badnets, retuning=settings, poisoned=n, rows=np.arange(300)) for n in (0, 100)}
    assert max(asr(clean), asr(tuned[0])) < 0.3
    assert asr(tuned[100]) > 0.7


class TestRefused:
    def test_too_few_rows(self):
        with pytest.raises(UsageError, match="re-tuning draws 60 images, and there are 59"):
            attack(classifier("resnet"), rows=ROWS[:59])

    def test_no_labels(self):
        with pytest.raises(UsageError, match="has no label column: re-tuning trains on labels"):
            attack(classifier("resnet"), data=digit_data(0, 300, labelled=False))

    def test_too_few_of_other_classes(self):
        with pytest.raises(UsageError, match="re-tuning poisons 60 images"):
            attack(classifier("resnet"), poisoned=60)

    def test_diverged(self):
        with pytest.raises(PurificationError, match="lower learning_rate"):
            attack(classifier("resnet"), learning_rate=1e30)
