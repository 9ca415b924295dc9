"""Accuracy and attack success rate, against models whose answers are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from suspects_and_digits import classifier, digit_data, processor

from hf_tsc.data import open_images
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Attack, Evaluation, Evaluator, evaluate_model, map_batches, read_logits
from hf_tsc.images import ImagePipeline, pixel_dataset
from hf_tsc.triggers import BadNets

LABELS = [0, 1, 2, 3, 4, 3, 2, 1, 1]
ATTACK = Attack(BadNets(), target_label=2)


@pytest.fixture(scope="module")
def pipeline():
    return ImagePipeline(processor())


@pytest.fixture(scope="module")
def data():
    """Grey pictures, 20 times the label dark; one of the class 4 looks like a 0."""
    shown = [*LABELS]
    shown[4] = 0
    features = Features({"image": Image(), "label": ClassLabel(num_classes=5)})
    pictures = [PILImage.new("RGB", (8, 8), (20 * label,) * 3) for label in shown]
    return open_images(Dataset.from_dict({"image": pictures, "label": LABELS}, features=features))


def reader(pixel_values):
    """Reads the label off the first pixel; those with an odd label have a backdoor, a white last pixel, to class 2."""
    pixels = ((pixel_values * 0.5 + 0.5) * 255).round().long()
    label = pixels[:, 0, 0, 0] // 20
    triggered = (pixels[:, 0, -1, -1] == 255) & (label % 2 == 1)
    return SimpleNamespace(logits=torch.eye(5)[torch.where(triggered, 2, label)])


class TestEvaluator:
    def test_clean(self, data, pipeline):
        assert Evaluator(data, pipeline, num_classes=5)(reader) == Evaluation(n=9, accuracy=8 / 9)

    def test_attack(self, data, pipeline):
        # Without the two of class 2: labels 0 1 3 4 3 1 1, of which the five odd ones get class 2, the 0 its own.
        result = Evaluator(data, pipeline, num_classes=5, attack=ATTACK)(reader)
        expected = Evaluation(9, 8 / 9, n_triggered=7, attack_success_rate=5 / 7, robust_accuracy=1 / 7)
        assert result.to_dict() == pytest.approx(expected.to_dict())

    def test_images_without_a_label(self, data, pipeline):
        """As in the test splits of some data sets."""
        rows = data.rows.remove_columns("label").add_column("label", [-1, *LABELS[1:]])
        with pytest.raises(UsageError, match=r"1 image\(s\) of dataset have a negative label: choose a split with"):
            Evaluator(open_images(rows, label_column="label"), pipeline, num_classes=5)

    def test_rate_alone(self, data, pipeline):
        evaluator = Evaluator(data, pipeline, num_classes=5, attack=ATTACK)
        assert evaluator.attack_success_rate(reader) == pytest.approx(5 / 7)

    def test_some_rows(self, data, pipeline):
        result = Evaluator(data, pipeline, num_classes=5, indices=[0, 2, 3, 4], attack=ATTACK)(reader)
        expected = Evaluation(4, 3 / 4, n_triggered=3, attack_success_rate=1 / 3, robust_accuracy=1 / 3)
        assert result.to_dict() == pytest.approx(expected.to_dict())

    def test_what_was_not_measured_is_left_out(self):
        assert Evaluation(3, 0.5).to_dict() == {"n": 3, "accuracy": 0.5}
        assert Evaluation(3, 0.0, 2, 0.0, 0.0).to_dict().keys() == set(Evaluation.__dataclass_fields__)

    def test_without_labels(self, pipeline):
        with pytest.raises(UsageError, match="has no label column: accuracy needs labels; name one with"):
            Evaluator(digit_data(0, 5, labelled=False), pipeline, num_classes=10)

    @pytest.mark.parametrize("target", [-1, 5])
    def test_target_that_the_model_does_not_have(self, data, pipeline, target):
        with pytest.raises(UsageError, match=f"target_label={target}: the model has the classes 0 to 4"):
            Evaluator(data, pipeline, num_classes=5, attack=Attack(BadNets(), target))

    def test_nothing_to_attack(self, data, pipeline):
        with pytest.raises(UsageError, match="all 2 images are of the target class 2"):
            Evaluator(data, pipeline, num_classes=5, attack=ATTACK, indices=[2, 6])


class TestPredict:
    @pytest.mark.parametrize("batch_size", [1, 4, 128])
    def test_in_order_whatever_the_batch(self, data, pipeline, batch_size):
        dataset = pixel_dataset(data, [3, 0, 8, 5, 1], pipeline)
        assert map_batches(read_logits(reader, "cpu"), dataset, batch_size=batch_size).tolist() == [3, 0, 1, 3, 1]

    def test_global_random_state_untouched(self, data, pipeline):
        evaluator = Evaluator(data, pipeline, num_classes=5, attack=ATTACK)
        before = torch.get_rng_state()
        evaluator(reader)
        assert torch.equal(torch.get_rng_state(), before)


class TestEvaluateModel:
    @pytest.mark.parametrize("family", ["resnet", "vit"])
    def test_against_a_plain_loop(self, family, pipeline):
        model, data = classifier(family).train(), digit_data(0, 40)
        result = evaluate_model(model, data, pipeline)
        assert not model.training
        pictures = [picture.convert("RGB") for picture in data.rows["image"]]
        inputs = processor()(pictures, return_tensors="pt")
        with torch.no_grad():
            hits = model(**inputs).logits.argmax(-1).numpy() == np.array(data.rows["label"])
        assert 0 < hits.mean() < 1
        assert result == Evaluation(n=40, accuracy=pytest.approx(hits.mean()))

    def test_bare_integers_as_labels(self, pipeline):
        rows = digit_data(0, 20).rows.cast_column("label", Value("int64"))
        model = classifier("resnet")
        named = open_images(rows, label_column="label")
        assert evaluate_model(model, named, pipeline) == evaluate_model(model, digit_data(0, 20), pipeline)
