"""Query-based reactivation: what G is trained for, what it may change, and when it wakes a backdoor up."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from suspects_and_digits import classifier, digit_data, processor, same
from tiny import LABELS, randomise, tensors
from torch import nn

from hf_tsc import reactivation
from hf_tsc.errors import PurificationError, UsageError
from hf_tsc.evaluation import Attack, Evaluator
from hf_tsc.images import ImagePipeline, pixel_dataset, to_unit_interval
from hf_tsc.reactivation import Perturbation, Reactivation, check_side, reactivate, train_perturbation
from hf_tsc.triggers import NEXT, Blended

DATA = digit_data(0, 500)
ROWS = np.arange(20, 420)[::-1]
PIPELINE = ImagePipeline(processor())
TARGET = 3
ATTACK = Attack(Blended(), TARGET)
QUICK = Reactivation(images=60, poisoned=40, hidden=16, epochs=2, batch_size=32)
TEST = Evaluator(DATA, PIPELINE, num_classes=LABELS, indices=range(420, 500), attack=ATTACK)


def pixels(rows, trigger=None) -> torch.Tensor:
    found = pixel_dataset(DATA, rows, PIPELINE, trigger=trigger)
    return torch.stack([found[i]["pixels"] for i in range(len(found))])


def trio():
    """Three random classifiers."""
    models = [classifier(family).eval() for family in ("resnet", "vit", "resnet")]
    for number, model in enumerate(models):
        randomise(model, seed=number)
    return models


def run(models, *, settings=QUICK, data=DATA, rows=ROWS, evaluator=TEST, seed=0, **changes):
    return reactivate(*models, data, rows, evaluator, dataclasses.replace(settings, **changes), seed=seed)


class TestPerturbation:
    @pytest.mark.parametrize("epsilon", [0.0, 1e-3, 16 / 255, 1.0])
    def test_stays_near_and_in_range(self, epsilon):
        """Also of a G that says 1 or -1 everywhere, on pictures with black and white in them."""
        change = Perturbation((3, 8, 8), epsilon=epsilon, hidden=16, seed=0).requires_grad_(False)
        x = to_unit_interval(pixels(range(20)))
        for scale in (1, 1e6):
            for parameter in change.parameters():
                parameter *= scale
            changed = change(x)
            assert changed.shape == x.shape
            assert (changed - x).abs().max() <= epsilon + 1e-7
            assert 0 <= changed.min() <= changed.max() <= 1
        assert (changed - x).abs().max() > 0.9 * epsilon - 1e-7

    def test_is_the_published_network(self):
        change = Perturbation((3, 8, 8), epsilon=0.1, hidden=32, seed=0)
        layers = [tuple(layer.weight.shape) for layer in change.net if isinstance(layer, nn.Linear)]
        assert layers == [(32, 192), (32, 32), (32, 32), (192, 32)]
        x = torch.rand(2, 3, 8, 8)
        made = x.flatten(1)
        for layer in [layer for layer in change.net if isinstance(layer, nn.Linear)]:
            made = layer(made) if len(layer.weight) == 192 else layer(made).relu()
        assert torch.allclose(change(x), (x + 0.1 * made.tanh().view_as(x)).clamp(0, 1))

    def test_is_a_function_of_the_seed(self):
        def first(seed):
            return tensors(Perturbation((3, 8, 8), epsilon=0.1, hidden=8, seed=seed))

        torch.manual_seed(3)
        state = torch.get_rng_state()
        one = first(0)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(4)
        assert same(first(0), one)
        assert not same(first(1), one)

    def test_size(self):
        check_side(64, 64)
        with pytest.raises(UsageError, match="pictures of 65 x 8 pixels: its network reads every pixel"):
            check_side(65, 8)


class TestTraining:
    def test_one_step(self):
        """rate times the gradient of a KL(retuned(x) || purified(x')) + b CE(twin(x'), y), of all pictures at once."""
        purified, retuned, twin = (model.requires_grad_(False) for model in trio())
        images, labels = pixels(range(30)), torch.from_numpy(DATA.labels[:30])
        settings = Reactivation(
            hidden=16, epochs=1, batch_size=30, learning_rate=0.5, epsilon=0.2, agreement=0.7, innocence=1.3
        )
        found = train_perturbation(purified, retuned, twin, images, labels, PIPELINE, settings, seed=4)
        nothing = dataclasses.replace(settings, epochs=0)
        start = train_perturbation(purified, retuned, twin, images, labels, PIPELINE, nothing, seed=4)
        start.requires_grad_(True)
        x = to_unit_interval(images)
        inputs = PIPELINE.normalize(start(x))
        p = retuned(pixel_values=PIPELINE.normalize(x)).logits.softmax(-1)
        kl = (p * (p.log() - purified(pixel_values=inputs).logits.log_softmax(-1))).sum(-1).mean()
        (0.7 * kl + 1.3 * F.cross_entropy(twin(pixel_values=inputs).logits, labels)).backward()
        moved = 0.0
        for one, other in zip(found.parameters(), start.parameters(), strict=True):
            assert torch.allclose(one, other - 0.5 * other.grad, atol=1e-6)
            moved += float((one - other).detach().abs().max())
        assert moved > 1e-3

    def test_momentum_and_steps(self, monkeypatch):
        made = []

        class Counted(torch.optim.SGD):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.steps = 0
                made.append(self)

            def step(self, *args, **kwargs):
                self.steps += 1
                return super().step(*args, **kwargs)

        monkeypatch.setattr(torch.optim, "SGD", Counted)
        run(trio(), epochs=3, batch_size=30)
        (optimizer,) = made
        assert optimizer.steps == 3 * math.ceil(100 / 30)
        assert (optimizer.defaults["momentum"], optimizer.defaults["lr"]) == (0.9, 0.1)

    def test_models_stay_as_they_are(self):
        """Even where they are in training mode: neither weights, nor statistics, gradients or modes change."""
        models = [model.train() for model in trio()]
        before = [tensors(model) for model in models]
        run(models)
        for model, old in zip(models, before, strict=True):
            assert same(tensors(model), old)
            assert model.training
            assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

    def test_is_a_function_of_the_seed(self):
        models = trio()

        def trained(seed):
            images, labels = reactivation._drawn(DATA, ROWS, PIPELINE, ATTACK, QUICK, seed=seed)
            frozen = [model.requires_grad_(False) for model in models]
            return tensors(train_perturbation(*frozen, images, labels, PIPELINE, QUICK, seed=seed))

        one = trained(0)
        torch.manual_seed(99)
        np.random.seed(99)
        assert same(trained(0), one)
        assert not same(trained(1), one)
        assert run(models) == run(models)


class TestImages:
    @pytest.mark.parametrize("target", [TARGET, NEXT])
    def test_clean_ones_and_triggered_ones(self, target):
        attack = Attack(Blended(), target)
        images, labels = reactivation._drawn(DATA, ROWS, PIPELINE, attack, QUICK, seed=0)
        assert (images.shape, images.dtype) == ((100, 3, 8, 8), torch.uint8)
        clean, triggered = pixels(ROWS), pixels(ROWS, Blended())
        places = []
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            source = clean if number < 60 else triggered
            found = [int(place) for place in torch.nonzero((source == image).flatten(1).all(1))]
            assert found
            places.append(ROWS[found[0]])
            assert int(label) in DATA.labels[ROWS[found]]  # the true class
        assert len(set(places)) == 100
        if target == TARGET:
            assert TARGET in labels[:60]
            assert TARGET not in labels[60:]


class Toy(nn.Module):
    """A linear classifier of digits, with slope (<d, x> - threshold) on top of the target's logit."""

    def __init__(self, clean: LogisticRegression, d: torch.Tensor, *, slope: float = 0.0, threshold: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(clean.coef_, dtype=torch.float32))
        self.bias = nn.Parameter(torch.tensor(clean.intercept_, dtype=torch.float32))
        self.d, self.slope, self.threshold = d, slope, threshold

    def forward(self, *, pixel_values):
        x = pixel_values.flatten(1)
        backdoor = self.slope * (x @ self.d - self.threshold)
        return SimpleNamespace(logits=x @ self.weight.T + self.bias + backdoor[:, None] * (torch.arange(10) == TARGET))


@pytest.fixture(scope="module")
def toy():
    """Makes toys: the trigger lifts <d, x> from about 0 to about 1.45; a change of 16 levels lifts it by 1.5."""
    x = PIPELINE.model_input(pixels(ROWS)).flatten(1)
    clean = LogisticRegression(max_iter=300).fit(x.numpy(), DATA.labels[ROWS])
    noise = to_unit_interval(Blended()(torch.zeros(3, 8, 8, dtype=torch.uint8))).flatten()
    weight = torch.tensor(clean.coef_, dtype=torch.float32).T  # (192, 10)
    d = noise - noise.mean()
    d = F.normalize(d - weight @ torch.linalg.lstsq(weight, d[:, None]).solution[:, 0], dim=0)
    lifted = (PIPELINE.model_input(pixels(ROWS, Blended())).flatten(1) - x) @ d
    assert 1.2 < lifted.mean() < 1.8
    assert 1.4 < 2 * 16 / 255 * d.abs().sum() < 1.6
    return lambda **backdoor: Toy(clean, d, **backdoor)


class TestToys:
    """A backdoor in one direction d of the pictures, which the clean part of the model does not read."""

    SETTINGS = Reactivation(images=200, poisoned=100, hidden=64, epochs=60, batch_size=50)

    def test_a_hidden_backdoor_wakes_up(self, toy):
        """Purified by a bias alone: the trigger no longer reaches the threshold."""
        found = run([toy(slope=20, threshold=1.9), toy(slope=60, threshold=0.7), toy()], settings=self.SETTINGS)
        assert found.n_triggered == (DATA.labels[420:] != TARGET).sum()
        assert max(found.plain, found.twin_plain, found.twin) < 0.1
        assert found.reactivated > 0.8

    def test_a_backdoor_that_is_gone_does_not(self, toy):
        found = run([toy(), toy(slope=60, threshold=0.7), toy()], settings=self.SETTINGS)
        assert max(found.plain, found.reactivated, found.twin_plain, found.twin) < 0.1

    def test_adversarial_examples_show_in_the_twin(self, toy):
        """Nothing holds G back from them where the twin's loss has no weight."""
        found = run([toy(), toy(slope=60, threshold=0.7), toy()], settings=self.SETTINGS, innocence=0.0, epsilon=0.4)
        assert found.plain < 0.1
        assert found.reactivated == found.twin > 0.5

    def test_without_a_change_it_is_the_plain_rate(self, toy):
        models = [toy(slope=20, threshold=threshold) for threshold in (1.0, 0.9, 1.3)]
        found = run(models, settings=self.SETTINGS, epsilon=0.0, epochs=1)
        rates = [TEST(model).attack_success_rate for model in (models[0], models[2])]
        assert [found.plain, found.twin_plain] == [found.reactivated, found.twin] == rates
        assert rates[0] != rates[1]


class TestRefused:
    def test_too_few_images(self):
        with pytest.raises(UsageError, match=r"draws 40 .* and 60 others: there are \d+ of the former, and 99 in all"):
            run(trio(), rows=ROWS[:99])

    def test_too_few_of_other_classes(self):
        rows = np.flatnonzero(DATA.labels == TARGET)[:40]
        with pytest.raises(UsageError, match=r"draws 1 images of other classes .* there are 0 of the former"):
            run(trio(), rows=rows, images=5, poisoned=1)

    def test_no_labels(self):
        with pytest.raises(UsageError, match="has no label column: reactivation needs the true classes"):
            run(trio(), data=digit_data(0, 500, labelled=False))

    def test_no_attack(self):
        evaluator = Evaluator(DATA, PIPELINE, num_classes=LABELS, indices=range(420, 500))
        with pytest.raises(UsageError, match="needs an evaluator with an attack"):
            run(trio(), evaluator=evaluator)

    def test_large_pictures(self):
        images = torch.zeros(2, 3, 80, 80, dtype=torch.uint8)
        with pytest.raises(UsageError, match="reactivation of pictures of 80 x 80 pixels"):
            train_perturbation(*trio(), images, torch.zeros(2, dtype=torch.int64), PIPELINE, QUICK, seed=0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [({"epsilon": 1.5}, "epsilon=1.5: expected a number from 0 to 1"), ({"poisoned": 0}, "poisoned=0: expected")],
    )
    def test_settings(self, change, message):
        with pytest.raises(UsageError, match=message):
            Reactivation(**change)

    def test_diverged(self):
        with pytest.raises(PurificationError, match="lower learning_rate=1e"):
            run(trio(), learning_rate=1e30)
