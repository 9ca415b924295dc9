"""The objective of dual encoders against plain reference implementations."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import SiglipConfig, SiglipModel

from hf_tsc.captions import CaptionTable
from hf_tsc.errors import UsageError
from hf_tsc.images import ImagePipeline, collate
from hf_tsc.objectives import Captions, EmbeddingDistillation, ImageText, Mixup, sigmoid_loss, softmax_loss
from hf_tsc.objectives.hidden_states import unexplained
from hf_tsc.objectives.image_text import draw_captions
from hf_tsc.readers import text_embeddings
from hf_tsc.suspects.dual_encoder import word_tokenizer

PIPELINE = ImagePipeline(tiny.processor())
SMALL = {**tiny.TRANSFORMER, "max_position_embeddings": 12}
LOGITS = 3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DISTINCT, EQUAL = torch.tensor([7, 3, 5, 2]), torch.tensor([7, 3, 7, 7])
CAPTIONS = Captions(
    ("a", "b c", "d"),
    {
        "input_ids": torch.tensor([[18, 1, 19, 0, 0], [18, 2, 3, 19, 0], [18, 4, 19, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
    },
)


def batch(captions: list[list[int]]) -> dict[str, torch.Tensor]:
    data = tiny.digits(0, len(captions), labelled=False)
    return {**collate([data[i] for i in range(len(captions))]), "captions": torch.tensor(captions)}


def softmax_by_loops(logits, captions):
    """Mean over images and captions of the mean, over those that fit, of -log of the softmax."""
    total, count = 0.0, len(captions)
    for matrix in (logits, logits.T):
        for i in range(count):
            fitting = [j for j in range(count) if captions[j] == captions[i]]
            whole = sum(matrix[i, j].exp() for j in range(count))
            total = total - sum((matrix[i, j].exp() / whole).log() for j in fitting) / len(fitting)
    return total / (2 * count)


def sigmoid_by_loops(logits, captions):
    total, count = 0.0, len(captions)
    for i in range(count):
        for j in range(count):
            right = 1 / (1 + (-logits[i, j]).exp())
            total = total - (right if captions[i] == captions[j] else 1 - right).log()
    return total / count


@pytest.mark.parametrize(("loss", "loops"), [(softmax_loss, softmax_by_loops), (sigmoid_loss, sigmoid_by_loops)])
@pytest.mark.parametrize("captions", [DISTINCT, EQUAL], ids=["distinct", "equal"])
def test_value_and_gradient_of_the_sum_written_out(loss, loops, captions):
    logits = LOGITS.clone().requires_grad_()
    found, expected = loss(logits, captions), loops(logits, captions)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    (gradient,), (wanted,) = torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits)
    assert torch.allclose(gradient, wanted, atol=1e-12)


def test_distinct_captions_give_the_loss_of_clip():
    target = torch.arange(4)
    expected = (F.cross_entropy(LOGITS, target) + F.cross_entropy(LOGITS.T, target)) / 2
    assert softmax_loss(LOGITS, DISTINCT).item() == pytest.approx(expected.item())


def test_equal_captions_are_no_negatives():
    """An image may lie as near to the captions of others that say the same."""
    logits = 100 * (EQUAL[:, None] == EQUAL[None]).double()
    assert softmax_loss(logits, EQUAL).item() == pytest.approx((3 * math.log(3)) / 4)  # of three even targets
    assert sigmoid_loss(200 * logits - 5000, EQUAL).item() == pytest.approx(0)


class TestDrawCaptions:
    def test_every_caption_of_an_image_and_no_other(self):
        candidates = torch.tensor([[4, -1, -1], [1, 2, 3], [8, 9, -1]])
        drawn = torch.stack([draw_captions(candidates, seed=seed) for seed in range(60)])
        assert [set(column.tolist()) for column in drawn.T] == [{4}, {1, 2, 3}, {8, 9}]

    def test_a_function_of_the_seed(self):
        candidates = torch.arange(40).reshape(10, 4)
        one, same, other = (draw_captions(candidates, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


class TestCaptions:
    def test_columns_that_only_pad_are_left_out(self):
        found = CAPTIONS.inputs(torch.tensor([2, 0, 0]))
        assert found["input_ids"].tolist() == [[18, 4, 19], [18, 1, 19], [18, 1, 19]]
        assert found["attention_mask"].shape == (3, 3)

    def test_columns_that_pad_in_front_stay(self):
        """Without them each token would stand at another position."""
        left = {name: tensor.flip(1) for name, tensor in CAPTIONS.tokens.items()}
        found = Captions(CAPTIONS.texts, left).inputs(torch.tensor([2, 0]))
        assert found["input_ids"].tolist() == [[0, 0, 19, 4, 18], [0, 0, 19, 1, 18]]

    def test_a_caption_of_siglip_is_the_same_beside_a_longer_one(self):
        """Whose texts are read off their last token, be it a pad."""
        config = SiglipConfig(
            text_config={**SMALL, "vocab_size": 30, "projection_size": tiny.TRANSFORMER["hidden_size"]},
            vision_config=SMALL,
        )
        model, table = SiglipModel(config).eval(), CaptionTable()
        table.add(["a", "a photo of a very small cat on a mat"])
        captions = table.tokenise(word_tokenizer(["a photo of a very small cat on a mat"]), model, 12)
        assert captions.tokens.keys() == {"input_ids"}
        blank = torch.zeros(1, 3, tiny.IMAGE, tiny.IMAGE)
        alone, both = (text_embeddings(model, torch.tensor(n), captions, blank) for n in ([0], [0, 1]))
        assert torch.allclose(alone[0], both[0], atol=1e-6)
        assert not torch.allclose(both[0], both[1], atol=1e-3)

    def test_without_a_mask_the_length_stays(self):
        """SigLIP is trained on padded texts."""
        found = Captions(CAPTIONS.texts, {"input_ids": CAPTIONS.tokens["input_ids"]}).inputs(torch.tensor([2]))
        assert found["input_ids"].shape == (1, 5)


@pytest.mark.parametrize("distilled", [False, True])
def test_training_inputs_are_what_the_model_is_shown(distilled):
    seen, data, model = [], batch([[0, 1], [1, 2], [2, 0]]), tiny.model("clip")
    if distilled:
        objective = EmbeddingDistillation(PIPELINE, CAPTIONS, model, augmentation="crop_flip", mixup_alpha=1.0)
    else:
        objective = ImageText(PIPELINE, CAPTIONS, augmentation="crop_flip")
    objective.loss(lambda **inputs: seen.append(inputs) or model(**inputs), data, seed=5)
    found = objective.training_inputs(data, seed=5)
    assert found.keys() == seen[0].keys()
    assert all(torch.equal(found[name], seen[0][name]) for name in found)


class TestImageText:
    def test_loss_of_a_clip_model_is_that_of_its_logits(self):
        model, data = tiny.model("clip"), batch([[0], [1], [2], [1]])
        loss = ImageText(PIPELINE, CAPTIONS).loss(model, data, seed=0)
        numbers = data["captions"][:, 0]
        with torch.no_grad():
            logits = model(
                pixel_values=PIPELINE.model_input(data["pixels"]), **CAPTIONS.inputs(numbers)
            ).logits_per_image
        assert loss.item() == pytest.approx(softmax_loss(logits, numbers).item(), rel=1e-5)
        own = model(
            pixel_values=PIPELINE.model_input(data["pixels"][:3]), **CAPTIONS.inputs(numbers[:3]), return_loss=True
        ).loss
        first = ImageText(PIPELINE, CAPTIONS).loss(model, batch([[0], [1], [2]]), seed=0)
        assert first.item() == pytest.approx(own.item(), rel=1e-5)  # CLIP's own loss, where captions differ

    def test_gradients_reach_both_towers(self):
        model = tiny.model("clip")
        ImageText(PIPELINE, CAPTIONS).loss(model, batch([[0], [1], [2]]), seed=0).backward()
        names = ("vision_model.embeddings.patch_embedding", "visual_projection")
        names += ("text_model.embeddings.token_embedding", "text_projection")
        for name in (*(f"{layer}.weight" for layer in names), "logit_scale"):
            assert model.get_parameter(name).grad.abs().max() > 0, name

    def test_score_is_the_share_of_captions_found(self):
        def forward(pixel_values, **_):
            logits = torch.tensor([[1.0, 2, 0], [0, 0, 3], [5, 0, 1]])
            return SimpleNamespace(logits_per_image=logits)

        # captions 1, 2, 1: image 0 takes the second (wrong), 1 the third (wrong), 2 the first (says the same)
        found = ImageText(PIPELINE, CAPTIONS).evaluate(forward, [batch([[1], [2], [1]])])
        assert found["score"] == pytest.approx(1 / 3)

    def test_a_batch_of_one(self):
        with pytest.raises(UsageError, match="a batch size of 2 or more"):
            ImageText(PIPELINE, CAPTIONS).loss(tiny.model("clip"), batch([[0]]), seed=0)


def in_double(network):
    """A forward that takes single precision's pixels to a network in double precision."""
    return lambda pixel_values, **inputs: network(pixel_values=pixel_values.double(), **inputs)


class TestEmbeddingDistillation:
    BATCH = ((0,), (1,), (2,), (1,))

    def networks(self):
        """A student and its teacher, in double precision."""
        return (tiny.random_model("clip", seed=seed).eval() for seed in (1, 2))

    @pytest.mark.parametrize("weight", [0.0, 3.0])
    def test_value_and_gradient_of_the_sum_written_out(self, weight):
        """On the same mixed images, with the same captions."""
        model, teacher = self.networks()
        data = batch([list(numbers) for numbers in self.BATCH])
        options = {"mixup_alpha": 1.0, "feature_weight": weight, "feature_states": "last"}
        loss = EmbeddingDistillation(PIPELINE, CAPTIONS, in_double(teacher), **options).loss(
            in_double(model), data, seed=5
        )
        pixels = PIPELINE.normalize(Mixup(1.0)(data["pixels"] / 255, seed=5)[0])
        inputs = {"pixel_values": pixels.double(), **CAPTIONS.inputs(data["captions"][:, 0])}
        found, taught = (one(**inputs, output_hidden_states=True) for one in (model, teacher))

        def missed(one, other):
            away = sum((one[i] - other[i]).square().sum() for i in range(4))
            return away / sum((other[i] - sum(other) / 4).square().sum() for i in range(4))

        expected = missed(found.image_embeds, taught.image_embeds.detach()) / 2
        expected = expected + missed(found.text_embeds, taught.text_embeds.detach()) / 2
        states = (one.vision_model_output.hidden_states[-1] for one in (found, taught))
        expected = expected + weight * missed(next(states), next(states).detach())
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients, wanted = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (loss, expected))
        for name, gradient, other in zip(names, gradients, wanted, strict=True):
            assert (gradient is None) == (other is None) == (name == "logit_scale"), name
            assert gradient is None or torch.allclose(gradient, other, atol=1e-12), name

    def test_of_the_teacher_itself_is_nothing(self):
        _, teacher = self.networks()
        data = batch([list(numbers) for numbers in self.BATCH])
        same = in_double(teacher)
        loss = EmbeddingDistillation(PIPELINE, CAPTIONS, same, feature_weight=1.0).loss(same, data, seed=0)
        assert loss.item() == pytest.approx(0, abs=1e-12)

    def test_one_caption_for_all_says_nothing_of_texts(self):
        """Whose embeddings do not vary: the images alone count."""
        model, teacher = self.networks()
        model, teacher = in_double(model), in_double(teacher)
        data = batch([[1], [1], [1]])
        loss = EmbeddingDistillation(PIPELINE, CAPTIONS, teacher).loss(model, data, seed=0)
        inputs = {"pixel_values": PIPELINE.model_input(data["pixels"]), **CAPTIONS.inputs(torch.tensor([1]))}
        found, taught = (one(**inputs).image_embeds for one in (model, teacher))
        assert loss.item() == pytest.approx(unexplained([found], [taught]).item() / 2, rel=1e-9)

    def test_a_batch_of_one(self):
        model = tiny.model("clip")
        with pytest.raises(UsageError, match="a batch size of 2 or more"):
            EmbeddingDistillation(PIPELINE, CAPTIONS, model).loss(model, batch([[0]]), seed=0)
