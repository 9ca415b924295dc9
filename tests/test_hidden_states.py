"""A suspect's hidden states in the loss, and which of them a permutation leaves in place."""

import logging

import pytest
import tiny
import torch

from hf_tsc.architectures import VARIANTS
from hf_tsc.derive import example_inputs
from hf_tsc.errors import UsageError
from hf_tsc.images import ImagePipeline
from hf_tsc.objectives import FeatureDistillation, ImageClassification, Mixup, distillation_loss, features_of
from hf_tsc.objectives.hidden_states import HiddenStates, call_with_states, states_of, unexplained
from hf_tsc.permutation import KINDS
from hf_tsc.specs import spec_of
from hf_tsc.tsc_config import TSCConfig
from hf_tsc.tsc_trainer import TSCTrainer
from hf_tsc.unmoved_states import unmoved_states

PIPELINE = ImagePipeline(tiny.processor())
INSIDE = [kind for kind in KINDS if kind != "residual"]


def states(seed: int, n: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=generator, dtype=torch.float64) for shape in ((4, 3, 3), (5, 7), (2,))]


def batch(n: int = 6) -> dict[str, torch.Tensor]:
    pixels = torch.randint(256, (n, 3, tiny.IMAGE, tiny.IMAGE), generator=torch.Generator().manual_seed(1))
    return {"pixels": pixels.to(torch.uint8)}


class TestUnexplained:
    def test_is_the_sum_written_out(self):
        found, target = states(1), states(2)
        expected = 0.0
        for one, other in zip(found, target, strict=True):
            missed = sum(float(((a - b) ** 2).sum()) for a, b in zip(one, other, strict=True))
            spread = float((other.flatten(1).var(0, correction=0) * len(other)).sum())
            expected += missed / spread / 3
        assert unexplained(found, target).item() == pytest.approx(expected, rel=1e-12)

    def test_one_is_what_the_mean_alone_explains(self):
        target = states(1)
        assert unexplained([state.mean(0).expand_as(state) for state in target], target).item() == pytest.approx(1)

    def test_what_never_varies_counts_nothing_and_gives_no_gradient(self):
        same, found, target = torch.ones(6, 3), torch.zeros(6, 3, requires_grad=True), states(1)[1].float()
        other = target.clone().requires_grad_()
        loss = unexplained([found, other * 2], [same, target])
        assert loss.item() == pytest.approx(unexplained([target * 2], [target]).item() / 2, rel=1e-6)
        loss.backward()
        assert (found.grad == 0).all()
        assert torch.isfinite(other.grad).all()
        assert other.grad.abs().max() > 0

    def test_one_image_has_no_variance(self):
        assert unexplained(states(1, n=1), states(2, n=1)).item() == 0

    def test_in_single_precision_at_least(self):
        found, target = ([state.bfloat16() for state in states(seed)] for seed in (1, 2))
        loss = unexplained(found, target)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(unexplained(states(1), states(2)).item(), rel=1e-2)


class TestTerm:
    def test_only_the_places_that_count(self):
        found, target = (type("Output", (), {"hidden_states": tuple(states(seed))})() for seed in (1, 2))
        term = HiddenStates(3.0)
        assert term.term(found, target).item() == pytest.approx(3 * unexplained(states(1), states(2)).item())
        term.places = [2, 0]
        chosen = [[states(seed)[place] for place in (2, 0)] for seed in (1, 2)]
        assert term.term(found, target).item() == pytest.approx(3 * unexplained(*chosen).item())

    def test_without_states(self):
        with pytest.raises(UsageError, match="int has no hidden states to follow: give feature_weight=0"):
            states_of(1)

    @pytest.mark.parametrize("family", ["resnet", "vit"])
    def test_beside_the_answers_on_the_same_mixed_images(self, family):
        model, teacher = tiny.random_model(family, seed=1).float(), tiny.random_model(family, seed=2).float()
        objective = ImageClassification(PIPELINE, teacher=teacher, mixup_alpha=1.0, feature_weight=7.0)
        loss = objective.loss(model, batch(), seed=5)
        inputs = PIPELINE.normalize(Mixup(1.0)(batch()["pixels"].float() / 255, seed=5)[0])
        found, taught = (call_with_states(one, inputs) for one in (model, teacher))
        expected = distillation_loss(found.logits, taught.logits, 2.0)
        expected = expected + 7 * unexplained(found.hidden_states, taught.hidden_states)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        loss.backward()
        assert all(parameter.grad is None for parameter in teacher.parameters())

    def test_beside_the_features_of_an_encoder(self):
        model, teacher = (tiny.random_model("resnet", seed=seed).float().resnet for seed in (1, 2))
        plain, followed = (
            FeatureDistillation(PIPELINE, teacher, feature_weight=weight).loss(model, batch(), seed=5)
            for weight in (0.0, 2.0)
        )
        inputs = PIPELINE.model_input(batch()["pixels"])
        found, taught = (call_with_states(one, inputs).hidden_states for one in (model, teacher))
        assert torch.equal(features_of(model, inputs), call_with_states(model, inputs).pooler_output.flatten(1))
        assert followed.item() == pytest.approx(plain.item() + 2 * unexplained(found, taught).item(), rel=1e-6)

    @pytest.mark.parametrize("places", [None, [0, 1]])
    def test_the_last_state_alone(self, places):
        """Of those there are to choose from."""
        model, teacher = (tiny.random_model("resnet", seed=seed).float() for seed in (1, 2))
        objectives = [
            ImageClassification(PIPELINE, teacher=teacher, feature_weight=3.0, feature_states="last"),
            FeatureDistillation(PIPELINE, teacher.resnet, feature_weight=3.0, feature_states="last"),
        ]
        inputs = PIPELINE.model_input(batch()["pixels"])
        states = [call_with_states(one, inputs).hidden_states for one in (model, teacher)]
        place = -1 if places is None else places[-1]
        expected = 3 * unexplained(*([one[place]] for one in states)).item()
        for objective, network in zip(objectives, (model, model.resnet), strict=True):
            objective.hidden_states.places = places
            whole = objective.loss(network, batch(), seed=5).item()
            objective.hidden_states.weight = 0.0
            assert whole - objective.loss(network, batch(), seed=5).item() == pytest.approx(expected, rel=1e-4)

    def test_without_a_teacher_there_is_nothing_to_follow(self):
        assert ImageClassification(PIPELINE, feature_weight=1.0).hidden_states is None


class TestUnmovedStates:
    # (states, those that stay where the residual stream stays)
    @pytest.mark.parametrize(
        ("name", "stay"),
        [
            ("vit", [0, 1, 2]),
            ("swin", [0, 1, 2, 3]),
            ("resnet(basic)", [0, 1, 2, 3]),
            ("resnet(bottleneck)", [1, 2, 3]),  # the stem's output is no residual stream: the first block projects it
            ("mobilenet_v2", list(range(15))),  # the last one is the widened input of the head
            ("mobilenet_v1", []),
        ],
    )
    def test_of_architectures(self, name, stay):
        model = VARIANTS[name].build().eval()
        inputs = example_inputs(model)
        assert unmoved_states(model, spec_of(model, inputs), INSIDE, inputs) == stay

    @pytest.mark.parametrize("name", ["vit", "resnet(basic)"])
    def test_none_stays_where_the_residual_stream_moves(self, name):
        model = VARIANTS[name].build().eval()
        inputs = example_inputs(model)
        assert unmoved_states(model, spec_of(model, inputs), KINDS, inputs) == []


class TestTrainer:
    def trainer(self, model, folder, **options):
        config = TSCConfig.for_model(model, output_dir=str(folder), report_to="none", use_cpu=True, **options)
        data = tiny.digits(0, 8)
        return TSCTrainer(model, config, train_dataset=data, eval_dataset=data, processing_class=tiny.processor())

    def test_a_curve_follows_the_states_of_its_ends(self, tmp_path):
        model = VARIANTS["resnet(bottleneck)"].build()
        made = self.trainer(model, tmp_path, move_spaces=["hidden"], feature_weight=2.0)
        assert made.objective.hidden_states.places == [1, 2, 3]
        assert made.args.feature_weight == 2.0

    def test_the_callers_objective_and_arguments_are_untouched(self, tmp_path):
        model = VARIANTS["mobilenet_v1"].build()
        options = {"move_spaces": ["hidden"], "feature_weight": 2.0}
        args = TSCConfig.for_model(model, output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)
        objective = ImageClassification.of(args, ImagePipeline(tiny.processor()), model)
        data = {"train_dataset": tiny.digits(0, 8), "eval_dataset": tiny.digits(0, 8)}
        made = TSCTrainer(model, args, processing_class=tiny.processor(), objective=objective, **data)
        assert made.objective.hidden_states is None
        assert (objective.hidden_states.weight, objective.hidden_states.places) == (2.0, None)
        assert (args.feature_weight, args.max_steps) == (2.0, -1)

    def test_a_network_all_of_whose_states_move(self, tmp_path, caplog):
        model = VARIANTS["mobilenet_v1"].build()
        with caplog.at_level(logging.WARNING, "hf_tsc"):
            made = self.trainer(model, tmp_path, move_spaces=["hidden"], feature_weight=2.0)
        assert made.objective.hidden_states is None
        assert made.args.feature_weight == 0.0
        assert "MobileNetV1ForImageClassification has no hidden state that stays in place" in caplog.text

    def test_a_network_that_has_nothing_to_move(self, tmp_path):
        model = VARIANTS["textnet"].build()
        expected = "TextNetForImageClassification has no spaces of the kinds hidden: expected some of residual"
        with pytest.raises(UsageError, match=expected):
            self.trainer(model, tmp_path, move_spaces=["hidden"])
