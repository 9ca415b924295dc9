"""Losses against their formulas, and measures of a point."""

from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from hf_tsc.errors import UsageError
from hf_tsc.images import Augmentation, ImagePipeline, collate
from hf_tsc.objectives import ImageClassification, Mixup, distillation_loss, mixed_cross_entropy
from hf_tsc.tsc_config import TEACHER_ERRORS

PIPELINE = ImagePipeline(tiny.processor())
LOGITS, TEACHER = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 1, 1])


def batch(count: int = 8, *, labelled: bool = True) -> dict[str, torch.Tensor]:
    data = tiny.digits(0, count, labelled=labelled)
    return collate([data[i] for i in range(count)])


class Linear(nn.Module):
    """Logits that are a linear function of the pixels; keeps what it was called with."""

    def __init__(self, seed: int):
        super().__init__()
        self.weight = torch.randn(10, 3 * 8 * 8, generator=torch.Generator().manual_seed(seed)) / 14
        self.seen: list[torch.Tensor] = []

    def forward(self, pixel_values):
        self.seen.append(pixel_values)
        return SimpleNamespace(logits=pixel_values.flatten(1) @ self.weight.T)


class TestLosses:
    @pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
    def test_distillation_is_the_sum_written_out(self, temperature):
        p, q = (TEACHER / temperature).softmax(-1), (LOGITS / temperature).softmax(-1)
        expected = temperature**2 * (p * (p / q).log()).sum(-1).mean()
        assert distillation_loss(LOGITS, TEACHER, temperature).item() == pytest.approx(expected.item(), rel=1e-5)

    def test_distillation_of_the_teacher_itself_is_nothing(self):
        assert distillation_loss(TEACHER, TEACHER, 2.0).item() == pytest.approx(0, abs=1e-6)
        # a shift of the logits is no other answer
        assert distillation_loss(TEACHER + 3, TEACHER, 2.0).item() == pytest.approx(0, abs=1e-6)

    def test_cross_entropy(self):
        assert mixed_cross_entropy(LOGITS, LABELS, None, None) == F.cross_entropy(LOGITS, LABELS)

    def test_mixed_cross_entropy_is_that_of_mixed_labels(self):
        partner, share = torch.tensor([3, 0, 1, 2, 5, 4]), torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0, 0.3])
        soft = share[:, None] * F.one_hot(LABELS, 4) + (1 - share)[:, None] * F.one_hot(LABELS[partner], 4)
        expected = F.cross_entropy(LOGITS, soft)
        assert mixed_cross_entropy(LOGITS, LABELS, partner, share).item() == pytest.approx(expected.item(), rel=1e-6)


class TestMixup:
    def test_mixes_with_the_partner(self):
        pixels = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        mixed, partner, share = Mixup(1.0)(pixels, seed=3)
        assert sorted(partner.tolist()) == list(range(6))
        for i in range(6):
            expected = share[i] * pixels[i] + (1 - share[i]) * pixels[partner[i]]
            assert torch.allclose(mixed[i], expected, atol=1e-6)

    @pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
    def test_share_has_the_moments_of_the_beta_distribution(self, alpha):
        _, _, share = Mixup(alpha)(torch.zeros(20_000, 1, 1, 1, dtype=torch.float64), seed=0)
        assert ((share >= 0) & (share <= 1)).all()
        assert share.mean().item() == pytest.approx(0.5, abs=0.01)
        assert share.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)

    def test_a_function_of_the_seed_alone(self):
        pixels = torch.rand(6, 3, 4, 4)
        state = torch.random.get_rng_state()
        first, again, other = (Mixup(1.0)(pixels, seed=seed)[0] for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(torch.random.get_rng_state(), state)


class TestImageClassification:
    def test_cross_entropy_of_the_normalised_pixels(self):
        model, data = Linear(1), batch()
        loss = ImageClassification(PIPELINE).loss(model, data, seed=0)
        inputs = PIPELINE.model_input(data["pixels"])
        assert torch.equal(model.seen[0], inputs)
        expected = F.cross_entropy(Linear(1)(inputs).logits, data["labels"])
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)

    def test_the_augmentation_comes_before_the_normalisation(self):
        model, data = Linear(1), batch()
        ImageClassification(PIPELINE, augmentation="crop").loss(model, data, seed=5)
        expected = PIPELINE.normalize(Augmentation("crop")(data["pixels"].float() / 255, seed=5))
        assert torch.equal(model.seen[0], expected)
        assert not torch.equal(model.seen[0], PIPELINE.model_input(data["pixels"]))

    def test_distillation_sees_the_same_mixed_and_augmented_images_and_no_labels(self):
        model, teacher, data = Linear(1), Linear(2), batch(labelled=False)
        objective = ImageClassification(
            PIPELINE, augmentation="crop", teacher=teacher, temperature=3.0, mixup_alpha=1.0
        )
        loss = objective.loss(model, data, seed=5)
        assert torch.equal(model.seen[0], teacher.seen[0])
        augmented = Augmentation("crop")(data["pixels"].float() / 255, seed=5)
        assert torch.equal(model.seen[0], PIPELINE.normalize(Mixup(1.0)(augmented, seed=5)[0]))
        logits = [one(model.seen[0]).logits for one in (Linear(1), Linear(2))]
        assert loss.item() == pytest.approx(distillation_loss(*logits, 3.0).item(), rel=1e-6)

    def test_a_teacher_of_clean_pictures_sees_them_as_they_are_and_its_answers_are_mixed(self):
        model, teacher, data = Linear(1), Linear(2), batch(labelled=False)
        options = {"temperature": 3.0, "mixup_alpha": 1.0, "teacher_view": "clean"}
        objective = ImageClassification(PIPELINE, augmentation="crop", teacher=teacher, **options)
        loss = objective.loss(model, data, seed=5)
        assert torch.equal(teacher.seen[0], PIPELINE.model_input(data["pixels"]))
        augmented = Augmentation("crop")(data["pixels"].float() / 255, seed=5)
        mixed, partner, share = Mixup(1.0)(augmented, seed=5)
        assert torch.equal(model.seen[0], PIPELINE.normalize(mixed))
        answers = F.softmax(Linear(2)(teacher.seen[0]).logits.double() / 3, dim=-1)
        target = share.double()[:, None] * answers + (1 - share.double()[:, None]) * answers[partner]
        own = F.log_softmax(Linear(1)(model.seen[0]).logits.double() / 3, dim=-1)
        expected = 9 * (target * (target.log() - own)).sum(-1).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    @pytest.mark.parametrize("mixup_alpha", [0.0, 1.0])
    @pytest.mark.parametrize("view", ["same", "clean"])
    @pytest.mark.parametrize("errors", ["correct", "drop"])
    def test_a_wrong_answer_of_the_teacher_gives_way(self, view, mixup_alpha, errors):
        model, teacher, data = Linear(1), Linear(2), batch(24)
        options = {"temperature": 2.0, "mixup_alpha": mixup_alpha, "teacher_view": view, "teacher_errors": errors}
        loss = ImageClassification(PIPELINE, teacher=teacher, **options).loss(model, data, seed=5)
        labels, n = data["labels"], 24
        partner, share = torch.arange(n), torch.ones(n)
        if mixup_alpha:
            _, partner, share = Mixup(mixup_alpha)(data["pixels"].float() / 255, seed=5)
        answers = F.softmax(Linear(2)(teacher.seen[0]).logits.double() / 2, dim=-1)
        if view == "clean":
            answers = share.double()[:, None] * answers + (1 - share.double()[:, None]) * answers[partner]
        logits = Linear(1)(model.seen[0]).logits.double()
        expected, right = 0.0, 0
        for i in range(n):
            if answers[i].argmax() in (labels[i], labels[partner[i]]):
                right += 1
                expected += 4 * (answers[i] * (answers[i].log() - F.log_softmax(logits[i] / 2, -1))).sum()
            elif errors == "correct":
                log_p = F.log_softmax(logits[i], -1)
                expected -= share[i] * log_p[labels[i]] + (1 - share[i]) * log_p[labels[partner[i]]]
        assert 0 < right < n
        assert loss.item() == pytest.approx((expected / n).item(), rel=1e-5)

    def test_without_labels_nothing_is_corrected(self):
        data = batch(labelled=False)
        losses = [
            ImageClassification(PIPELINE, teacher=Linear(2), teacher_errors=errors).loss(Linear(1), data, seed=1)
            for errors in TEACHER_ERRORS
        ]
        assert losses[0] == losses[1] == losses[2]

    @pytest.mark.parametrize("mixup_alpha", [0.0, 1.0])
    def test_both_views_are_one_without_changes_of_the_pictures(self, mixup_alpha):
        # with mixup the suspect is asked of mixed pictures, or its answers are mixed: that is not the same
        losses = [
            ImageClassification(PIPELINE, teacher=Linear(2), mixup_alpha=mixup_alpha, teacher_view=view)
            .loss(Linear(1), batch(), seed=1)
            .item()
            for view in ("same", "clean")
        ]
        assert (losses[0] == pytest.approx(losses[1], rel=1e-6)) == (mixup_alpha == 0)

    def test_no_gradient_to_the_teacher(self):
        model, teacher = Linear(1), Linear(2)
        model.weight.requires_grad_()
        teacher.weight.requires_grad_()
        ImageClassification(PIPELINE, teacher=teacher).loss(model, batch(), seed=0).backward()
        assert model.weight.grad.abs().max() > 0
        assert teacher.weight.grad is None

    def test_cross_entropy_without_labels(self):
        with pytest.raises(UsageError, match="needs labels and the data set has none; use distillation"):
            ImageClassification(PIPELINE).loss(Linear(1), batch(labelled=False), seed=0)

    @pytest.mark.parametrize("mixup_alpha", [0.0, 1.0])
    def test_training_inputs_are_what_the_model_is_shown(self, mixup_alpha):
        model, objective = Linear(1), ImageClassification(PIPELINE, augmentation="crop_flip", mixup_alpha=mixup_alpha)
        objective.loss(model, batch(), seed=5)
        found = objective.training_inputs(batch(), seed=5)
        assert found.keys() == {"pixel_values"}
        assert torch.equal(found["pixel_values"], model.seen[0])
        assert not torch.equal(found["pixel_values"], objective.model_inputs(batch())["pixel_values"])

    def test_model_inputs_are_not_augmented(self):
        data = batch()
        found = ImageClassification(PIPELINE, augmentation="crop_flip", mixup_alpha=1.0).model_inputs(data)
        assert found.keys() == {"pixel_values"}
        assert torch.equal(found["pixel_values"], PIPELINE.model_input(data["pixels"]))


class TestEvaluate:
    def expected(self, data, answers):
        logits = Linear(1)(PIPELINE.model_input(data["pixels"])).logits
        right = (logits.argmax(-1) == answers).double().mean().item()
        return F.cross_entropy(logits, answers).item(), right

    @pytest.mark.parametrize("size", [20, 7, 1])
    def test_loss_and_accuracy_whatever_the_batches(self, size):
        data = batch(20)
        parts = [
            dict(zip(data, values, strict=True))
            for values in zip(*(x.split(size) for x in data.values()), strict=True)
        ]
        found = ImageClassification(PIPELINE, augmentation="crop").evaluate(Linear(1), parts)
        loss, right = self.expected(data, data["labels"])
        assert 0 < right < 1
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["score"] == right

    def test_labels_count_even_with_a_teacher(self):
        data = batch(20)
        found = ImageClassification(PIPELINE, teacher=Linear(2)).evaluate(Linear(1), [data])
        assert found["score"] == self.expected(data, data["labels"])[1]

    def test_agreement_where_there_are_no_labels(self):
        data = batch(20, labelled=False)
        objective = ImageClassification(PIPELINE, teacher=Linear(2))
        answers = Linear(2)(PIPELINE.model_input(data["pixels"])).logits.argmax(-1)
        loss, agree = self.expected(data, answers)
        found = objective.evaluate(Linear(1), [data])
        assert found == pytest.approx({"loss": loss, "score": agree}, rel=1e-5)
        assert objective.evaluate(Linear(2), [data])["score"] == 1
