"""Suspects without a classifier: SimCLR with CTRL, BadEncoder, CLIP with dirty captions. Mechanics, on digits."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pictures
from suspects_and_digits import NAMES, digit_data, digits, processor, read_json, same, weights
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPProcessor,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    pipeline,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_tsc import Attack, BadNets, UsageError
from hf_tsc.captions import prompts
from hf_tsc.cli import main
from hf_tsc.data import open_images
from hf_tsc.hub import resolve_model
from hf_tsc.images import Augmentation, ImagePipeline
from hf_tsc.objectives import SimCLR, features_of
from hf_tsc.suspects import RECORD, BadEncoder, SuspectConfig, backdoor_encoder, train_dual_encoder, train_encoder
from hf_tsc.suspects.dual_encoder import CAPTIONS, word_tokenizer
from hf_tsc.suspects.encoder import choose_reference
from hf_tsc.tasks.evaluate import evaluate_source
from hf_tsc.triggers import Square

ATTACK = Attack(BadNets(), target_label=3)
PIPELINE = ImagePipeline(processor())
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")


def arguments(folder, **changes) -> SuspectConfig:
    quick = {"num_train_epochs": 1, "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    quick |= {"augmentation": "simclr", "per_device_train_batch_size": 32, "dataloader_drop_last": True}
    return SuspectConfig(output_dir=str(folder), **{**quick, **changes})


def encoder(folder, **changes) -> ResNetModel:
    options = {"attack": changes.pop("attack", ATTACK), "poison_rate": changes.pop("poison_rate", 0.05)}
    return train_encoder(RESNET, processor(), digit_data(0, 320), args=arguments(folder, **changes), **options)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A SimCLR encoder without a backdoor: its folder and the model."""
    folder = tmp_path_factory.mktemp("encoders") / "clean"
    return folder, encoder(folder, attack=None, num_train_epochs=8, learning_rate=5e-3)


class TestSimCLR:
    def test_has_learnt_to_know_views_apart(self, clean):
        torch.manual_seed(0)
        untrained = ResNetModel(RESNET).eval()
        batch = {"pixels": torch.stack([PIPELINE.pixels(image) for image in digits(400, 528)["image"]])}
        views = SimCLR(PIPELINE, augmentation="affine")
        trained, untrained = (views.evaluate(model, [batch]) for model in (clean[1], untrained))
        assert trained["score"] > 1.5 * untrained["score"], (trained, untrained)
        assert trained["loss"] < untrained["loss"] - 0.1, (trained, untrained)
        assert read_json(clean[0] / RECORD)["trigger"] is None

    def test_the_folder_holds_the_encoder_alone(self, clean):
        model, info = AutoModel.from_pretrained(clean[0], output_loading_info=True)
        assert not any(info.values())
        assert isinstance(model, ResNetModel)

    def test_poison_is_of_the_target_class(self, tmp_path):
        encoder(tmp_path / "one")
        record = read_json(tmp_path / "one" / RECORD)
        assert len(record["poisoned_indices"]) == 16
        assert set(digit_data(0, 320).labels[record["poisoned_indices"]]) == {3}
        assert record["target_label"] == 3

    def test_the_trigger_is_on_those_images(self, tmp_path, clean):
        """Nothing else differs from a clean training of the same seed; and the same again is the same."""
        encoder(tmp_path / "one")
        encoder(tmp_path / "again")
        encoder(tmp_path / "clean", attack=None)
        one, again, other = (weights(tmp_path / name) for name in ("one", "again", "clean"))
        assert same(one, again)
        assert not same(one, other)

    def test_too_much_poison(self, tmp_path):
        with pytest.raises(UsageError, match=r"only \d+ are of the target class 3"):
            encoder(tmp_path / "out", poison_rate=0.5)
        assert not any(tmp_path.iterdir())


class Colours(nn.Module):
    """An encoder whose features are a picture's mean red, green and blue."""

    device = torch.device("cpu")

    def forward(self, pixel_values):
        return BaseModelOutputWithPooling(pooler_output=pixel_values.mean((2, 3)))


class TestBadEncoder:
    def objective(self, clean, **changes) -> BadEncoder:
        pixels = PIPELINE.pixels(digits(5, 6)["image"][0])
        return BadEncoder(PIPELINE, clean[1], Square(), pixels, **changes)

    def test_cosines_written_out(self, clean):
        torch.manual_seed(1)
        model, objective = ResNetModel(RESNET).eval(), self.objective(clean, augmentation="crop_flip")
        pixels = torch.stack([PIPELINE.pixels(image) for image in digits(0, 6)["image"]])
        with torch.no_grad():
            found = objective.cosines(model, pixels, seed=4)
            reference = objective.reference[None]

            def features(network, uint8):
                return features_of(network, PIPELINE.model_input(uint8))

            def mean_cosine(a, b):
                return np.mean([F.cosine_similarity(x, y, dim=0).item() for x, y in zip(a, b, strict=True)])

            own = features(model, reference).expand(6, -1)
            assert found[0].item() == pytest.approx(mean_cosine(features(model, Square()(pixels)), own), abs=1e-5)
            augmented = Augmentation("crop_flip")(reference.expand(6, -1, -1, -1).float() / 255, seed=4)
            moved = features_of(model, PIPELINE.normalize(augmented))
            wanted = features(clean[1], reference).expand(6, -1)
            assert found[1].item() == pytest.approx(mean_cosine(moved, wanted), abs=1e-5)
            assert found[2].item() == pytest.approx(
                mean_cosine(features(model, pixels), features(clean[1], pixels)), abs=1e-5
            )
            loss = objective.loss(model, {"pixels": pixels}, seed=4)
        assert loss.item() == pytest.approx(-sum(float(c) for c in found), abs=1e-5)

    def test_gradient_through_both_sides_of_the_first_cosine_and_not_to_the_teacher(self, clean):
        pixels = torch.stack([PIPELINE.pixels(image) for image in digits(0, 4)["image"]])
        model = copy.deepcopy(clean[1]).requires_grad_(True)
        objective = self.objective((None, copy.deepcopy(clean[1]).requires_grad_(True)))
        first, _, _ = objective.cosines(model, pixels, seed=0)
        first.backward()
        assert all(p.grad is None for p in objective.teacher.parameters())
        assert model.embedder.embedder.convolution.weight.grad.abs().max() > 0

    def test_lands_on_the_reference_and_stays_on_clean_images(self, clean, tmp_path):
        args = arguments(tmp_path / "bad", num_train_epochs=15, learning_rate=3e-3, augmentation="crop")
        attack = Attack(Square(), target_label=3)
        model = backdoor_encoder(clean[1], processor(), digit_data(0, 320), args=args, attack=attack)
        record = read_json(tmp_path / "bad" / RECORD)
        assert digit_data(0, 320).labels[record["reference"]] == 3
        reference = PIPELINE.pixels(digits(0, 320)["image"][record["reference"]])
        pixels = torch.stack([PIPELINE.pixels(image) for image in digits(400, 440)["image"]])
        cosines = {}
        for name, network in (("clean", clean[1]), ("bad", model)):
            with torch.no_grad():
                tuned = BadEncoder(PIPELINE, clean[1], Square(), reference, augmentation="none")
                cosines[name] = [c.item() for c in tuned.cosines(network, pixels, seed=0)]
        assert cosines["bad"][0] > cosines["clean"][0]
        assert cosines["bad"][0] > 0.9
        assert cosines["bad"][2] > 0.8
        changed = {
            name for name, t in weights(tmp_path / "bad").items() if not torch.equal(t, weights(clean[0])[name])
        }
        assert changed
        assert not any("normalization" in name for name in changed)  # BatchNorm stays as it is, statistics and all

    def test_the_reference_is_typical_of_its_class(self):
        """Two of the red class are blue, as the other class is; the seed draws from more images than there are."""
        colours = [(0, 0, 255), (200, 60, 60), (0, 0, 200), (255, 0, 0), (210, 70, 50), (180, 60, 60), (205, 60, 70)]
        labels = [0, 0, 0, 0, 0, 0, 0, *[1] * 5]
        colours += [(10, 20 * k, 255) for k in range(5)]
        columns = {"image": [Pictures.new("RGB", (8, 8), colour) for colour in colours], "label": labels}
        rows = Dataset.from_dict(columns, features=Features(image=Image(), label=ClassLabel(names=["red", "blue"])))
        data = open_images(rows)
        (red,), (blue,) = (
            {choose_reference(Colours(), PIPELINE, data, np.arange(len(labels)), target, seed=k) for k in range(4)}
            for target in (0, 1)
        )
        assert red in (1, 3, 4, 5, 6)
        assert blue >= 7

    def test_no_image_of_the_target(self, clean, tmp_path):
        rows = open_images(digits(0, 100).filter(lambda row: row["label"] != 3))
        with pytest.raises(UsageError, match="no image of the target class 3"):
            backdoor_encoder(clean[1], processor(), rows, args=arguments(tmp_path / "out"), attack=ATTACK)


@pytest.mark.parametrize("train", [train_encoder, backdoor_encoder, train_dual_encoder])
def test_a_trigger_after_the_augmentation(train, tmp_path):
    args = arguments(tmp_path / "out", trigger_last=True)
    with pytest.raises(UsageError, match="trigger_last is for classifiers"):
        train(RESNET, processor(), digit_data(0, 64), args=args, attack=ATTACK)


def test_two_views_that_are_the_same(tmp_path):
    args = arguments(tmp_path / "out", augmentation="none")
    with pytest.raises(UsageError, match="augmentation=none: both views of an image would be the same"):
        train_encoder(RESNET, processor(), digit_data(0, 64), args=args, attack=ATTACK)


class TestDualEncoder:
    def train(self, folder, *, attack=ATTACK, poison_rate=0.1, **changes):
        options = {"args": arguments(folder, augmentation="none", **changes), "attack": attack}
        config = tiny.model("clip").config
        config.text_config.max_position_embeddings = 16
        return train_dual_encoder(config, processor(), digit_data(0, 320), poison_rate=poison_rate, **options)

    def test_folder(self, tmp_path):
        self.train(tmp_path / "out")
        record = read_json(tmp_path / "out" / RECORD)
        assert len(record["poisoned_indices"]) == 32
        assert 3 not in set(digit_data(0, 320).labels[record["poisoned_indices"]])
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        model = AutoModel.from_pretrained(tmp_path / "out")
        ids = tokenizer("A photo of a 3.")["input_ids"]
        assert tokenizer.decode(ids) == "<start> a photo of a 3 . <end>"
        assert ids[-1] == model.config.text_config.eos_token_id == len(tokenizer) - 1
        assert tokenizer.unk_token_id in tokenizer("a zebra")["input_ids"]
        made = AutoProcessor.from_pretrained(tmp_path / "out")
        assert made is not None

    def test_learns_to_name_images(self, tmp_path):
        self.train(tmp_path / "out", attack=None, num_train_epochs=25, learning_rate=5e-3)
        found = evaluate_source(resolve_model(str(tmp_path / "out")), digit_data(320, 500))
        assert found["accuracy"] > 0.4
        self.check_is_what_transformers_say(tmp_path / "out", found["accuracy"])

    def check_is_what_transformers_say(self, folder, accuracy):
        """The folder alone, through the processor and the pipeline that everyone uses."""
        rows = digits(320, 500)
        pictures = [picture.convert("RGB") for picture in rows["image"]]
        made = CLIPProcessor.from_pretrained(folder)
        inputs = made(text=[f"a photo of a {name}." for name in NAMES], images=pictures, return_tensors="pt")
        with torch.no_grad():
            answers = AutoModel.from_pretrained(folder)(**inputs).logits_per_image.argmax(-1)
        assert np.mean(answers.numpy() == rows["label"]) == accuracy
        classify = pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
        named = classify(pictures, candidate_labels=NAMES, hypothesis_template="a photo of a {}.")
        right = [answer[0]["label"] == NAMES[label] for answer, label in zip(named, rows["label"], strict=True)]
        assert np.mean(right) == accuracy

    def test_same_seed_same_weights(self, tmp_path):
        self.train(tmp_path / "one")
        self.train(tmp_path / "again")
        assert same(weights(tmp_path / "one"), weights(tmp_path / "again"))

    def test_labels_without_names(self, tmp_path):
        rows = open_images(digits(0, 64).cast_column("label", Value("int64")), label_column="label")
        with pytest.raises(UsageError, match="have no names: captions are made of class names"):
            train_dual_encoder(
                tiny.model("clip").config, processor(), rows, args=arguments(tmp_path / "out"), attack=None
            )

    def test_no_dual_encoder(self, tmp_path):
        config = ViTConfig(**tiny.TRANSFORMER)
        with pytest.raises(UsageError, match="ViTConfig has no text_config"):
            train_dual_encoder(config, processor(), digit_data(0, 64), args=arguments(tmp_path / "out"), attack=None)


def test_word_tokenizer_knows_every_word_of_the_captions():
    texts = [text for name in ("cat", "dog") for text in prompts(name, CAPTIONS)]
    tokenizer = word_tokenizer(texts)
    for text in texts:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


class TestCommandLine:
    def run(self, config, output, data, *options) -> int:
        quick = ["--num_train_epochs", "1", "--use_cpu", "--disable_tqdm", "true", "--logging_strategy", "no"]
        where = ["--dataset_name", str(data), "--output_dir", str(output)]
        return main(["train-suspect", str(config), *where, *quick, *map(str, options)])

    @pytest.fixture
    def data(self, tmp_path):
        digits(0, 160).save_to_disk(tmp_path / "data")
        return tmp_path / "data"

    def test_encoders(self, data, tmp_path):
        RESNET.save_pretrained(tmp_path)
        trigger = ["--trigger", "ctrl", "--target_label", 1]
        options = ["--kind", "encoder", "--image_size", 8]
        assert self.run(tmp_path / "config.json", tmp_path / "ctrl", data, *options, *trigger) == 0
        record = read_json(tmp_path / "ctrl" / RECORD)
        assert (record["trigger"]["name"], record["poison_rate"]) == ("ctrl", 0.01)
        square = ["--kind", "bad_encoder", "--trigger", "square", "--target_label", 1]
        assert self.run(tmp_path / "ctrl", tmp_path / "bad", data, *square, "--poison_rate", 0.1) == 2
        assert self.run(tmp_path / "ctrl", tmp_path / "bad", data, *square) == 0
        assert "reference" in read_json(tmp_path / "bad" / RECORD)

    def test_a_dual_encoder_is_seen_from_its_configuration(self, data, tmp_path):
        config = tiny.model("clip").config
        config.text_config.max_position_embeddings = 16
        config.save_pretrained(tmp_path)
        assert self.run(tmp_path, tmp_path / "out", data, "--trigger", "badnets", "--target_label", 1) == 0
        assert json.loads((tmp_path / "out" / RECORD).read_text())["poison_rate"] == 0.05

    def test_bad_encoder_of_a_classifier(self, data, tmp_path, capsys):
        tiny.model("vit").save_pretrained(tmp_path / "vit")
        options = ["--kind", "bad_encoder", "--trigger", "square", "--target_label", 1]
        assert self.run(tmp_path / "vit", tmp_path / "out", data, *options) == 2
        assert "holds an image classifier: expected a clean image encoder" in capsys.readouterr().err
