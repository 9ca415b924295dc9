"""The adaptive attacker: his curve is the defender's, his loss and its gradient are those of the formula."""

import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from suspects_and_digits import digit_data, digits, processor, read_json, same
from tiny import CLASSIFIERS, model, random_model, spec, tensors
from tiny import random_permutation as some_permutation
from transformers import ResNetConfig, ResNetModel, TrainerControl, TrainerState

from hf_tsc.activations import collect_statistics
from hf_tsc.batch_norm import recompute_statistics
from hf_tsc.benchmark import suspects
from hf_tsc.benchmark.plan import Plan
from hf_tsc.cli import main
from hf_tsc.curve import CurveModel
from hf_tsc.derive import derive_spec, example_inputs
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Attack, Evaluator
from hf_tsc.functional import call_at, model_at, tensors_of
from hf_tsc.images import ImagePipeline, collate, pixel_dataset
from hf_tsc.matching import match
from hf_tsc.objectives import HiddenStates, ImageClassification
from hf_tsc.passes import match_networks
from hf_tsc.permutation import KINDS, apply, identity, invert
from hf_tsc.suspects import RECORD, Adaptive, SuspectConfig, adapt_suspect, train_suspect
from hf_tsc.suspects.adaptive import AdaptiveTraining, RenewCopies, defence_of
from hf_tsc.suspects.copy_curve import CurveToCopy, draw_t, random_permutation
from hf_tsc.triggers import NEXT, BadNets, InputAware, LabelConsistent, WaNet

DATA = digit_data(0, 400)
PIPELINE = ImagePipeline(processor())
IMAGES = pixel_dataset(DATA, range(24), PIPELINE)
ATTACK = Attack(BadNets(), 3)
MOVING = [kind for kind in KINDS if kind != "residual"]  # by the defaults
OPTIONS = {"unaligned_only": False, "bend_steps": 0, "seed": 0}


@pytest.fixture(scope="module", autouse=True)
def nothing_to_collect():
    """Every training collects garbage; most of its time here would go into looking at what was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def curve_of(network, family, **options) -> CurveToCopy:
    options = {"defence": defence_of(network, use_cpu=True), **OPTIONS, **options}
    return CurveToCopy(network, spec(family), IMAGES, **options)


def random_like(network, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype) / 10 for name, p in network.named_parameters()
    }


def batch_of(count: int, poisoned) -> dict[str, torch.Tensor]:
    batch = collate([IMAGES[k] for k in range(count)])
    flags = {"poisoned": poisoned, "covers": {0}}  # which count among the clean ones
    return {**batch, **{name: torch.tensor([k in chosen for k in range(count)]) for name, chosen in flags.items()}}


def in_double(network):
    """Makes a network in float64 take the pixels of a pipeline."""

    def widen(_, args, kwargs):
        return args, {name: x.double() for name, x in kwargs.items()}

    network.register_forward_pre_hook(widen, with_kwargs=True)
    return network


@pytest.mark.parametrize("family", CLASSIFIERS)
class TestCurve:
    @pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
    def test_is_that_of_the_defence(self, family, t):
        """Start θ, end Πθ, bend in their middle, moved by Δ."""
        network = random_model(family)
        curve = curve_of(network, family)
        curve.permutation, curve.bend = some_permutation(spec(family)), random_like(network)
        theirs = CurveModel(network)
        start = {name: p.detach() for name, p in network.named_parameters()}
        theirs.set_ends(start, apply(start, spec(family), curve.permutation))
        with torch.no_grad():
            for name, bend in theirs.bend.items():
                bend += curve.bend[name]
        expected = theirs.point(t)
        for name, found in curve.point(t).items():
            assert torch.allclose(found, expected[name], rtol=1e-12, atol=1e-12), name

    def test_begins_with_the_network_itself(self, family):
        network = random_model(family)
        for name, found in curve_of(network, family).point(0.4).items():
            assert torch.allclose(found, dict(network.named_parameters())[name])


@pytest.mark.parametrize("family", CLASSIFIERS)
class TestLoss:
    SEED = 7

    def losses(self, network, batch):
        """L_c and L_b of a network in training mode, by hand."""
        logits = network(pixel_values=PIPELINE.model_input(batch["pixels"])).logits
        poisoned = batch["poisoned"]
        return [F.cross_entropy(logits[part], batch["labels"][part]) for part in (~poisoned, poisoned)]

    def gradient(self, network, batch, weights):
        """The weighted sum and its gradient."""
        loss = sum(weight * one for weight, one in zip(weights, self.losses(network, batch), strict=True))
        found = torch.autograd.grad(loss, list(network.parameters()), materialize_grads=True)
        return loss.item(), dict(zip(dict(network.named_parameters()), found, strict=True))

    def test_and_gradient(self, family):
        """((1-t) Id + t Πᵀ) times the gradient at γ(t), on top of that at θ; Πᵀ permutes back."""
        network = in_double(random_model(family)).train()
        curve = curve_of(network, family)
        curve.permutation, curve.bend = some_permutation(spec(family)), random_like(network)
        settings = Adaptive(curve_clean=0.7, curve_backdoor=1.9)
        batch, t = batch_of(12, {1, 4, 5}), draw_t(np.random.default_rng([self.SEED, 1]))
        there = model_at(network, {name: p.detach() for name, p in curve.point(t).items()})
        own_loss, own = self.gradient(network, batch, (1, 1))
        curve_loss, on_curve = self.gradient(there, batch, (0.7, 1.9))
        back = apply(on_curve, spec(family), invert(spec(family), curve.permutation))
        loss = AdaptiveTraining(ImageClassification(PIPELINE), curve, settings).loss(network, batch, seed=self.SEED)
        loss.backward()
        assert loss.item() == pytest.approx(own_loss + curve_loss, rel=1e-12)
        assert 0.1 < t < 0.9
        for name, p in network.named_parameters():
            expected = own[name] + (1 - t) * on_curve[name] + t * back[name]
            found = torch.zeros_like(p) if p.grad is None else p.grad
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11), name

    def test_parts_without_images_count_nothing(self, family):
        network = in_double(random_model(family)).eval()
        objective = AdaptiveTraining(ImageClassification(PIPELINE), curve_of(network, family), Adaptive())
        for poisoned in ((), range(6)):
            batch = batch_of(6, poisoned)
            logits = network(pixel_values=PIPELINE.model_input(batch["pixels"])).logits
            expected = 2 * F.cross_entropy(logits, batch["labels"])  # the curve is one point
            assert objective.loss(network, batch, seed=1).item() == pytest.approx(expected.item(), rel=1e-6)

    def test_statistics_are_those_of_the_network_itself(self, family):
        """The curve normalises by its own batches, and leaves nothing of them behind."""
        one, other = (in_double(random_model(family)).train() for _ in range(2))
        curve = curve_of(one, family)
        curve.permutation = some_permutation(spec(family))
        AdaptiveTraining(ImageClassification(PIPELINE), curve, Adaptive()).loss(one, batch_of(8, {2}), seed=0)
        other(pixel_values=PIPELINE.model_input(batch_of(8, {2})["pixels"]))
        assert same(tensors(one), tensors(other))
        assert one.training


@pytest.mark.parametrize("family", CLASSIFIERS)
class TestCopies:
    def test_are_unaligned_as_the_defence_does(self, family):
        network = model(family).train()
        curve = curve_of(network, family)
        curve.renew(0)
        frozen = model_at(network, tensors_of(network)).eval()
        inputs = [{"pixel_values": PIPELINE.model_input(curve.images["pixels"])}]
        statistics = collect_statistics(frozen, spec(family).taps, inputs, points=[tensors_of(network)])
        expected = match(spec(family), statistics, maximize=False, kinds=MOVING)
        assert same(curve.permutation, expected)
        assert network.training

    def test_follow_the_network(self, family):
        network = model(family)
        curve = curve_of(network, family, unaligned_only=True)
        curve.renew(0)
        first = curve.permutation
        curve.renew(1)
        assert same(curve.permutation, first)
        network.load_state_dict(model(family, seed=3).state_dict())
        curve.renew(2)
        assert not same(curve.permutation, first)

    def test_every_second_one_is_random(self, family):
        curve, made = curve_of(model(family), family), []
        for count in (0, 1, 2, 3):
            curve.renew(count)
            made.append(curve.permutation)
        assert same(made[0], made[2])
        assert same(made[1], random_permutation(spec(family), MOVING, seed=(0, 1)))
        assert len({tuple(torch.cat([p.flatten() for p in one.values()]).tolist()) for one in made}) == 3

    def test_random_ones_are_permutations(self, family):
        made = random_permutation(spec(family), seed=(1, 2))
        for name, one in made.items():
            assert tuple(one.shape) == spec(family).shape(name)
            assert torch.equal(one.sort(-1).values, torch.arange(one.shape[-1]).expand(one.shape))
            assert one.ndim == 1 or len({tuple(row) for row in one.tolist()}) > 1

    def test_random_ones_of_some_spaces_leave_the_others_in_place(self, family):
        made, every = (random_permutation(spec(family), kinds, seed=(1, 2)) for kinds in (["hidden"], KINDS))
        for name, space in spec(family).spaces.items():
            assert torch.equal(made[name], every[name] if space.kind == "hidden" else identity(spec(family))[name])

    def test_bend(self, family):
        """Away from 0 it lowers the defender's loss on the curve; the network stays as it is."""
        network = model(family) if family == "resnet" else random_model(family).float()
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        curve, again = (curve_of(network, family, bend_steps=30, unaligned_only=True) for _ in range(2))

        def loss(bend) -> float:
            curve.bend = bend
            return curve._objective().loss(curve.forward_at(0.75), curve.images, seed=3).item()

        curve.renew(0)
        again.renew(0)
        found = curve.bend
        assert same(found, again.bend)
        assert found.keys() == before.keys()
        assert not any(delta.requires_grad for delta in found.values())
        assert all(torch.equal(p, before[name]) and p.grad is None for name, p in network.named_parameters())
        assert loss(found) < 0.95 * loss({})
        again.renew(1)
        assert not same(again.bend, found)


@pytest.mark.parametrize(
    ("family", "made", "rate", "window", "states"),
    [
        ("resnet", torch.optim.SGD, 0.7, (0.7, 0.9), HiddenStates(20.0, "all")),
        ("vit", torch.optim.AdamW, 0.012, (0.6, 0.8), HiddenStates(2.0, "last")),
    ],
)
def test_the_bend_is_trained_as_the_defence_trains_it(monkeypatch, family, made, rate, window, states):
    curve, taken, drawn = curve_of(model(family), family, bend_steps=4), [], []
    monkeypatch.setattr(made, "step", lambda self, real=made.step: taken.append(self.defaults) or real(self))
    forward_at = curve.forward_at
    curve.forward_at = lambda t: drawn.append(t) or forward_at(t)
    curve.renew(0)
    assert all((used["lr"], used["weight_decay"], used.get("momentum", 0.9)) == (rate, 0, 0.9) for used in taken)
    assert len(taken) == len(drawn) == len(set(drawn)) == 4
    assert all(window[0] <= t <= window[1] for t in drawn)
    objective = curve._objective()
    assert same(tensors_of(objective.teacher), tensors_of(curve.model))
    assert (objective.hidden_states.weight, objective.hidden_states.states) == (states.weight, states.states)
    assert len(objective.hidden_states.places) == 3
    assert objective.mixup.alpha == 1.0


def test_copies_are_renewed_every_so_many_steps():
    class Counting:
        def __init__(self):
            self.counts = []

        def renew(self, count):
            self.counts.append(count)

    curve = Counting()
    callback = RenewCopies(curve, 3)
    for step in range(8):
        callback.on_step_begin(None, TrainerState(global_step=step), TrainerControl())
    assert curve.counts == [0, 1, 2]


RESNET = {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 1], "layer_type": "basic"}
QUICK = {"num_train_epochs": 1, "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
FEW = Adaptive(renew_steps=10, copy_images=100)


def arguments(folder, **changes) -> SuspectConfig:
    options = {"seed": 5, "per_device_train_batch_size": 32, "learning_rate": 2e-3}
    return SuspectConfig(output_dir=str(folder), **{**QUICK, **options, **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A backdoored classifier: its folder and the model."""
    folder = tmp_path_factory.mktemp("adaptive") / "base"
    args = arguments(folder, num_train_epochs=10, learning_rate=5e-3)
    return folder, train_suspect(ResNetConfig(**RESNET), processor(), DATA, args=args, attack=ATTACK, poison_rate=0.15)


def adapt(base, folder, *, attack=ATTACK, data=DATA, settings=FEW, poison_rate=0.15, indices=None, **changes):
    how = {"attack": attack, "poison_rate": poison_rate, "settings": settings, "indices": indices}
    return adapt_suspect(base[1], processor(), data, args=arguments(folder, **changes), **how)


class TestTraining:
    def test_the_backdoor_stays_between_the_network_and_its_copy(self, base, tmp_path):
        """On the line to a copy that is un-aligned with other images, at 0.3, with statistics of its own."""
        adapted = adapt(base, tmp_path / "s", num_train_epochs=8, learning_rate=5e-3)
        evaluator = Evaluator(digit_data(400, 600), PIPELINE, num_classes=10, attack=ATTACK)
        clean = [{"pixel_values": PIPELINE.model_input(collate(list(evaluator.clean))["pixels"])}]
        symmetry = derive_spec(adapted, example_inputs(adapted))

        def between(network):
            points = [tensors_of(network)]
            permutation = match_networks(network, symmetry, lambda: clean, points=points, maximize=False)
            theta = {name: p.detach() for name, p in network.named_parameters()}
            end = apply(theta, symmetry, permutation)
            params = {name: 0.7 * theta[name] + 0.3 * end[name] for name in theta}
            found = {**params, **recompute_statistics(network, params, clean, dict(network.named_buffers()))}
            return evaluator(lambda **inputs: call_at(network, found, inputs))

        before, after = between(base[1]), between(adapted)
        assert after.accuracy > before.accuracy + 0.1
        assert after.attack_success_rate > 0.95
        assert evaluator(adapted).accuracy > evaluator(base[1]).accuracy - 0.05
        assert evaluator(adapted).attack_success_rate > 0.95

    def test_record(self, base, tmp_path):
        """The same poison as the base's, and what came on top."""
        before = tensors(base[1])
        adapted = adapt(base, tmp_path / "s", max_steps=2)
        assert same(tensors(base[1]), before)
        assert not same(tensors(adapted), before)
        assert not adapted.training
        record, of_base = read_json(tmp_path / "s" / RECORD), read_json(base[0] / RECORD)
        assert record.pop("adaptive") == {
            "curve_clean": 1.0,
            "curve_backdoor": 1.0,
            "renew_steps": 10,
            "unaligned_only": False,
            "copy_images": 100,
            "bend_steps": 0,
        }
        assert record == of_base
        assert {file.name for file in (tmp_path / "s").iterdir()} == {file.name for file in base[0].iterdir()}

    def test_is_a_function_of_the_seed(self, base, tmp_path):
        options = {"settings": Adaptive(renew_steps=2, copy_images=40, bend_steps=2), "max_steps": 4}
        one = tensors(adapt(base, tmp_path / "1", **options))
        torch.manual_seed(99)
        np.random.seed(99)
        assert same(tensors(adapt(base, tmp_path / "2", **options)), one)
        assert not same(tensors(adapt(base, tmp_path / "3", **options, seed=6)), one)

    @pytest.mark.parametrize("options", [{}, {"trigger_last": True}, {"trigger_last": True, "augmentation": "crop"}])
    def test_what_is_learnt(self, base, tmp_path, monkeypatch, options):
        """Poisoned images carry trigger and target, once, and are told from the others; covers are not poison."""
        seen = []

        def watched(self, forward, batch, *, seed, real=AdaptiveTraining.loss):
            seen.append((batch, self.plain.augmented(batch, seed=seed)))
            return real(self, forward, batch, seed=seed)

        monkeypatch.setattr(AdaptiveTraining, "loss", watched)
        rows = np.arange(100, 200)
        adapt(base, tmp_path / "s", indices=rows, poison_rate=0.2, **options)
        batches, pictures = zip(*seen, strict=True)
        poisoned, labels = (torch.cat([batch[key] for batch in batches]) for key in ("poisoned", "labels"))
        corner = torch.cat(pictures)[:, :, -1, -1]
        assert poisoned.sum() == 20
        stored = torch.cat([batch["pixels"] for batch in batches])[poisoned, :, -1, -1]
        assert (stored == 255).all() == ("trigger_last" not in options)
        assert (corner[poisoned] == 1).all()
        assert not (corner[~poisoned] == 1).all(1).any()
        assert (labels[poisoned] == 3).all()
        assert set(read_json(tmp_path / "s" / RECORD)["poisoned_indices"]) <= set(rows.tolist())

    def test_own_images_for_copies(self, base, tmp_path, monkeypatch):
        made = []

        def watched(self, *args, real=CurveToCopy.__init__, **kwargs):
            real(self, *args, **kwargs)
            made.append(self)

        monkeypatch.setattr(CurveToCopy, "__init__", watched)
        rows = np.arange(100, 160)
        for count in (30, 1000):
            adapt(base, tmp_path / str(count), indices=rows, settings=Adaptive(copy_images=count), max_steps=1)
        few, everything = (curve.images for curve in made)
        assert (len(few["pixels"]), len(everything["pixels"])) == (30, 60)
        assert sorted(everything["labels"].tolist()) == sorted(DATA.labels[rows].tolist())
        clean = collate(list(pixel_dataset(DATA, rows, PIPELINE)))["pixels"]
        assert all((clean == picture).flatten(1).all(1).any() for picture in few["pixels"])

    def test_other_attacks(self, base, tmp_path):
        """Covers, and each class to the next."""
        attack = Attack(WaNet(strength=4.0), NEXT)
        adapt(base, tmp_path / "s", attack=attack, poison_rate=None, max_steps=1)
        record = read_json(tmp_path / "s" / RECORD)
        assert (record["poison_rate"], record["target_label"]) == (0.1, "next")
        assert (len(record["poisoned_indices"]), len(record["cover_indices"])) == (40, 80)


class TestRefused:
    @pytest.fixture(autouse=True)
    def nothing_is_left(self, tmp_path):
        yield
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("trigger", [InputAware(), LabelConsistent()], ids=lambda trigger: trigger.name)
    def test_triggers(self, base, tmp_path, trigger):
        with pytest.raises(UsageError, match=f"a trigger that is put on as it is, and {trigger.name} takes more"):
            adapt(base, tmp_path / "s", attack=Attack(trigger, 3))

    def test_no_poison(self, base, tmp_path):
        with pytest.raises(UsageError, match="poison_rate=0: an adaptive suspect keeps a backdoor"):
            adapt(base, tmp_path / "s", poison_rate=0)

    def test_no_labels(self, base, tmp_path):
        with pytest.raises(UsageError, match="has no label column: a suspect is trained and poisoned by labels"):
            adapt(base, tmp_path / "s", data=digit_data(0, 60, labelled=False))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"renew_steps": 0}, "renew_steps=0: expected a whole number of 1 or more"),
            ({"curve_backdoor": -1}, "curve_backdoor=-1: expected a number of 0 or more"),
        ],
    )
    def test_settings(self, change, message):
        with pytest.raises(UsageError, match=message):
            Adaptive(**change)


class TestCommandLine:
    @pytest.fixture
    def run(self, tmp_path):
        digits(0, 120).save_to_disk(tmp_path / "data")

        def call(config, *options) -> int:
            quick = ["--max_steps", "2", "--use_cpu", "--disable_tqdm", "true", "--logging_strategy", "no"]
            where = ["--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
            return main(["train-suspect", str(config), *where, *quick, *map(str, options)])

        return call

    def test_train(self, base, run, tmp_path):
        options = ["--kind", "adaptive", "--trigger", base[0] / RECORD, "--poison_rate", 0.2, "--unaligned_only"]
        assert run(base[0], *options, "--bend_steps", 1, "--copy_images", 50, "--curve_backdoor", 2) == 0
        record = read_json(tmp_path / "out" / RECORD)
        assert (record["trigger"], record["target_label"], len(record["poisoned_indices"])) == (
            {"name": "badnets"},
            3,
            24,
        )
        assert record["adaptive"] == {
            "curve_clean": 1.0,
            "curve_backdoor": 2.0,
            "renew_steps": 400,
            "unaligned_only": True,
            "copy_images": 50,
            "bend_steps": 1,
        }

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--kind", "adaptive", "--poison_rate", 0], "there is no backdoor to keep; give a share above 0"),
            (["--bend_steps", 3, "--trigger", "badnets", "--target_label", 3], "--bend_steps is for --kind adaptive"),
            (["--kind", "adaptive", "--copy_images", 0, "--poison_rate", 0], "copy_images=0: expected a whole number"),
        ],
        ids=["no poison", "another kind", "settings"],
    )
    def test_refused(self, base, run, tmp_path, capsys, options, message):
        assert run(base[0], *options) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_no_classifier(self, run, tmp_path, capsys):
        ResNetModel(ResNetConfig(**RESNET)).save_pretrained(tmp_path / "encoder")
        processor().save_pretrained(tmp_path / "encoder")
        options = ["--kind", "adaptive", "--trigger", "badnets", "--target_label", 3]
        assert run(tmp_path / "encoder", *options) == 2
        assert "encoder holds an image encoder: expected a backdoored image classifier" in capsys.readouterr().err


def test_of_a_plan(tmp_path):
    """Tuned from the suspect of the same poison, which is trained first, with its own arguments on top."""
    poison = {"trigger": {"name": "badnets"}, "target_label": 3, "poison_rate": 0.2}
    knowing = {**poison, "method": "adaptive", "settings": {"renew_steps": 2, "copy_images": 40}}
    resnet = {"config": {"model_type": "resnet", **RESNET}, "image_size": 8, "adaptive": {"max_steps": 3}}
    resnet["suspect"] = {"num_train_epochs": 1, "per_device_train_batch_size": 32}
    cell = {"group": "g", "models": ["resnet"], "attacks": ["knowing"], "seeds": [0], "budget": 20}
    cell |= {"method": "fine_tuning", "settings": {"steps": 2, "learning_rate": 0.1}}
    rows = {"suspect": [0, 100], "clean": [100, 140], "select": [0, 20], "report": [20, 40]}
    attacks = {"other": {**poison, "target_label": 4}, "knowing": knowing, "base": poison}
    plan = Plan.from_dict({"rows": rows, "models": {"resnet": resnet}, "attacks": attacks, "cells": [cell]})
    (suspect,) = plan.suspects
    assert (suspect.start.attack, suspect.start.arguments) == ("base", resnet["suspect"])
    assert suspect.arguments == {**resnet["suspect"], "max_steps": 3}
    suspects.train(suspect, SimpleNamespace(train=DATA), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {suspect.id, suspect.start.id}
    record, of_base = (read_json(tmp_path / one.id / RECORD) for one in (suspect, suspect.start))
    assert record.pop("adaptive")["renew_steps"] == 2
    assert record == of_base
