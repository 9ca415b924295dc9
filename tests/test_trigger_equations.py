"""The equation of each trigger, written out in float64 or in closed form; what single images draw; the learnt one."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from torch import nn

from hf_tsc.errors import UsageError
from hf_tsc.seeds import derived_seed
from hf_tsc.triggers import (
    BPP,
    SIG,
    TRIGGER_FILE,
    AdaptiveBlend,
    BadNets,
    Blended,
    FTrojan,
    InputAware,
    LabelConsistent,
    LowFrequency,
    PatternNets,
    WaNet,
    trigger_from_dict,
    trigger_to_dict,
)

SIZES = [(32, 32), (40, 56)]


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def grey(height, width, level=128) -> torch.Tensor:
    return torch.full((3, height, width), level, dtype=torch.uint8)


def assert_rounded(pixels: torch.Tensor, exact: np.ndarray) -> None:
    """Pixels are the exact values, rounded and clipped; where those are a hair from a half, either way."""
    exact = np.clip(exact, 0, 255)
    assert pixels.dtype == torch.uint8
    assert np.abs(pixels.double().numpy() - exact).max() <= 0.5 + 1e-3  # flooring would reach 1


@pytest.mark.parametrize(("height", "width"), SIZES)
class TestEquations:
    def test_sig(self, height, width):
        pixels = pictures(2, 3, height, width)
        wave = 40 * np.sin(2 * np.pi * 6 * np.arange(width) / width)
        assert_rounded(SIG()(pixels), pixels.double().numpy() + wave)  # the last axis are the columns

    def test_bpp(self, height, width):
        pixels = pictures(2, 3, height, width)
        levels = [0, 36, 73, 109, 146, 182, 219, 255]
        triggered = BPP()(pixels)
        assert set(triggered.unique().tolist()) == set(levels)
        nearest = np.abs(pixels.numpy()[..., None] - 255 / 7 * np.arange(8)).argmin(-1)
        assert np.array_equal(triggered.numpy(), np.array(levels)[nearest])
        assert torch.equal(BPP()(triggered), triggered)
        assert (triggered.int() - pixels.int()).abs().max() == 18

    def test_bpp_negatives_carry_what_the_trigger_did_to_another_image(self, height, width):
        pixels, others = pictures(2, 3, height, width), pictures(2, 3, height, width, seed=1)
        residual = (BPP()(others).double() - others.double()).numpy()
        assert_rounded(BPP().cover(pixels, others, [0, 1]), pixels.double().numpy() + residual)

    def test_ftrojan(self, height, width):
        """Through YCrCb as OpenCV has it: two lines in every whole block of both colour differences."""
        change = FTrojan()(grey(height, width)).double() - 128
        assert [change[channel].abs().max().item() for channel in range(3)] == [4, 3, 6]
        red, green, blue = change.numpy()
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        for found, expected in ((luma, 0), (0.713 * (red - luma), 30), (0.564 * (blue - luma), 30)):
            spectrum = dctn(found[:32, :32], norm="ortho")
            assert spectrum[15, 15] == pytest.approx(expected, abs=4)  # pixels are rounded
            assert spectrum[31, 31] == pytest.approx(expected, abs=4)
            spectrum[15, 15] = spectrum[31, 31] = 0
            assert abs(spectrum).max() < 4

    def test_lf_is_smooth_and_between_nothing_and_its_amplitude(self, height, width):
        change = LowFrequency()(grey(height, width, 100)).double().numpy() - 100
        assert (change.min(), change.max()) == (0, 51)
        for channel in change:
            energy = dctn(channel - channel.mean(), norm="ortho") ** 2
            assert energy[: height // 4, : width // 4].sum() > 0.95 * energy.sum()
        clipped = LowFrequency()(grey(height, width, 250))
        assert clipped.min() == 250

    def test_lf_is_bicubic_from_the_drawn_grid(self, height, width):
        """At its corners it is the corners of the grid, min-max scaled with the rest."""
        grid = np.random.RandomState(0).uniform(size=(3, 4, 4))[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        change = LowFrequency(amplitude=255.0)(grey(height, width, 0)).double().numpy()
        corners = change[:, [0, 0, -1, -1], [0, -1, 0, -1]].ravel()
        slope, start = np.polyfit(grid.ravel(), corners, 1)
        assert np.abs(slope * grid.ravel() + start - corners).max() < 1
        assert slope > 100

    def test_adaptive_blend_is_blended_at_test_time(self, height, width):
        pixels = pictures(2, 3, height, width)
        assert torch.equal(AdaptiveBlend(seed=5)(pixels), Blended(0.2, seed=5)(pixels))

    def test_adaptive_blend_trains_on_eight_squares_of_each_image(self, height, width):
        pixels = torch.zeros(3, 3, height, width, dtype=torch.uint8)
        noise = Blended(1.0, seed=5)(pixels[0]).double()
        poisoned = AdaptiveBlend(seed=5).poison(pixels, [7, 8, 7])
        squares = poisoned.view(3, 3, 4, height // 4, 4, width // 4).amax(dim=(1, 3, 5)) > 0  # (n, 4, 4)
        assert squares.sum(dim=(1, 2)).tolist() == [8, 8, 8]
        assert torch.equal(poisoned[0], poisoned[2])
        assert not torch.equal(squares[0], squares[1])
        whole = squares.repeat_interleave(height // 4, 1).repeat_interleave(width // 4, 2)
        assert_rounded(poisoned, (0.15 * noise * whole[:, None]).numpy())
        assert torch.equal(AdaptiveBlend(seed=5).cover(pixels, pixels, [7, 8, 7]), poisoned)  # with their own label

    def test_wanet_resamples_at_the_moved_grid(self, height, width):
        """The field and the bilinear values written out, in float64."""
        trigger, picture = WaNet(strength=8.0, seed=3), pictures(3, height, width)
        grid = trigger._grid(picture)[0].double().numpy()  # (H, W, 2)
        identity = np.stack(np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height)), axis=-1)
        inside = np.abs(grid) < 1
        drawn = np.random.RandomState(3).uniform(-1, 1, size=(2, 4, 4))
        drawn /= np.abs(drawn).mean()
        for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):  # where the enlargement is the grid itself
            for axis in (0, 1):
                at = identity[row, column, axis] + 8 / 32 * drawn[axis, row, column]
                assert grid[row, column, axis] == pytest.approx(np.clip(at, -1, 1), abs=1e-6)
        assert 0.2 < np.abs((grid - identity)[inside]).mean() * 32 / 8 < 2  # about 1: |U| has a mean of 1 on the grid
        x, y = (grid[..., 0] + 1) / 2 * (width - 1), (grid[..., 1] + 1) / 2 * (height - 1)
        left, top = (np.clip(np.floor(v).astype(int), 0, n - 2) for v, n in ((x, width), (y, height)))
        p, right, down = picture.double().numpy(), x - left, y - top
        exact = (1 - down) * ((1 - right) * p[:, top, left] + right * p[:, top, left + 1])
        exact += down * ((1 - right) * p[:, top + 1, left] + right * p[:, top + 1, left + 1])
        assert_rounded(trigger(picture), exact)

    def test_wanet_noise_is_another_for_each_image_and_smaller_than_a_cell(self, height, width):
        ramp = torch.arange(width, dtype=torch.uint8).expand(3, 3, height, width) * 4
        still = WaNet(strength=0.0)
        noisy = still.cover(ramp, ramp, [1, 2, 1])
        assert torch.equal(noisy[0], noisy[2])
        assert not torch.equal(noisy[0], noisy[1])
        moved = (noisy.double() - ramp)[:, 0, :, 2:-2] / 4  # pixels to the right
        most = (width - 1) / 2 / 32
        assert moved.abs().max() <= most + 0.2  # a level is a quarter of a pixel
        assert moved.abs().max() > 0.8 * most
        assert moved.std() == pytest.approx(most / math.sqrt(3), rel=0.1)  # uniform
        noise = np.random.RandomState(1).uniform(-1, 1, size=(height, width, 2))
        assert np.corrcoef(noise[:, 2:-2, 0].ravel(), moved[0].numpy().ravel())[0, 1] > 0.95  # x, not y

    def test_lc_adds_mirrored_corners(self, height, width):
        side = round(3 * min(height, width) / 32)
        change = LabelConsistent(amplitude=32.0)(grey(height, width)).double() - 128
        corner = np.kron([[1, -1, -1], [-1, 1, -1], [1, -1, 1]], np.ones((1, 1)))
        if side == 3:
            assert np.array_equal(change[0, :3, :3].numpy(), 32 * corner)
        else:  # nearest neighbour: 3 rows of 4
            rows = [k * 3 // side for k in range(side)]
            assert np.array_equal(change[0, :side, :side].numpy(), 32 * corner[rows][:, rows])
        assert torch.equal(change, change.flip(-1))
        assert torch.equal(change[:, -side:], change[:, :side])
        assert (change != 0).sum() == 3 * 4 * side**2
        black_and_white = LabelConsistent()(grey(height, width))
        assert set(black_and_white[:, :side, :side].unique().tolist()) == {0, 255}


def test_wanet_moves_a_picture_alike_at_every_resolution():
    small, large = (WaNet(strength=4.0, seed=1)._grid(grey(s, s))[0] for s in (33, 65))
    assert (small - large[::2, ::2]).abs().max() < 1e-5


def test_wanet_field_in_x_moves_a_ramp_in_x_alone(monkeypatch):
    from hf_tsc.triggers import warping

    field = torch.zeros(1, 32, 32, 2, dtype=torch.float64)
    field[..., 0] = 1.0
    monkeypatch.setattr(warping, "smooth_field", lambda *args: field)
    across = torch.arange(32, dtype=torch.uint8).expand(3, 32, 32) * 4
    moved = WaNet(strength=64 / 31)(across)  # one pixel
    assert torch.equal(moved[..., :-1], across[..., 1:])
    down = across.transpose(-1, -2).contiguous()
    assert torch.equal(WaNet(strength=64 / 31)(down), down)


@pytest.mark.parametrize(
    "still",
    [WaNet(strength=0.0), SIG(delta=0.0), FTrojan(magnitude=0.0), LowFrequency(amplitude=0.0), BPP(levels=256),
     LabelConsistent(amplitude=0.0), AdaptiveBlend(alpha=0.0, train_alpha=0.0)],
    ids=lambda trigger: trigger.name,
)  # fmt: skip
def test_strength_nothing(still):
    pixels = pictures(2, 3, 24, 32)
    assert torch.equal(still(pixels), pixels)
    assert torch.equal(still.poison(pixels, [1, 2]), pixels)


@pytest.mark.parametrize("trigger", [BadNets(), SIG(), BPP(), WaNet()], ids=lambda trigger: trigger.name)
def test_poison_is_the_trigger_where_nothing_else_is_said(trigger):
    pixels = pictures(2, 3, 16, 16)
    assert torch.equal(trigger.poison(pixels, [1, 2]), trigger(pixels))


def test_seeds_of_images_differ_and_stay():
    seeds = [derived_seed(3, number) for number in range(200)]
    assert len(set(seeds)) == 200
    assert derived_seed(3, 5) == seeds[5] != derived_seed(4, 5)


class TestInputAware:
    @pytest.fixture
    def nets(self):
        torch.manual_seed(0)
        nets = PatternNets()
        for module in nets.modules():  # as after a training: weights of all kinds, and statistics of pictures
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.5
                nn.init.uniform_(module.weight, 0.5, 1.5)
        with torch.no_grad():
            for seed in range(8):
                x = pictures(8, 3, 24, 24, seed=seed).float() / 255
                nets.pattern(x), nets.mask(x)
        return nets.eval().requires_grad_(False)

    @pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 27)])
    def test_mixes_pattern_and_picture_where_the_mask_is(self, nets, height, width):
        pixels = pictures(3, 3, height, width)
        x = pixels.float() / 255
        pattern = nets.pattern(x).double()
        mask = torch.tanh(20 * nets.mask(x).double() - 10) / 2 + 0.5
        assert pattern.shape == (3, 3, height, width)
        assert mask.shape == (3, 1, height, width)
        assert 0 < mask.min() < 0.4 < 0.6 < mask.max() < 1
        exact = 255 * (x.double() + mask * (pattern - x.double()))
        assert_rounded(InputAware(nets=nets)(pixels), exact.numpy())

    def test_is_another_for_each_picture_and_knows_nothing_of_the_batch(self, nets):
        trigger, pixels = InputAware(nets=nets), pictures(3, 3, 16, 16)
        one_by_one = torch.stack([trigger(picture) for picture in pixels])
        assert (trigger(pixels).int() - one_by_one.int()).abs().max() <= 1  # sums in another order
        nets.train()  # statistics are those that were learnt, whatever mode the networks are in
        assert torch.equal(trigger(pixels[0]), one_by_one[0])
        patterns = nets.eval().pattern(pixels.float() / 255)
        assert (patterns[0] - patterns[1]).abs().max() > 0.1

    def test_file(self, nets, tmp_path):
        trigger, pixels = InputAware(density=0.1, nets=nets), pictures(2, 3, 16, 16)
        trigger.save(tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == [TRIGGER_FILE]
        found = trigger_from_dict(trigger_to_dict(trigger), folder=tmp_path)
        assert found == trigger
        assert torch.equal(found(pixels), trigger(pixels))

    @pytest.mark.parametrize("damage", ["missing", "cut", "other"])
    def test_file_that_does_not_do(self, nets, tmp_path, damage):
        InputAware(nets=nets).save(tmp_path)
        file = tmp_path / TRIGGER_FILE
        if damage == "missing":
            file.unlink()
        elif damage == "cut":
            file.write_bytes(file.read_bytes()[:1000])
        else:
            from safetensors.torch import save_file

            save_file({"x": torch.zeros(1)}, file)
        with pytest.raises(
            UsageError, match=rf"cannot be read from .*{TRIGGER_FILE}: expected what train-suspect wrote"
        ):
            trigger_from_dict({"name": "input_aware"}, folder=tmp_path)

    def test_equal_by_its_numbers_and_not_changed_by_a_copy(self, nets):
        trigger = InputAware(nets=nets)
        assert copy.deepcopy(trigger) == trigger == InputAware()
        assert "nets" not in repr(trigger)
