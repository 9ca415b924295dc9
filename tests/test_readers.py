"""Classes read off encoders and dual encoders, against scikit-learn and the models' own similarities."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from sklearn.linear_model import LogisticRegression
from transformers import ResNetModel

from hf_tsc.data import open_images
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Attack, Evaluator, map_batches
from hf_tsc.images import ImagePipeline
from hf_tsc.objectives import Captions, features_of
from hf_tsc.readers import LinearProbe, ZeroShot, image_embeddings
from hf_tsc.triggers import BadNets

PIPELINE = ImagePipeline(tiny.processor())


def encoder() -> ResNetModel:
    torch.manual_seed(0)
    return ResNetModel(tiny.model("resnet").config).eval()


def features(model, dataset) -> np.ndarray:
    with torch.no_grad():
        return torch.cat(
            [features_of(model, PIPELINE.model_input(dataset[i]["pixels"][None])) for i in range(len(dataset))]
        ).numpy()


class TestLinearProbe:
    def test_is_scikit_learns_on_standardised_features(self):
        fitted_on, measured = tiny.digits(0, 120), tiny.digits(120, 160)
        model = encoder()
        found = map_batches(LinearProbe(fitted_on)(model, "cpu"), measured, batch_size=16)
        train, test = features(model, fitted_on).astype(np.float64), features(model, measured).astype(np.float64)
        mean, std = train.mean(0), train.std(0)
        std[std == 0] = 1  # dead units
        expected = LogisticRegression(C=0.316, max_iter=1000).fit((train - mean) / std, fitted_on.labels)
        assert found.tolist() == expected.predict((test - mean) / std).tolist()
        assert (found.numpy() == measured.labels).mean() > 0.4, "digits are easy, even for a random network"

    def test_is_fitted_anew_for_each_network(self):
        """A network whose features are turned round is as good as before; a probe kept from before would not be."""
        model, probe = encoder(), LinearProbe(tiny.digits(0, 120))

        def turned(**inputs):
            return SimpleNamespace(pooler_output=-features_of(model, inputs["pixel_values"]))

        measured = tiny.digits(120, 160)
        one, other = (map_batches(probe(forward, "cpu"), measured) for forward in (model, turned))
        assert torch.equal(one, other)

    def test_without_labels(self):
        with pytest.raises(UsageError, match="a linear probe needs labelled images"):
            LinearProbe(tiny.digits(0, 8, labelled=False))

    def test_in_an_evaluator(self):
        data = tiny.digits(120, 160)
        rows = open_images(data._images.add_column("label", data.labels.tolist()), label_column="label")
        evaluator = Evaluator(
            rows, PIPELINE, num_classes=10, attack=Attack(BadNets(), 0), reader=LinearProbe(tiny.digits(0, 120))
        )
        found = evaluator(encoder())
        assert found.n == 40
        assert found.accuracy > 0.4
        assert 0 <= found.attack_success_rate <= 1


class TestZeroShot:
    TOKENS = torch.tensor([[18, number, 19] for number in range(6)])
    CAPTIONS = Captions(("a", "b", "c", "d", "e", "f"), {"input_ids": TOKENS})
    BLANK = torch.zeros(1, 3, tiny.IMAGE, tiny.IMAGE)

    def test_one_prompt_a_class_is_the_models_own_choice(self):
        model, data = tiny.model("clip"), tiny.digits(0, 30)
        found = map_batches(ZeroShot(self.CAPTIONS, [[3], [0], [5]], self.BLANK)(model, "cpu"), data)
        inputs = PIPELINE.model_input(torch.stack([data[i]["pixels"] for i in range(30)]))
        with torch.no_grad():
            logits = model(pixel_values=inputs, input_ids=self.TOKENS[[3, 0, 5]]).logits_per_image
        assert found.tolist() == logits.argmax(1).tolist()
        assert len(set(found.tolist())) > 1

    def test_several_prompts_are_averaged_as_unit_vectors(self):
        model, data = tiny.model("clip"), tiny.digits(0, 30)
        found = map_batches(ZeroShot(self.CAPTIONS, [[0, 1], [2, 3, 4]], self.BLANK)(model, "cpu"), data)
        inputs = PIPELINE.model_input(torch.stack([data[i]["pixels"] for i in range(30)]))
        with torch.no_grad():
            texts = model(pixel_values=self.BLANK, input_ids=self.TOKENS).text_embeds
            classes = [texts[rows].mean(0) / texts[rows].mean(0).norm() for rows in ([0, 1], [2, 3, 4])]
            images = image_embeddings(model, inputs, self.CAPTIONS)
        assert found.tolist() == torch.stack([images @ one for one in classes], 1).argmax(1).tolist()
