"""Objectives of image encoders: NT-Xent, SimCLR and feature distillation against plain reference implementations."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

from hf_tsc.errors import UsageError
from hf_tsc.images import Augmentation, ImagePipeline, collate
from hf_tsc.objectives import FeatureDistillation, Mixup, ProjectionHead, SimCLR, features_of, nt_xent
from hf_tsc.objectives.encoding import unexplained_variance

PIPELINE = ImagePipeline(tiny.processor())


def views(count: int = 5, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, count, size, generator=generator, dtype=torch.float64)
    return first.requires_grad_(), second.requires_grad_()


def batch(count: int = 8) -> dict[str, torch.Tensor]:
    data = tiny.digits(0, count, labelled=False)
    return collate([data[i] for i in range(count)])


class Linear(nn.Module):
    """Pooled features (n, 5, 1, 1), as a ResNet's, that are a linear function of the pixels."""

    def __init__(self, seed: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3 * 8 * 8, generator=torch.Generator().manual_seed(seed)) / 14)
        self.seen: list[torch.Tensor] = []

    def forward(self, pixel_values):
        self.seen.append(pixel_values)
        return SimpleNamespace(pooler_output=(pixel_values.flatten(1) @ self.weight.T)[..., None, None])


def nt_xent_by_loops(first, second, temperature):
    """-log of exp(similarity to the other view) over the sum of that to all views but itself, view by view."""
    all_views = [*first, *second]
    count, total = len(first), 0.0

    def similarity(a, b):
        return (a * b).sum() / a.square().sum().sqrt() / b.square().sum().sqrt() / temperature

    for i, view in enumerate(all_views):
        positive = similarity(view, all_views[(i + count) % (2 * count)]).exp()
        others = sum(similarity(view, other).exp() for j, other in enumerate(all_views) if j != i)
        total = total - (positive / others).log()
    return total / (2 * count)


class TestNTXent:
    @pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
    def test_value_and_gradients_of_the_sum_written_out(self, temperature):
        first, second = views()
        loss = nt_xent(first, second, temperature)
        expected = nt_xent_by_loops(first, second, temperature)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
        for found, wanted in zip(
            torch.autograd.grad(loss, (first, second)), torch.autograd.grad(expected, (first, second)), strict=True
        ):
            assert torch.allclose(found, wanted, atol=1e-12)

    def test_of_views_that_are_all_alike(self):
        same = torch.ones(4, 3)
        assert nt_xent(same, same, 0.5).item() == pytest.approx(math.log(7))

    def test_lengths_do_not_matter(self):
        first, second = views()
        assert nt_xent(3 * first, 0.1 * second, 0.5).item() == pytest.approx(nt_xent(first, second, 0.5).item())


class TestFeaturesOf:
    def test_flat(self):
        assert features_of(Linear(0), torch.zeros(2, 3, 8, 8)).shape == (2, 5)

    def test_an_encoder_without_pooled_output(self):
        def forward(**_):
            return SimpleNamespace(last_hidden_state=torch.zeros(2, 3, 4), pooler_output=None)

        with pytest.raises(UsageError, match="without a pooled output"):
            features_of(forward, torch.zeros(2, 3, 8, 8))


class TestSimCLR:
    def test_loss_of_two_augmented_views_through_the_head(self):
        model, data, head = Linear(1), batch(), ProjectionHead(5, out=6)
        loss = SimCLR(PIPELINE, head=head, temperature=0.3).loss(model, data, seed=5)
        pixels = data["pixels"].float() / 255
        augmented = Augmentation("simclr")(torch.cat([pixels, pixels]), seed=5).chunk(2)
        assert not torch.equal(*augmented)
        assert torch.equal(model.seen[0], PIPELINE.normalize(torch.cat(augmented)))
        first, second = (head(features_of(Linear(1), PIPELINE.normalize(view))) for view in augmented)
        assert loss.item() == pytest.approx(nt_xent(first, second, 0.3).item(), rel=1e-6)

    def test_gradients_to_model_and_head(self):
        model, head = Linear(1), ProjectionHead(5)
        SimCLR(PIPELINE, head=head).loss(model, batch(), seed=0).backward()
        for parameter in (*model.parameters(), *head.parameters()):
            assert parameter.grad.abs().max() > 0

    def test_a_batch_of_one(self):
        with pytest.raises(UsageError, match="a batch size of 2 or more"):
            SimCLR(PIPELINE).loss(Linear(1), batch(1), seed=0)

    def test_the_score_is_of_features_and_the_loss_of_what_the_head_makes_of_them(self):
        """What remains of a training are the features: another head must not change what they are worth."""
        batches = [batch(6)]
        first, second = (
            SimCLR(PIPELINE, head=ProjectionHead(5, seed=seed)).evaluate(Linear(1), batches) for seed in (0, 1)
        )
        assert first["score"] == second["score"] == SimCLR(PIPELINE).evaluate(Linear(1), batches)["score"]
        assert first["loss"] != second["loss"]

    def test_score_counts_views_found(self):
        class Constant(nn.Module):
            """All features alike but those of the first image of each half: only that one finds its own view."""

            def forward(self, pixel_values):
                features = torch.ones(len(pixel_values), 2)
                features[0], features[len(pixel_values) // 2] = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
                return SimpleNamespace(pooler_output=features)

        found = SimCLR(PIPELINE).evaluate(Constant(), [batch(4)])
        # images 1, 2 and 3 are equally near to the views 1, 2 and 3, and the first of them is taken
        assert found["score"] == pytest.approx(0.5)

    def test_evaluation_is_repeatable(self):
        objective, model = SimCLR(PIPELINE, head=ProjectionHead(5)), Linear(1)
        first, again = (objective.evaluate(model, [batch(6), batch(2)]) for _ in range(2))
        assert first == again
        assert 0 <= first["score"] <= 1

    def test_model_inputs_are_not_augmented(self):
        data = batch()
        assert torch.equal(SimCLR(PIPELINE).model_inputs(data)["pixel_values"], PIPELINE.model_input(data["pixels"]))


class TestProjectionHead:
    def test_a_function_of_the_seed_alone(self):
        state = torch.random.get_rng_state()
        one, same, other = (ProjectionHead(5, seed=seed)[0].weight for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
        assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "objective",
    [
        SimCLR(PIPELINE, augmentation="crop_flip"),
        FeatureDistillation(PIPELINE, Linear(2), augmentation="crop_flip", mixup_alpha=1.0),
    ],
)
def test_training_inputs_are_what_the_model_is_shown(objective):
    model = Linear(1)
    objective.loss(model, batch(), seed=5)
    assert torch.equal(objective.training_inputs(batch(), seed=5)["pixel_values"], model.seen[0])


class TestFeatureDistillation:
    def test_unexplained_variance(self):
        target = torch.tensor([[0.0, 0.0], [2.0, 4.0]], dtype=torch.float64)
        assert unexplained_variance(target, target).item() == 0
        assert unexplained_variance(target.mean(0).expand(2, 2), target).item() == pytest.approx(1)
        # off by 1 in one of four numbers; the variance sums to 1 + 1 + 4 + 4
        off = target + torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        assert unexplained_variance(off, target).item() == pytest.approx(0.1)

    def test_gradient_of_the_sum_written_out(self):
        found, target = views()
        loss = unexplained_variance(found, target.detach())
        (gradient,) = torch.autograd.grad(loss, found)
        expected = 2 * (found - target) / (target - target.mean(0)).square().sum()
        assert torch.allclose(gradient, expected, atol=1e-12)

    def test_student_and_teacher_see_the_same_images_and_the_teacher_gets_no_gradient(self):
        model, teacher, data = Linear(1), Linear(2), batch()
        objective = FeatureDistillation(PIPELINE, teacher, augmentation="crop", mixup_alpha=1.0)
        loss = objective.loss(model, data, seed=5)
        loss.backward()
        augmented = Augmentation("crop")(data["pixels"].float() / 255, seed=5)
        assert torch.equal(model.seen[0], PIPELINE.normalize(Mixup(1.0)(augmented, seed=5)[0]))
        assert torch.equal(model.seen[0], teacher.seen[0])
        found, target = (features_of(one, model.seen[0]) for one in (Linear(1), Linear(2)))
        assert loss.item() == pytest.approx(unexplained_variance(found, target).item(), rel=1e-6)
        assert teacher.weight.grad is None
        assert model.weight.grad.abs().max() > 0

    @pytest.mark.parametrize("size", [20, 7])
    def test_measures_do_not_depend_on_the_batches(self, size):
        data = batch(20)
        batches = [{"pixels": data["pixels"][i : i + size]} for i in range(0, 20, size)]
        found = FeatureDistillation(PIPELINE, Linear(2)).evaluate(Linear(3), batches)
        inputs = PIPELINE.model_input(data["pixels"])
        expected = unexplained_variance(features_of(Linear(3), inputs), features_of(Linear(2), inputs)).item()
        assert found["loss"] == pytest.approx(expected, rel=1e-5)
        assert found["score"] == pytest.approx(max(0.0, 1 - expected), abs=1e-5)

    def test_the_teacher_itself(self):
        found = FeatureDistillation(PIPELINE, Linear(2)).evaluate(Linear(2), [batch()])
        assert found == {"loss": 0.0, "score": 1.0}

    def test_a_batch_of_one(self):
        with pytest.raises(UsageError, match="a batch size of 2 or more"):
            FeatureDistillation(PIPELINE, Linear(2)).loss(Linear(1), batch(1), seed=0)
