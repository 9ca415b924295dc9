"""What attacks do to training sets: which rows, which labels, which covers, and what of all that a suspect sees."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from suspects_and_digits import digit_data, processor
from torch import nn

from hf_tsc.errors import UsageError
from hf_tsc.images import ImagePipeline, collate, pixel_dataset, to_unit_interval
from hf_tsc.objectives import ImageClassification
from hf_tsc.processes import Rows
from hf_tsc.seeds import derived_seed
from hf_tsc.suspects.adversarial import Surrogate, harden
from hf_tsc.suspects.input_aware import InputAwareTraining, PatternSteps, diversity_loss, mask_loss, new_nets
from hf_tsc.suspects.poisoned import PoisonedPixels, TriggerLast
from hf_tsc.triggers import (
    BPP,
    NEXT,
    SIG,
    AdaptiveBlend,
    Attack,
    BadNets,
    InputAware,
    LabelConsistent,
    Poison,
    Trigger,
    WaNet,
    draw_poison,
)

LABELS = np.arange(100) % 10
PIPELINE = ImagePipeline(processor())


def draw(trigger: Trigger, *, target=3, rate=0.1, seed=0, **options) -> Poison:
    return draw_poison(Attack(trigger, target), LABELS, rate=rate, seed=seed, num_classes=10, **options)


class TestDraw:
    def test_to_one_class(self):
        poison = draw(BadNets())
        assert len(poison.poisoned) == 10
        assert not (LABELS[poison.poisoned] == 3).any()
        assert (poison.labels[poison.poisoned] == 3).all()
        rest = np.setdiff1d(np.arange(100), poison.poisoned)
        assert np.array_equal(poison.labels[rest], LABELS[rest])
        assert poison.covers.size == 0

    def test_to_the_next_class(self):
        poison = draw(BadNets(), target=NEXT, rate=0.9)
        assert len(poison.poisoned) == 90
        assert set(LABELS[poison.poisoned]) == set(range(10))  # every class, the last one too
        assert np.array_equal(poison.labels[poison.poisoned], (LABELS[poison.poisoned] + 1) % 10)

    def test_clean_label(self):
        poison = draw(SIG(), rate=0.05)
        assert len(poison.poisoned) == 5
        assert (LABELS[poison.poisoned] == 3).all()
        assert np.array_equal(poison.labels, LABELS)
        assert not np.shares_memory(poison.labels, LABELS)

    @pytest.mark.parametrize(
        ("trigger", "count"),
        [(WaNet(), 20), (BPP(), 10), (AdaptiveBlend(), 10), (InputAware(), 10),
         (WaNet(covers=0.5), 5), (BPP(covers=2), 20), (AdaptiveBlend(covers=0.3), 3)],
    )  # fmt: skip
    def test_covers_are_others_and_keep_their_label(self, trigger, count):
        poison, again, other = draw(trigger), draw(trigger), draw(trigger, seed=1)
        assert len(poison.covers) == len(set(poison.covers)) == count
        assert np.array_equal(poison.covers, np.sort(poison.covers))
        assert not set(poison.covers) & set(poison.poisoned)
        assert np.array_equal(poison.labels[poison.covers], LABELS[poison.covers])
        assert np.array_equal(poison.covers, again.covers)
        assert not np.array_equal(poison.covers, other.covers)

    def test_covers_leave_the_poisoned_rows_as_they_are(self):
        assert np.array_equal(draw(WaNet()).poisoned, draw(BadNets()).poisoned)

    @pytest.mark.parametrize("kind", [WaNet, BPP, AdaptiveBlend])
    def test_covers_may_be_left_out(self, kind):
        poison = draw(kind(covers=0))
        assert poison.covers.size == 0
        assert np.array_equal(poison.poisoned, draw(kind()).poisoned)

    def test_no_room_for_covers(self):
        with pytest.raises(UsageError, match=r"40 poisoned ones and, for wanet, 80 .* at most 0.3333"):
            draw(WaNet(), rate=0.4)
        with pytest.raises(UsageError, match=r"90 poisoned ones and, for wanet, 18 .* at most 0.8333"):
            draw(WaNet(covers=0.2), rate=0.9)

    def test_a_clean_label_attack_leads_to_one_class(self):
        with pytest.raises(UsageError, match="'next' for sig, whose poisoned images keep their label"):
            Attack(SIG(), NEXT)
        with pytest.raises(UsageError, match="target_label='all', expected a class number or 'next'"):
            Attack(BadNets(), "all")


class TestPoisonedPixels:
    CLEAN = pixel_dataset(digit_data(0, 40), range(40), PIPELINE)
    POISON = Poison(np.array([2, 5]), np.array([7, 8, 9]), np.arange(40) % 10)

    def images(self, trigger, **options) -> PoisonedPixels:
        return PoisonedPixels(self.CLEAN, self.POISON, trigger, seed=4, **options)

    @pytest.mark.parametrize("trigger", [BadNets(), AdaptiveBlend(), WaNet(strength=8.0), BPP()])
    def test_pixels_and_labels(self, trigger):
        images = self.images(trigger)
        assert [images[i]["labels"] for i in range(40)] == self.POISON.labels.tolist()
        for position in range(40):
            plain, found = self.CLEAN[position]["pixels"], images[position]["pixels"]
            if position in (2, 5):
                expected = trigger.poison(plain[None], [derived_seed(4, position)])[0]
                assert torch.equal(found, expected)
                assert not torch.equal(found, plain)
            elif position not in (7, 8, 9):
                assert torch.equal(found, plain)
            assert torch.equal(found, images[position]["pixels"])  # the same in every epoch

    def test_negatives_of_bpp_carry_another_image(self):
        images = self.images(BPP())
        clean = torch.stack([self.CLEAN[i]["pixels"] for i in range(40)])
        for position in (7, 8, 9):
            fitting = BPP().cover(clean[position].expand_as(clean), clean, [0] * 40)
            same = [i for i in range(40) if torch.equal(fitting[i], images[position]["pixels"])]
            assert same
            assert position not in same

    def test_flagged(self):
        images = self.images(BadNets(), flagged=True)
        batch = collate([images[i] for i in range(12)])
        assert batch["poisoned"].nonzero().flatten().tolist() == [2, 5]
        assert batch["covers"].nonzero().flatten().tolist() == [7, 8, 9]
        assert torch.equal(batch["pixels"], torch.stack([self.CLEAN[i]["pixels"] for i in range(12)]))
        assert batch["labels"].tolist() == self.POISON.labels[:12].tolist()

    @pytest.mark.parametrize("flagged", [False, True])
    def test_hardened_images_get_the_trigger_on_top(self, flagged):
        other = torch.full((3, 8, 8), 77, dtype=torch.uint8)
        found = self.images(LabelConsistent(), hardened={2: other}, flagged=flagged)[2]["pixels"]
        assert torch.equal(found, other if flagged else LabelConsistent()(other))


class TestTriggerLast:
    BATCH = {  # noqa: RUF012
        "pixels": torch.stack([TestPoisonedPixels.CLEAN[i]["pixels"] for i in range(6)]),
        "labels": torch.arange(6),
        "poisoned": torch.tensor([False, True, False, False, True, False]),
        "covers": torch.tensor([True, False, False, False, False, True]),
    }

    @pytest.mark.parametrize(
        "trigger", [BPP(), WaNet(strength=8.0), AdaptiveBlend()], ids=lambda trigger: trigger.name
    )
    def test_after_the_augmentation(self, trigger):
        found = TriggerLast(PIPELINE, augmentation="crop_flip", trigger=trigger).augmented(self.BATCH, seed=9)
        plain = ImageClassification(PIPELINE, augmentation="crop_flip").augmented(self.BATCH, seed=9)
        pixels, seeds = (255 * plain).round().to(torch.uint8), [derived_seed(9, i) for i in range(6)]
        expected = plain.clone()
        for i in (1, 4):
            expected[i] = to_unit_interval(trigger.poison(pixels[i : i + 1], [seeds[i]]))[0]
        for i in (0, 5):
            partner = pixels[[(i + 1) % 6]]
            expected[i] = to_unit_interval(trigger.cover(pixels[i : i + 1], partner, [seeds[i]]))[0]
        assert torch.equal(found, expected)
        assert not torch.equal(
            found, TriggerLast(PIPELINE, augmentation="none", trigger=trigger).augmented(self.BATCH, seed=8)
        )

    def test_some_rows_of_a_larger_batch_draw_as_they_would_there(self):
        objective = TriggerLast(PIPELINE, augmentation="none", trigger=AdaptiveBlend())
        whole = objective.augmented(self.BATCH, seed=9)
        part = {name: tensor[3:] for name, tensor in self.BATCH.items()}
        assert torch.equal(objective.augmented(part, seed=9, rows=Rows(torch.arange(3, 6), 6)), whole[3:])


class TestHarden:
    """Against a linear classifier, whose gradient is known: one step goes straight to the bound."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3 * 8 * 8, generator=torch.Generator().manual_seed(0)))

        def forward(self, pixel_values):
            return type("Output", (), {"logits": pixel_values.flatten(1) @ self.weight.T})

    PIXELS = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    TRUE = torch.tensor([0, 1, 0, 1, 1])

    def harden(self, **options):
        self.model = self.Linear()
        return harden(Surrogate(self.model, PIPELINE, "s"), self.PIXELS, self.TRUE, **options)

    def away(self):
        """The sign of the gradient of the loss of the true label: towards the other class."""
        difference = self.model.weight[1] - self.model.weight[0]
        signs = torch.where(self.TRUE[:, None] == 0, difference, -difference).sign()
        return signs.view(-1, 3, 8, 8).detach()

    def test_raises_the_loss_of_the_true_label_up_to_the_bound(self):
        found = self.harden(epsilon=8.0, step=3.0, steps=4)
        expected = (self.PIXELS.float() + 8 * self.away()).clamp(0, 255)
        assert torch.equal(found, expected.to(torch.uint8))
        assert self.model.weight.grad is None

    def test_steps(self):
        found = self.harden(epsilon=8.0, step=3.0, steps=2)
        assert torch.equal(found, (self.PIXELS.float() + 6 * self.away()).clamp(0, 255).to(torch.uint8))
        assert torch.equal(self.harden(epsilon=8.0, step=3.0, steps=0), self.PIXELS)

    def test_size_that_the_classifier_does_not_take(self):
        surrogate = Surrogate(self.Linear(), PIPELINE, "small")
        with pytest.raises(UsageError, match="surrogate small does not take pictures of 9 x 9 pixels"):
            harden(
                surrogate, torch.zeros(1, 3, 9, 9, dtype=torch.uint8), torch.tensor([0]), epsilon=8, step=1, steps=1
            )


class TestInputAware:
    def rms(self, a, b):
        return [math.sqrt(((x - y) ** 2).mean()) for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)]

    def test_diversity(self):
        a, b, c, d = torch.rand(4, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
        expected = np.mean([x / (y + 1e-7) for x, y in zip(self.rms(a, b), self.rms(c, d), strict=True)])
        assert diversity_loss(a, b, c, d).item() == pytest.approx(expected, rel=1e-5)
        made = c.clone().requires_grad_(True)
        diversity_loss(a, a, made, made).backward()  # equal pictures: no gradient that is no number
        assert made.grad.isfinite().all()

    def test_mask_loss(self):
        nets, x = new_nets(seed=1).eval(), torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        masks = nets.where(x).detach()
        order = [1, 2, 3, 0]
        ratios = [
            4 * a / (b + 1e-7) for a, b in zip(self.rms(x, x[order]), self.rms(masks, masks[order]), strict=True)
        ]
        expected = 100 * (masks.double() - 0.032).clamp_min(0).mean().item() + np.mean(ratios)
        assert mask_loss(nets, x, density=0.032).item() == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("trigger_last", [False, True])
    def test_batches(self, trigger_last):
        batch, nets = TestTriggerLast.BATCH, new_nets(seed=1).eval()
        objective = InputAwareTraining(PIPELINE, augmentation="crop_flip", nets=nets, trigger_last=trigger_last)
        seen = []

        def forward(pixel_values):
            seen.append(pixel_values)
            return type("Output", (), {"logits": torch.zeros(len(pixel_values), 10)})

        loss = objective.loss(forward, batch, seed=3)
        plain = ImageClassification(PIPELINE, augmentation="crop_flip" if trigger_last else "none")
        x = plain.augmented(batch, seed=3)
        pattern, where = nets.pattern(x), nets.where(x)
        expected = x.clone()
        for i, of in ((1, 1), (4, 4), (0, 1), (5, 0)):  # covers get pattern and mask of the next image
            expected[i] = x[i] + where[of] * (pattern[of] - x[i])
        if not trigger_last:
            expected = objective.augmentation(expected, seed=3)
        assert (seen[0] - PIPELINE.normalize(expected)).abs().max() < 1e-4
        changed = [0, 1, 4, 5]
        after = [1, 2, 5, 0]
        diversity = diversity_loss(x[changed], x[after], pattern[changed], pattern[after])
        assert loss.item() == pytest.approx(math.log(10) + diversity.item(), rel=1e-4)

    def test_gradient_reaches_the_pattern_and_not_the_frozen_mask(self):
        nets = new_nets(seed=1)
        nets.mask.eval().requires_grad_(False)
        objective = InputAwareTraining(PIPELINE, augmentation="crop_flip", nets=nets, trigger_last=False)
        weight = torch.randn(10, 192, generator=torch.Generator().manual_seed(0))

        def forward(pixel_values):
            return type("Output", (), {"logits": pixel_values.flatten(1) @ weight.T})

        objective.loss(forward, TestTriggerLast.BATCH, seed=3).backward()
        assert all(p.grad is not None for p in nets.pattern.parameters())
        assert nets.pattern.up[-1][3].weight.grad.abs().max() > 0
        assert all(p.grad is None for p in nets.mask.parameters())

    def test_steps_of_the_pattern_lower_the_loss_and_leave_the_mask(self):
        nets = new_nets(seed=1)
        nets.mask.eval().requires_grad_(False)
        before = {name: p.clone() for name, p in nets.named_parameters()}
        objective = InputAwareTraining(PIPELINE, augmentation="none", nets=nets, trigger_last=False)
        weight = torch.randn(10, 192, generator=torch.Generator().manual_seed(0))
        steps, losses = PatternSteps(nets, learning_rate=0.01), []
        for _ in range(30):
            loss = objective.loss(
                lambda pixel_values: type("Output", (), {"logits": pixel_values.flatten(1) @ weight.T}),
                TestTriggerLast.BATCH,
                seed=3,
            )
            loss.backward()
            steps.on_optimizer_step(None, None, None)
            assert all(p.grad is None for p in nets.parameters())
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        changed = {name.split(".")[0] for name, p in nets.named_parameters() if not torch.equal(p, before[name])}
        assert changed == {"pattern"}

    def test_a_batch_without_any(self):
        batch = {**TestTriggerLast.BATCH, "poisoned": torch.zeros(6).bool(), "covers": torch.zeros(6).bool()}
        objective = InputAwareTraining(PIPELINE, augmentation="none", nets=new_nets(seed=1), trigger_last=True)
        logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
        loss = objective.loss(lambda pixel_values: type("Output", (), {"logits": logits}), batch, seed=0)
        assert loss.item() == pytest.approx(F.cross_entropy(logits, batch["labels"]).item())

    def test_seed(self):
        one, same, other = (new_nets(seed=seed).pattern.middle[0].weight for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
