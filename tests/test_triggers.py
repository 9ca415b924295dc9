"""Triggers: the pattern and its bound, determinism, JSON; and the draw of the images to poison."""

import hashlib
import json

import numpy as np
import pytest
import torch
from kornia.color import rgb_to_yuv
from scipy.fft import dctn

from hf_tsc.errors import UsageError
from hf_tsc.triggers import (
    BPP,
    CTRL,
    SIG,
    TRIGGERS,
    AdaptiveBlend,
    BadNets,
    Blended,
    FTrojan,
    InputAware,
    LabelConsistent,
    LowFrequency,
    PatternNets,
    Square,
    WaNet,
    poison_indices,
    trigger_from_dict,
    trigger_to_dict,
)

EXAMPLES = [
    BadNets(),
    Blended(alpha=0.3, seed=7),
    Square(),
    CTRL(magnitude=200.0),
    SIG(delta=20.0, frequency=5.0),
    WaNet(strength=2.0, cells=5, seed=3),
    BPP(levels=5),
    FTrojan(magnitude=60.0),
    AdaptiveBlend(alpha=0.25, seed=4),
    LabelConsistent(amplitude=64.0, steps=3),
    LowFrequency(amplitude=30.0, seed=2),
]
LEARNT = [InputAware(density=0.1)]


def pictures(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("trigger", EXAMPLES)
@pytest.mark.parametrize("shape", [(3, 32, 32), (5, 3, 32, 32), (2, 3, 16, 24)])
def test_same_shape_new_tensor_and_deterministic(trigger, shape):
    pixels = pictures(*shape)
    before = pixels.clone()
    triggered = trigger(pixels)
    assert triggered.shape == pixels.shape
    assert triggered.dtype == torch.uint8
    assert torch.equal(pixels, before)
    assert not torch.equal(triggered, pixels)
    assert torch.equal(triggered, trigger_from_dict(trigger_to_dict(trigger))(pixels))


@pytest.mark.parametrize("trigger", EXAMPLES)
def test_a_batch_is_its_pictures_one_by_one(trigger):
    pixels = pictures(4, 3, 20, 20)
    assert torch.equal(trigger(pixels), torch.stack([trigger(picture) for picture in pixels]))


@pytest.mark.parametrize(
    ("height", "width", "side"), [(32, 32, 3), (224, 224, 21), (64, 64, 6), (8, 8, 1), (32, 64, 3)]
)
def test_badnets_is_a_white_square_in_the_bottom_right_corner(height, width, side):
    triggered = BadNets()(torch.zeros(3, height, width, dtype=torch.uint8))
    expected = np.zeros((3, height, width), dtype=np.uint8)
    expected[:, height - side :, width - side :] = 255
    assert np.array_equal(triggered.numpy(), expected)


def test_badnets_side_is_at_least_one():
    assert BadNets()(torch.zeros(3, 2, 2, dtype=torch.uint8)).sum() == 3 * 255


@pytest.mark.parametrize("alpha", [0.2, 0.37])
def test_blended_rounds_the_mixture_with_one_noise_picture(alpha):
    noise = Blended(alpha=1.0, seed=5)(torch.zeros(3, 40, 32, dtype=torch.uint8)).double()
    pixels = pictures(6, 3, 40, 32)
    exact = (1 - alpha) * pixels.double() + alpha * noise
    difference = Blended(alpha=alpha, seed=5)(pixels).double() - exact
    assert difference.abs().max() <= 0.5 + 1e-4  # flooring would reach 1
    assert abs(difference.mean()) < 0.01  # flooring would give -0.5


def test_blended_changes_no_pixel_by_more_than_alpha():
    for pixels in (pictures(4, 3, 32, 32), torch.full((3, 32, 32), 255, dtype=torch.uint8)):
        assert (Blended()(pixels).int() - pixels.int()).abs().max() <= 51  # 0.2 * 255
    assert torch.equal(Blended(alpha=0)(pictures(3, 32, 32)), pictures(3, 32, 32))


def test_blended_noise_is_uniform_and_fixed_by_the_seed():
    noise = Blended(alpha=1.0, seed=0)(torch.zeros(3, 64, 64, dtype=torch.uint8))
    counts = torch.bincount(noise.flatten().long(), minlength=256)
    assert counts.min() > 0  # 0 and 255 too
    assert ((counts - 48).square() / 48).sum() < 340  # chi-square, 255 degrees of freedom: 1 in 5,000
    assert not torch.equal(noise, Blended(alpha=1.0, seed=1)(torch.zeros(3, 64, 64, dtype=torch.uint8)))


def test_blended_noise_never_changes_between_versions():
    noise = Blended(alpha=1.0, seed=3)(torch.zeros(3, 8, 8, dtype=torch.uint8))
    digest = hashlib.sha256(noise.numpy().tobytes()).hexdigest()
    assert digest == "fb225481d7946c16e4477e921d7376a264e5428e4093128b7fa5e63c935dad5c"


@pytest.mark.parametrize(("side", "first", "last"), [(32, 21, 31), (224, 147, 217)])
def test_square_is_the_one_of_bad_encoder(side, first, last):
    expected = np.zeros((3, side, side), dtype=np.uint8)
    expected[:, first:last, first:last] = 255
    assert np.array_equal(Square()(torch.zeros(3, side, side, dtype=torch.uint8)).numpy(), expected)


class TestCTRL:
    GREY = torch.full((3, 64, 96), 128, dtype=torch.uint8)

    def to_yuv(self, pixels):
        """As in the paper's code, by kornia."""
        return 255 * rgb_to_yuv(pixels.float() / 255)

    def test_two_lines_in_the_spectrum_of_every_block_of_both_colour_differences(self):
        difference = (self.to_yuv(CTRL()(self.GREY)) - self.to_yuv(self.GREY)).numpy()
        for channel, height in ((0, 0.0), (1, 100.0), (2, 100.0)):  # Y, U, V
            for row, column in ((0, 0), (32, 32), (0, 64)):
                spectrum = dctn(difference[channel, row : row + 32, column : column + 32], norm="ortho")
                assert spectrum[15, 15] == pytest.approx(height, abs=2.5)  # pixels are rounded
                assert spectrum[31, 31] == pytest.approx(height, abs=2.5)
                spectrum[15, 15] = spectrum[31, 31] = 0
                assert abs(spectrum).max() < 2.5

    def test_bound(self):
        change = (CTRL()(self.GREY).int() - 128).abs()
        assert [change[channel].max().item() for channel in range(3)] == [12, 10, 22]

    def test_clipped_not_wrapped(self):
        for value in (0, 255):
            pixels = torch.full((3, 32, 32), value, dtype=torch.uint8)
            assert CTRL(1000.0)(pixels)[0].float().mean() == pytest.approx(value, abs=70)  # wrapped: near 128

    def test_strength_nothing(self):
        assert torch.equal(CTRL(0.0)(self.GREY), self.GREY)


@pytest.mark.parametrize("trigger", [*EXAMPLES, *LEARNT])
def test_json_round_trip(trigger):
    record = json.loads(json.dumps(trigger_to_dict(trigger)))
    assert record["name"] in TRIGGERS
    assert trigger_from_dict(record) == trigger
    assert record == trigger_to_dict(trigger)  # reading leaves the record as it is


def test_every_registered_trigger_has_an_example():
    assert {type(trigger) for trigger in (*EXAMPLES, *LEARNT)} == set(TRIGGERS.values())
    assert {name: trigger.name for name, trigger in TRIGGERS.items()} == {name: name for name in TRIGGERS}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BadNets()(torch.zeros(3, 8, 8)), r"float32 and shape \(3, 8, 8\), expected uint8"),
        (lambda: Blended()(torch.zeros(8, 8, 3, dtype=torch.uint8)), r"shape \(8, 8, 3\), expected"),
        (lambda: BadNets()(torch.zeros(3, 8, dtype=torch.uint8)), r"shape \(3, 8\), expected"),
        (lambda: Blended(alpha=1.2), r"alpha=1.2, expected a share in \[0, 1\]"),
        (lambda: Blended(seed=-1), "seed=-1, expected an integer from 0"),
        (lambda: trigger_from_dict({"name": "nope"}), "'nope', expected one of adaptive_blend, badnets, blended, bpp"),
        (lambda: trigger_from_dict({}), "trigger name None"),
        (lambda: InputAware()(torch.zeros(3, 8, 8, dtype=torch.uint8)), "networks that are trained with its suspect"),
        (
            lambda: InputAware(nets=PatternNets())(torch.zeros(3, 7, 9, dtype=torch.uint8)),
            "7 x 9 pixels, expected 8 x 8",
        ),
        (lambda: BPP(levels=1), "BPP got levels=1, expected an integer from 2 to 256; 8 is usual"),
        (lambda: BPP(levels=8.5), "BPP got levels=8.5, expected an integer"),
        (lambda: SIG(delta=-1), "SIG got delta=-1, expected a number from 0 to 255"),
        (lambda: WaNet(cells=1), "WaNet got cells=1"),
        (lambda: WaNet(cells=4.5), "WaNet got cells=4.5, expected an integer from 2 to 1024"),
        (lambda: WaNet(seed=1.5), "WaNet got seed=1.5, expected an integer"),
        (lambda: WaNet(seed=-1), "WaNet got seed=-1"),
        (lambda: AdaptiveBlend(train_alpha=2), "AdaptiveBlend got train_alpha=2"),
        (lambda: AdaptiveBlend(covers=-1), "got covers=-1, expected a number from 0 to 1000; 1 is usual"),
        (lambda: WaNet(covers=-1), "WaNet got covers=-1, expected a number from 0 to 1000; 2 is usual"),
        (lambda: BPP(covers=-1), "BPP got covers=-1"),
        (lambda: trigger_from_dict({"name": "badnets", "covers": 1}), r"'badnets' got the unknown .* \['covers'\]"),
        (lambda: LabelConsistent(epsilon=300), "LabelConsistent got epsilon=300"),
        (lambda: LowFrequency(amplitude=256), "LowFrequency got amplitude=256"),
        (lambda: FTrojan(magnitude=-1), "FTrojan got magnitude=-1"),
        (lambda: InputAware(density=1.5), "InputAware got density=1.5"),
        (lambda: trigger_from_dict({"name": "input_aware", "nets": 1}), r"unknown key\(s\) \['nets'\]"),
        (
            lambda: trigger_from_dict({"name": "badnets", "alpha": 0.2}),
            r"'badnets' got the unknown .* \['alpha'\]",
        ),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(UsageError, match=message):
        call()


LABELS = np.arange(100) % 10


@pytest.mark.parametrize("rate", [0.0, 0.07, 0.1, 0.9])
def test_poison_indices_are_a_share_of_all_and_never_of_the_target_class(rate):
    chosen = poison_indices(LABELS, target_label=3, poison_rate=rate, seed=0)
    assert len(chosen) == round(rate * 100)
    assert np.array_equal(chosen, np.unique(chosen))
    assert not (LABELS[chosen] == 3).any()


def test_clean_label_poison_is_of_the_target_class():
    chosen = poison_indices(LABELS, target_label=3, poison_rate=0.05, seed=0, clean_label=True)
    assert len(chosen) == 5
    assert (LABELS[chosen] == 3).all()
    with pytest.raises(UsageError, match="asks for 11 of 100 images, but only 10 are of the target class 3"):
        poison_indices(LABELS, target_label=3, poison_rate=0.11, seed=0, clean_label=True)


def test_poison_indices_depend_on_the_seed_alone():
    first, again, other = (poison_indices(LABELS, target_label=0, poison_rate=0.2, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"poison_rate": 0.91}, "asks for 91 of 100 images, but only 90 are not of the target class 3; lower .* 0.9"),
        ({"poison_rate": 0.004}, "of 100 images poisons none"),
        ({"poison_rate": 10}, r"poison_rate=10, expected a share of all images in \[0, 1\]"),
        ({"target_label": 10}, r"target_label=10, expected one of the labels \[0, 1,"),
    ],
)
def test_impossible_poisoning_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        poison_indices(LABELS, **{"target_label": 3, "poison_rate": 0.1, "seed": 0} | options)
