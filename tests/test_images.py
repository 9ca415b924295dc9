"""Pixels: the processor taken apart, the dataset of pixels, collating and augmentation."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    EfficientNetImageProcessorPil,
    ViTImageProcessorPil,
)

from hf_tsc.errors import UsageError
from hf_tsc.images import AUGMENTATIONS, Augmentation, ImagePipeline, PixelDataset, collate, to_rgb, to_unit_interval
from hf_tsc.processes import Rows
from hf_tsc.triggers import BadNets

SIZE = {"height": 16, "width": 16}
PROCESSORS = {
    "vit": ViTImageProcessorPil(size=SIZE),
    "vit_as_is": ViTImageProcessorPil(do_resize=False),
    "vit_255": ViTImageProcessorPil(size=SIZE, do_rescale=False, do_normalize=False),
    "vit_unit": ViTImageProcessorPil(size=SIZE, do_normalize=False),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=SIZE),
    "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 16}),
    "bit": BitImageProcessorPil(size={"shortest_edge": 24}, crop_size=SIZE),
}


def noise(height: int, width: int, mode: str = "RGB") -> PILImage.Image:
    values = np.random.RandomState(1).randint(0, 256, size=(height, width, 3), dtype=np.uint8)
    return PILImage.fromarray(values).convert(mode)


class TestImagePipeline:
    @pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
    @pytest.mark.parametrize("shape", [(16, 16), (20, 37), (90, 31)])
    def test_geometry_and_normalisation_give_the_processors_own_output(self, processor, shape):
        pipeline = ImagePipeline(processor)
        image = noise(*shape)
        pixels = pipeline.pixels(image)
        assert pixels.dtype == torch.uint8
        expected = processor(image, return_tensors="pt")["pixel_values"]
        assert torch.allclose(pipeline.model_input(pixels[None]), expected.float(), atol=1e-5)

    def test_normalisation_by_hand(self):
        processor = ViTImageProcessorPil(size=SIZE, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.25, 2.0])
        pixels = torch.rand(2, 3, 16, 16, dtype=torch.float64)
        normalized = ImagePipeline(processor).normalize(pixels)
        for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 2.0)]):
            assert torch.allclose(normalized[:, channel], (pixels[:, channel] - mean) / std)

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1", "YCbCr"])
    @pytest.mark.parametrize("name", ["vit", "clip"])
    def test_any_8_bit_mode(self, name, mode):
        image = noise(20, 20, mode)
        pixels = ImagePipeline(PROCESSORS[name]).pixels(image)
        assert torch.equal(pixels, ImagePipeline(PROCESSORS[name]).pixels(image.convert("RGB")))

    def test_a_palette_with_transparency_does_not_warn(self):
        image = noise(8, 8, "P")
        image.info["transparency"] = bytes(range(256))
        assert to_rgb(image).mode == "RGB"

    @pytest.mark.parametrize("mode", ["I;16", "I", "F"])
    def test_more_than_8_bits_are_refused(self, mode):
        with pytest.raises(UsageError, match=f"picture of mode '{mode}' .* expected 8 bits"):
            ImagePipeline(PROCESSORS["vit"]).pixels(PILImage.new(mode, (16, 16)))

    def test_a_processor_that_normalises_otherwise_is_refused(self):
        class Squaring(ViTImageProcessorPil):
            def normalize(self, image, mean, std, **kwargs):
                return super().normalize(image, mean, std, **kwargs) ** 2

        with pytest.raises(UsageError, match=r"Squaring cannot be split .* differ from its own output by up to"):
            ImagePipeline(Squaring(size=SIZE))

    def test_a_processor_that_always_normalises_is_refused(self):
        with pytest.raises(UsageError, match=r"EfficientNetImageProcessorPil cannot be split .* are torch.float32"):
            ImagePipeline(EfficientNetImageProcessorPil(size=SIZE))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    digits = load_digits()
    pictures = [PILImage.fromarray((16 * image - (image == 16)).astype(np.uint8)) for image in digits.images[:40]]
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    return Dataset.from_dict({"image": pictures, "label": digits.target[:40].tolist()}, features=features)


@pytest.fixture(scope="module")
def pipeline() -> ImagePipeline:
    return ImagePipeline(ViTImageProcessorPil(do_resize=False))


COLUMNS = {"image_column": "image", "label_column": "label"}


class TestPixelDataset:
    def test_rows_in_the_order_of_the_indices(self, digits, pipeline):
        dataset = PixelDataset(digits, [7, 3, 30], pipeline, **COLUMNS)
        assert len(dataset) == 3
        assert dataset.labels.tolist() == [7, 3, digits[30]["label"]]
        for position, index in enumerate([7, 3, 30]):
            expected = np.asarray(digits[index]["image"])
            item = dataset[position]
            assert item["pixels"].shape == (3, 8, 8)
            assert all(np.array_equal(channel, expected) for channel in item["pixels"].numpy())
            assert item["labels"] == dataset.labels[position]
            assert type(item["labels"]) is int

    def test_without_labels(self, digits, pipeline):
        dataset = PixelDataset(digits, [1], pipeline, image_column="image")
        assert dataset[0].keys() == {"pixels"}
        assert dataset.labels is None

    def test_every_picture_gets_the_trigger_and_keeps_its_label(self, digits, pipeline):
        clean = PixelDataset(digits, range(5), pipeline, **COLUMNS)
        triggered = PixelDataset(digits, range(5), pipeline, trigger=BadNets(), **COLUMNS)
        for position in range(5):
            assert torch.equal(triggered[position]["pixels"], BadNets()(clean[position]["pixels"]))
        assert triggered.labels.tolist() == clean.labels.tolist()

    def test_some_positions_get_trigger_and_label(self, digits, pipeline):
        clean = PixelDataset(digits, [10, 11, 12, 13], pipeline, **COLUMNS)
        some = PixelDataset(
            digits, [10, 11, 12, 13], pipeline, trigger=BadNets(), triggered_indices=[1, 3], relabel=9, **COLUMNS
        )
        assert some.labels.tolist() == [0, 9, 2, 9]
        for position in range(4):
            expected = clean[position]["pixels"]
            expected = BadNets()(expected) if position in (1, 3) else expected
            for _ in range(2):  # decoded, then from memory
                assert torch.equal(some[position]["pixels"], expected)
                assert some[position]["labels"] == some.labels[position]
        assert clean.labels.tolist() == [0, 1, 2, 3]

    @pytest.mark.parametrize(("pictures", "decoded"), [(3, [3, 0]), (2, [3, 1]), (0, [3, 3])])
    def test_decoded_pixels_are_kept_up_to_the_limit(self, digits, pipeline, monkeypatch, pictures, decoded):
        dataset = PixelDataset(digits, [0, 1, 2], pipeline, cache_bytes=pictures * 3 * 8 * 8, **COLUMNS)
        calls = []
        original = pipeline.pixels
        monkeypatch.setattr(pipeline, "pixels", lambda image: calls.append(image) or original(image))
        rounds = []
        for _ in range(2):
            batch = collate([dataset[i] for i in range(3)])
            assert torch.equal(
                batch["pixels"][:, 0], torch.from_numpy(np.stack([digits[i]["image"] for i in range(3)]))
            )
            rounds.append(len(calls))
            calls.clear()
        assert rounds == decoded

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"triggered_indices": [0]}, "triggered_indices or relabel without a trigger"),
            ({"relabel": 0}, "triggered_indices or relabel without a trigger"),
            ({"relabel": 4, "trigger": BadNets(), "label_column": None}, "relabel=4 for a set without labels"),
            (
                {"trigger": BadNets(), "triggered_indices": [1, 2]},
                r"triggered_indices \[2\], expected positions 0\.\.1",
            ),
            ({"trigger": BadNets(), "triggered_indices": [-1]}, r"triggered_indices \[-1\]"),
        ],
    )
    def test_wrong_options_are_named(self, digits, pipeline, options, message):
        with pytest.raises(UsageError, match=message):
            PixelDataset(digits, [0, 1], pipeline, **COLUMNS | options)

    def test_a_broken_picture_is_named_by_its_index(self, pipeline):
        buffer = io.BytesIO()
        noise(32, 32).save(buffer, "PNG")
        whole = buffer.getvalue()
        rows = [{"bytes": data, "path": None} for data in (whole, whole[: len(whole) // 2], b"no picture")] + [None]
        broken = Dataset.from_dict({"image": rows}, features=Features({"image": Image()}))
        dataset = PixelDataset(broken, [0, 1, 2, 3], pipeline, image_column="image")
        assert dataset[0]["pixels"].shape == (3, 32, 32)
        for index in (1, 2):
            with pytest.raises(UsageError, match=f"picture at index {index} of column 'image' cannot be decoded"):
                dataset[index]
        with pytest.raises(UsageError, match="picture at index 3 of column 'image' is missing"):
            dataset[3]


def test_collate_in_a_loader(digits, pipeline):
    dataset = PixelDataset(digits, range(6), pipeline, **COLUMNS)
    first, second = torch.utils.data.DataLoader(dataset, batch_size=4, collate_fn=collate)
    assert first["pixels"].shape == (4, 3, 8, 8)
    assert first["pixels"].dtype == torch.uint8
    assert second["labels"].tolist() == [4, 5]
    assert second["labels"].dtype == torch.int64
    assert collate([{"pixels": dataset[0]["pixels"]}]).keys() == {"pixels"}


def test_collate_refuses_different_sizes():
    items = [{"pixels": torch.zeros(3, 8, side, dtype=torch.uint8)} for side in (8, 9)]
    with pytest.raises(UsageError, match=r"different sizes, \(3, 8, 8\) and \(3, 8, 9\), expected one size"):
        collate(items)


class TestAugmentation:
    PIXELS = to_unit_interval(
        torch.randint(1, 256, (400, 3, 16, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    )  # no black pixel

    def shifts(self, augmented: torch.Tensor) -> list[tuple[int, int, bool]]:
        """Return for each picture where the crop began in the padded picture, and whether it was flipped."""
        padded = torch.nn.functional.pad(self.PIXELS, (1, 1, 2, 2))  # round(8 / 8) and round(16 / 8)
        crops = [(r, c, padded[:, :, r : r + 16, c : c + 8]) for r in range(5) for c in range(3)]
        variants = [(r, c, flip, crop.flip(-1) if flip else crop) for r, c, crop in crops for flip in (False, True)]
        return [
            next((r, c, flip) for r, c, flip, variant in variants if torch.equal(picture, variant[i]))
            for i, picture in enumerate(augmented)
        ]

    def test_crop_is_an_integer_shift_with_every_shift_alike(self):
        found = Counter(self.shifts(Augmentation("crop")(self.PIXELS, seed=0)))
        assert found.keys() == {(r, c, False) for r in range(5) for c in range(3)}
        assert sum((count - 400 / 15) ** 2 / (400 / 15) for count in found.values()) < 36.1  # 14 degrees: 1 in 1,000

    def test_crop_flip_also_flips_half(self):
        found = self.shifts(Augmentation("crop_flip")(self.PIXELS, seed=0))
        assert 160 < sum(flip for _, _, flip in found) < 240  # 4 standard deviations
        assert len({(r, c) for r, c, _ in found}) == 15

    def test_affine_keeps_the_middle_near_and_stays_in_range(self):
        """A blurred dot two thirds out moves by at most shift, rotation and scaling together, and does move."""
        side = 48
        ys, xs = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        dot = torch.exp(-((ys - 24) ** 2 + (xs - 36) ** 2) / 8.0).expand(200, 3, side, side)
        found = Augmentation("affine")(dot, seed=0)
        assert found.shape == dot.shape
        assert found.min() >= 0
        assert found.max() <= 1
        mass = found[:, 0] / found[:, 0].sum((1, 2), keepdim=True)
        centre = torch.stack([(mass * ys).sum((1, 2)), (mass * xs).sum((1, 2))], dim=1)
        moved = (centre - torch.tensor([24.0, 36.0])).norm(dim=1)
        furthest = 2**0.5 * 48 / 8 + 12 * (1.1 * 2 * torch.sin(torch.tensor(7.5).deg2rad()) + 0.1) + 1
        assert moved.max() < furthest
        assert moved.median() > 1.5

    def test_simclr_crops_greys_and_changes_colours(self):
        """A picture of a horizontal ramp in red: crops flatten it, and colours move away from the pure one."""
        ramp = torch.linspace(0.2, 0.8, 32).expand(400, 1, 32, 32)
        picture = torch.cat([ramp, 0.1 * torch.ones(400, 2, 32, 32)], dim=1)
        found = Augmentation("simclr")(picture, seed=0)
        assert found.shape == picture.shape
        assert found.min() >= 0
        assert found.max() <= 1
        grey = (found.amax(1) - found.amin(1)).amax((1, 2)) < 1e-5
        assert 0.14 < grey.double().mean() < 0.26  # 0.2, three standard deviations
        flipped = (found[~grey, 0].diff(dim=-1).mean((1, 2)) < 0).double().mean()
        assert 0.4 < flipped < 0.6
        untouched = picture[:, 0].amax((1, 2)) - picture[:, 0].amin((1, 2))
        cropped = found[~grey, 0].amax((1, 2)) - found[~grey, 0].amin((1, 2))
        assert cropped.median() < untouched.median()
        blues = found[~grey, 2].mean((1, 2))
        assert blues.std() > 0.01

    def test_none_changes_nothing(self):
        assert torch.equal(Augmentation("none")(self.PIXELS, seed=0), self.PIXELS)

    @pytest.mark.parametrize("name", ["crop", "crop_flip", "affine", "simclr"])
    def test_the_seed_alone_decides_and_the_global_state_stays(self, name):
        augment = Augmentation(name)
        torch.manual_seed(1)
        state, before = torch.get_rng_state(), self.PIXELS.clone()
        first = augment(self.PIXELS, seed=5)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(self.PIXELS, before)
        torch.manual_seed(2)
        assert torch.equal(augment(self.PIXELS, seed=5), first)
        assert not torch.equal(augment(self.PIXELS, seed=6), first)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_other_dtypes_get_the_same_draws(self, dtype):
        augmented = Augmentation("crop_flip")(self.PIXELS.to(dtype), seed=3)
        assert augmented.dtype == dtype
        assert torch.equal(augmented, Augmentation("crop_flip")(self.PIXELS, seed=3).to(dtype))

    @pytest.mark.gpu
    def test_an_accelerator_gets_the_same_draws_and_keeps_its_state(self):
        state = torch.cuda.get_rng_state()
        augmented = Augmentation("crop_flip")(self.PIXELS.cuda(), seed=3)
        assert torch.equal(augmented.cpu(), Augmentation("crop_flip")(self.PIXELS, seed=3))
        assert torch.equal(torch.cuda.get_rng_state(), state)

    def test_wrong_input_is_named(self):
        with pytest.raises(UsageError, match="augmentation='mixup', expected one of none, crop, crop_flip"):
            Augmentation("mixup")
        with pytest.raises(UsageError, match=r"uint8 and shape \(2, 3, 8, 8\), expected floats"):
            Augmentation("crop")(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), seed=0)
        with pytest.raises(UsageError, match=r"shape \(3, 8, 8\), expected floats"):
            Augmentation("none")(torch.zeros(3, 8, 8), seed=0)


def test_a_processor_of_another_kind_is_refused():
    class TimmLikeProcessor:
        """Takes no steps apart."""

    with pytest.raises(
        UsageError, match="TimmLikeProcessor has no do_rescale, rescale_factor, do_normalize: expected"
    ):
        ImagePipeline(TimmLikeProcessor())


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "none"])
@pytest.mark.parametrize("index", [[4, 5, 6, 7], [0, 1, 6, 7]])
def test_rows_of_a_batch_are_augmented_as_they_are_among_all(name, index):
    """So that the number of processes, which each have some rows, makes no difference."""
    pixels = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    augmentation, rows = Augmentation(name), torch.tensor(index)
    whole = augmentation(pixels, seed=3)
    found = augmentation(pixels[rows], seed=3, rows=Rows(rows, 8))
    torch.testing.assert_close(found, whole[rows], rtol=0, atol=1e-6)
    assert not torch.allclose(augmentation(pixels[rows], seed=3), whole[rows], atol=1e-3), "alone, they are not"
