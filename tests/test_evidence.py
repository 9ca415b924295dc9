"""Evidence without a trigger: searches on toys whose smallest trigger is known, agreement, barriers."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from transformers import ResNetModel, ViTConfig

from hf_tsc.batch_norm import recompute_statistics
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import read_logits
from hf_tsc.evidence.agreement import feature_cosine, same_class
from hf_tsc.evidence.barrier import clean_loss, loss_barrier, parameters_of
from hf_tsc.evidence.classes import ClassTriggers, anomaly_index, chance_of, invert_classes
from hf_tsc.evidence.encoder import EncoderTrigger, features_function, invert_encoder, mean_cosine
from hf_tsc.evidence.gather import agreement_of, barriers_of, find_triggers, flat_evidence
from hf_tsc.evidence.search import FoundTrigger, MaskWeight, frozen, search_trigger, with_trigger
from hf_tsc.evidence.settings import CLASS_SEARCH, ENCODER_SEARCH, EvidenceSettings
from hf_tsc.functional import model_at
from hf_tsc.images import ImagePipeline
from hf_tsc.metrics import accuracy
from hf_tsc.objectives import ImageClassification, logits_of
from hf_tsc.permutation import apply
from hf_tsc.tasks import Classification, Encoding, ImageTextMatching

SIDE, CLASSES, PIXEL, TARGET = 16, 10, 85, 6
DARK, BRIGHT = 51, 153  # 0.2 and 0.6
SIZES = np.arange(10, 10 + CLASSES)  # pixels in the block of each class
ONCE = replace(CLASS_SEARCH, restarts=1)


def identity(pixels):
    return pixels


def blocks(*, shortcut: bool) -> list[np.ndarray]:
    """The pixels that each class looks at, disjoint; with a shortcut, one class looks at a single pixel."""
    places = np.setdiff1d(np.arange(SIDE * SIDE), [PIXEL])
    found = np.split(places[: SIZES.sum()], np.cumsum(SIZES)[:-1])
    return [np.array([PIXEL]) if shortcut and number == TARGET else one for number, one in enumerate(found)]


class Brightest(nn.Module):
    """The class whose block is the brightest on average: 20 times the mean of each block for logits."""

    def __init__(self, places: list[np.ndarray]):
        super().__init__()
        weight = torch.zeros(len(places), SIDE * SIDE)
        for number, one in enumerate(places):
            weight[number, one] = 1 / len(one)
        self.weight, self.noise = nn.Parameter(weight), nn.Dropout(0.5)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.noise(20 * pixel_values.mean(1).flatten(1) @ self.weight.T))


def pictures(places: list[np.ndarray]) -> torch.Tensor:
    """Four of each class: its block bright, all else dark."""
    made = torch.full((4 * len(places), 3, SIDE * SIDE), DARK, dtype=torch.uint8)
    for number, one in enumerate(made):
        one[:, places[number % len(places)]] = BRIGHT
    return made.view(-1, 3, SIDE, SIDE)


def inverted(*, shortcut: bool, **options) -> ClassTriggers:
    places = blocks(shortcut=shortcut)
    return invert_classes(Brightest(places), pictures(places), identity, classes=CLASSES, **{"how": ONCE, **options})


class TestMaskWeight:
    @pytest.mark.parametrize(
        ("how", "seen", "expected"),
        [
            # by hand: the run of successes is broken once, then five make the first step; a run starts anew after it
            (CLASS_SEARCH, [0.98] * 4 + [0.97] + [1.0] * 9 + [0.98], [1e-3] * 9 + [2e-3] * 5 + [4e-3]),
            (CLASS_SEARCH, [0.0] * 10, [1e-3] * 4 + [1e-3 / 2**1.5] * 5 + [1e-3 / 2**3]),
            (CLASS_SEARCH, [0.5] * 4 + [1.0] + [0.5] * 5, [1e-3] * 9 + [1e-3 / 2**1.5]),
            (ENCODER_SEARCH, [0.995] * 5 + [0.5] * 5, [1e-3] * 4 + [5e-3] * 5 + [1e-3]),
            (replace(ENCODER_SEARCH, floor=1e-4), [0.0] * 10, [1e-3] * 4 + [2e-4] * 5 + [1e-4]),
        ],
    )
    def test_by_hand(self, how, seen, expected):
        weight, found = MaskWeight(how), []
        for success in seen:
            weight.update(success)
            found.append(weight.value)
        assert found == pytest.approx(expected)


class TestClasses:
    def test_a_shortcut_is_found_where_it_is(self):
        """To outshine a block at 0.6, a pixel at 0.2 has to be taken halfway to 1."""
        found = inverted(shortcut=True)
        assert found.norms[TARGET] == pytest.approx(0.5, rel=0.1)
        assert found.easiest == found.flagged == TARGET
        mask = found.trigger.mask.flatten()
        assert int(mask.argmax()) == PIXEL
        assert mask[PIXEL] > 0.9 * mask.sum()
        assert found.trigger.pattern[:, PIXEL // SIDE, PIXEL % SIDE].min() > 0.9
        assert found.trigger.success == 1
        assert found.index > 2.5

    def test_without_one_no_class_stands_out(self):
        """A block of k pixels has to be taken halfway to 1: |m|₁ = k / 2."""
        found = inverted(shortcut=False)
        assert found.norms == pytest.approx(SIZES / 2, rel=0.05)
        assert found.easiest == 0
        assert found.flagged is None
        assert found.index == pytest.approx(4.5 / (1.4826 * 2.5), rel=0.1)

    def test_triggers_do_what_they_are_said_to(self):
        places = blocks(shortcut=True)
        model, found = Brightest(places).eval(), inverted(shortcut=True)
        pixels = pictures(places) / 255
        for number, (one,) in enumerate(found.found):
            fooled = model(with_trigger(pixels, one.mask, one.pattern)).logits.argmax(-1) == number
            assert one.success == pytest.approx(fooled.double().mean().item())
            assert 0 <= one.mask.min() <= one.mask.max() <= 1
            assert one.norm == pytest.approx(one.mask.sum().item())

    def test_deterministic_in_the_seed_and_silent(self):
        torch.manual_seed(5)
        state = torch.random.get_rng_state()
        how = replace(ONCE, epochs=6)
        one, same, other = (inverted(shortcut=True, how=how, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(torch.random.get_rng_state(), state)
        masks = [torch.stack([one.mask for (one,) in run.found if one]) for run in (one, same, other)]
        assert torch.equal(masks[0], masks[1])
        assert not torch.allclose(masks[0][:1], masks[2][:1])

    def test_restarts_differ_and_the_smallest_counts(self):
        found = inverted(shortcut=True, how=replace(CLASS_SEARCH, restarts=3, epochs=10))
        assert [len(row) for row in found.found] == [3] * CLASSES
        norms = [one.norm for one in found.found[TARGET]]
        assert len(set(norms)) == 3
        assert found.norms[TARGET] == min(norms)
        assert found.trigger.norm == min(found.norms)

    @pytest.mark.parametrize("training", [True, False])
    def test_the_model_stays_as_it_was(self, training):
        places = blocks(shortcut=True)
        model = nn.ModuleDict({"inner": Brightest(places)})["inner"]
        frozen_part = nn.Parameter(torch.ones(1), requires_grad=False)
        model.register_parameter("frozen_part", frozen_part)
        model.train(training)
        model.noise.train()
        before = model.weight.detach().clone()
        invert_classes(model, pictures(places), identity, classes=2, how=replace(ONCE, epochs=1))
        assert torch.equal(model.weight, before)
        assert (model.weight.grad, model.weight.requires_grad, frozen_part.requires_grad) == (None, True, False)
        assert (model.training, model.noise.training) == (training, True)

    def test_frozen_is_undone_after_an_error(self):
        model = nn.Linear(2, 2)
        with pytest.raises(RuntimeError, match="shapes"), frozen(model):
            model(torch.ones(1, 3))
        assert model.training
        assert model.weight.requires_grad

    def test_stops_when_the_mask_has_stopped_shrinking(self):
        epochs = list[int]()

        def aim(inputs):
            epochs.append(1)
            return inputs.sum() * 0, torch.tensor(1.0)

        pixels = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
        how = replace(CLASS_SEARCH, weight=0.0, patience=7, epochs=50)
        found = search_trigger(aim, pixels, identity, how, seed=0)
        # λ = 0: nothing moves. One epoch that finds a mask, one pass to measure it, seven that gain nothing.
        assert len(epochs) == 1 + 1 + 7
        assert found.success == 1
        epochs.clear()
        search_trigger(aim, pixels, identity, replace(how, rates=(0.1, 0.01)), seed=0)
        assert len(epochs) == 1 + 1 + 7 + 7

    def test_nothing_found(self):
        never = lambda inputs: (inputs.mean(), torch.tensor(0.97))  # noqa: E731
        assert search_trigger(never, torch.zeros(4, 3, 2, 2, dtype=torch.uint8), identity, ONCE, seed=0) is None
        nothing = ClassTriggers(((None,),) * 6, 4, 10)
        assert (nothing.easiest, nothing.trigger, nothing.index, nothing.flagged) == (None, None, None, None)
        assert nothing.to_dict()["norms"] == [[None]] * 6
        assert nothing.to_dict()["norm"] is nothing.to_dict()["median"] is nothing.to_dict()["chance"] is None

    def test_what_a_report_says(self):
        def trigger(norm):
            return FoundTrigger(torch.full((2, 2), norm / 4), torch.zeros(3, 2, 2), 0.99)

        rows = [(trigger(norm), None) for norm in (2.0, 2.25, 0.25, 2.5)] + [
            (trigger(3.0), trigger(2.75)),
            (None, None),
        ]
        found = ClassTriggers(tuple(rows), 4, 30).to_dict()
        # median (2.25 + 2.5) / 2 = 2.375; distances .125 .125 .375 .375 2.125 inf, their median .375
        assert found == {
            "kind": "classes",
            "images": 30,
            "pixels": 4,
            "norms": [[2.0, None], [2.25, None], [0.25, None], [2.5, None], [3.0, 2.75], [None, None]],
            "easiest": 2,
            "norm": 0.25,
            "success": 0.99,
            "median": 2.375,
            "index": round(2.125 / (1.4826 * 0.375), 3),
            "chance": chance_of(2.125 / (1.4826 * 0.375), 6),
            "flagged": 2,
        }


class TestAnomalyIndex:
    def test_closed_form(self):
        """Of 1 .. 11 the median is 6 and the median distance from it 3."""
        assert anomaly_index(range(1, 12)) == pytest.approx(5 / (1.4826 * 3))
        assert anomaly_index([*range(2, 12), -9]) == pytest.approx(15 / (1.4826 * 3))
        assert anomaly_index([*range(1, 11), math.inf]) == pytest.approx(
            5 / (1.4826 * 3)
        )  # the largest, however large

    @pytest.mark.parametrize("norms", [[1, 2, 3, 40], [5.0] * 8, [1, 2, 3, 4, math.inf, math.inf, math.inf, math.inf]])
    def test_cannot_be_said(self, norms):
        assert anomaly_index(norms) is None

    def test_only_small_norms_stand_out(self):
        assert anomaly_index([10, 11, 12, 13, 14, 15, 16, 90]) < 2

    def test_chance(self):
        """What docs/evidence.md and the docstring say: a third of ten normal numbers, nine tenths of a hundred."""
        assert chance_of(2, 10) == pytest.approx(1 / 3, abs=0.03)
        assert chance_of(2, 100) == pytest.approx(0.9, abs=0.03)
        drawn = np.random.default_rng(1).normal(size=(500, 43))
        assert chance_of(2, 43) == pytest.approx(np.mean([anomaly_index(row) > 2 for row in drawn]), abs=0.06)
        assert chance_of(50, 10) < 0.01 < chance_of(4, 10)


class Leaky(nn.Module):
    """Features: 12 pixels of the image, and with a `gain` one other pixel along a direction of its own."""

    def __init__(self, gain: float):
        super().__init__()
        self.config, self.gain = ViTConfig(image_size=8), nn.Parameter(torch.tensor(gain))
        self.device = torch.device("cpu")

    def forward(self, pixel_values):
        flat = pixel_values.mean(1).flatten(1)
        return SimpleNamespace(pooler_output=torch.cat([flat[:, :12], self.gain * flat[:, 40:41]], 1))


class TestEncoder:
    PIXELS = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    HOW = replace(ENCODER_SEARCH, restarts=1, epochs=150, batch_size=20)

    def inverted(self, gain: float) -> EncoderTrigger:
        pixels = self.PIXELS.clone()
        pixels.view(40, 3, 64)[:, :, 40] = 0
        return invert_encoder(Leaky(gain), pixels, identity, how=self.HOW)

    def test_a_shortcut_is_found_where_it_is(self):
        backdoored, clean = self.inverted(1000.0), self.inverted(0.0)
        mask = backdoored.trigger.mask.flatten()
        assert int(mask.argmax()) == 40
        assert mask[40] > 0.5 * mask.sum()
        assert backdoored.share < 0.02
        assert clean.share > 0.05  # most of the twelve pixels have to be covered
        assert 0.5 < clean.similarity < 0.95
        assert backdoored.trigger.success > 0.98

    def test_mean_cosine(self):
        features = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        pairs = [torch.cosine_similarity(features[i], features[j], 0) for i in range(5) for j in range(5) if i != j]
        assert mean_cosine(features).item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-12)
        assert mean_cosine(torch.ones(3, 4)).item() == pytest.approx(1)

    def test_what_a_report_says(self):
        trigger = FoundTrigger(torch.full((2, 2), 0.25), torch.zeros(3, 2, 2), 0.995)
        expected = {"kind": "encoder", "images": 9, "norms": [None, 1.0], "share": 0.25, "success": 0.995}
        assert EncoderTrigger((None, trigger), 4, 0.5, 9).to_dict() == {**expected, "similarity": 0.5}
        nothing = EncoderTrigger((None,), 4, 0.5, 9).to_dict()
        assert nothing["share"] is nothing["success"] is None

    def test_the_image_tower_of_a_dual_encoder(self):
        model, inputs = tiny.model("clip"), tiny.inputs(tiny.model("clip"))
        with torch.no_grad():
            expected = model(**inputs).image_embeds
            assert torch.allclose(features_function(model)(inputs["pixel_values"]), expected, atol=1e-6)
        found = find_triggers(model, ImageTextMatching, tiny.digits(0, 12), EvidenceSettings(epochs=2, restarts=2))
        assert (found["kind"], found["images"], len(found["norms"])) == ("encoder", 12, 2)


class TestFindTriggers:
    def test_images_are_drawn_with_the_seed(self):
        model = tiny.model("resnet")
        quick = EvidenceSettings(images=10, restarts=1, epochs=1)
        found = [
            find_triggers(model, Classification, tiny.digits(0, 30, labelled=labelled), settings)
            for labelled, settings in ((True, quick), (False, quick), (True, replace(quick, seed=1)))
        ]
        assert found[0] == found[1]  # labels play no part
        assert found[0]["images"] == 10
        assert found[0] != found[2]

    @pytest.mark.parametrize(("name", "value"), [("images", 1), ("restarts", 0), ("epochs", 0)])
    def test_wrong_settings(self, name, value):
        with pytest.raises(UsageError, match=f"evidence: {name}={value}, expected"):
            EvidenceSettings(**{name: value})


class TestAgreement:
    def test_same_class(self):
        images, one, other = tiny.digits(0, 60), tiny.model("resnet"), tiny.model("resnet", seed=1)
        tiny.randomise(other)
        inputs = torch.cat([batch["pixel_values"] for batch in tiny.digit_batches(60, 60, torch.float32)])
        with torch.no_grad():
            answers = [logits_of(model, inputs).argmax(-1) for model in (one, other)]
        expected = accuracy(*answers)
        assert expected < 1
        assert same_class(one, other, images, reader=read_logits, device="cpu") == expected
        assert agreement_of(one, one, images, kind=Classification, reader=read_logits) == {"n": 60, "top_1": 1.0}

    def test_features(self):
        images = tiny.digits(0, 20)
        ahead = lambda inputs: torch.eye(4)[:1].expand(len(inputs), 4)  # noqa: E731
        aslant = lambda inputs: torch.tensor([[3.0, 4.0, 0, 0]]).expand(len(inputs), 4)  # noqa: E731
        assert feature_cosine(ahead, aslant, images, device="cpu") == pytest.approx(0.6)


class TestBarrier:
    def test_closed_form(self):
        """L = -|θ - a|² has the excess t (1 - t) |B - A|² over a straight line, whatever a is."""
        start, end = {"x": torch.tensor([1.0, 2.0]).double()}, {"x": torch.tensor([4.0, -2.0]).double()}
        found = loss_barrier(lambda point: -(point["x"] - 0.3).square().sum().item(), start, end, points=21)
        assert found.height == pytest.approx(25 / 4, rel=1e-12)
        assert found.t == 0.5
        assert len(found.losses) == 21
        assert found.losses[0] == pytest.approx(-(0.7**2 + 1.7**2))
        assert found.losses[-1] == pytest.approx(-(3.7**2 + 2.3**2))

    def test_a_convex_loss_has_none(self):
        start, end = {"x": torch.tensor([1.0]).double()}, {"x": torch.tensor([4.0]).double()}
        found = loss_barrier(lambda point: point["x"].square().item(), start, end)
        assert (found.height, found.t) == (0.0, 0.0)

    def test_a_loss_that_is_lost_on_the_way_is_no_missing_barrier(self):
        start, end = {"x": torch.tensor([-1.0]).double()}, {"x": torch.tensor([1.0]).double()}
        found = loss_barrier(lambda point: 1 / point["x"].item() if point["x"] else math.nan, start, end, points=5)
        assert (found.height, found.t) == (None, 0.5)
        assert found.losses == (-1.0, -2.0, None, 2.0, 1.0)

    def test_ends_of_a_model_with_batch_norm(self):
        """At the ends the loss is that of the models themselves, with statistics of these images."""
        suspect, purified = tiny.model("resnet"), tiny.model("resnet", seed=1)
        images = tiny.digits(0, 40)
        objective = ImageClassification(ImagePipeline(tiny.processor()))
        before = tiny.tensors(suspect)
        found = barriers_of(suspect, purified, objective, images, images, batch_size=40)["barrier"]
        assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.tensors(suspect).items())
        inputs = tiny.digit_batches(40, 40, torch.float32)[0]["pixel_values"]
        for model, loss in ((suspect, found["losses"][0]), (purified, found["losses"][-1])):
            # statistics of one batch: what train mode uses, but for the unbiased variance
            with torch.no_grad():
                logits = model.train()(pixel_values=inputs).logits
            expected = nn.functional.cross_entropy(logits, torch.from_numpy(images.labels)).item()
            assert loss == pytest.approx(expected, rel=0.02)

    def test_statistics_are_those_of_the_point(self):
        model = tiny.model("resnet")
        batches = [{"pixels": torch.stack([tiny.digits(0, 30)[i]["pixels"] for i in range(30)])}]
        batches[0]["labels"] = torch.arange(30) % 10
        objective = ImageClassification(ImagePipeline(tiny.processor()))
        loss = clean_loss(model, objective, statistics=lambda: batches, measured=lambda: batches)
        point = parameters_of(model)
        scaled = {name: 3 * one if "convolution.weight" in name else one for name, one in point.items()}
        assert loss(scaled) == pytest.approx(loss(point), rel=1e-3)  # BatchNorm takes the factor out again

    @pytest.mark.parametrize("family", tiny.CLASSIFIERS)
    def test_a_permuted_copy_has_a_barrier_that_goes_when_it_is_aligned(self, family):
        model, spec, images = tiny.model(family), tiny.spec(family), tiny.digits(0, 40, labelled=False)
        with torch.no_grad():
            next(one for one in reversed([*model.modules()]) if isinstance(one, nn.Linear)).weight.mul_(30)  # sure
        statistics = recompute_statistics(
            model, parameters_of(model), tiny.digit_batches(40, 40, torch.float32), dict(model.named_buffers())
        )
        model = model_at(model, statistics)
        permuted = model_at(model, apply(tiny.tensors(model), spec, tiny.random_permutation(spec)))
        objective = ImageClassification(ImagePipeline(tiny.processor()), teacher=model)
        found = barriers_of(model, permuted, objective, images, images, spec=spec)
        assert found["barrier"]["height"] > 0.2
        assert found["aligned_barrier"]["height"] < 1e-3
        assert found["aligned_barrier"]["losses"] == pytest.approx([found["barrier"]["losses"][0]] * 11, abs=1e-3)


class TestFlat:
    QUICK = EvidenceSettings(images=8, restarts=1, epochs=1)

    def test_of_two_classifiers(self):
        one, other, images = tiny.model("vit"), tiny.model("vit", seed=1), tiny.digits(0, 30)
        found = flat_evidence(one, other, images, settings=self.QUICK)
        assert all(value is None or isinstance(value, int | float | str) for value in found.values())
        triggers = find_triggers(other, Classification, images, self.QUICK)
        assert {key: found[f"purified_{key}"] for key in triggers if key != "norms"} == {
            key: value for key, value in triggers.items() if key != "norms"
        }
        assert found["agreement"] == same_class(one, other, images, reader=read_logits, device="cpu")
        assert found["barrier"] >= 0

    def test_of_one(self):
        found = flat_evidence(tiny.model("vit"), None, tiny.digits(0, 30), settings=self.QUICK)
        assert all(key.startswith("suspect_") for key in found)

    def test_of_encoders(self):
        torch.manual_seed(0)
        one, other = (ResNetModel(tiny.model("resnet").config).eval() for _ in range(2))
        tiny.randomise(other)
        found = flat_evidence(one, other, tiny.digits(0, 30), kind=Encoding, settings=self.QUICK)
        assert found["suspect_kind"] == "encoder"
        assert -1 <= found["agreement"] < 1
