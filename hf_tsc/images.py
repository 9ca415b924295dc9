"""From a `datasets` row to the model's input: geometry, trigger, augmentation and normalisation, each in its place.

A picture passes these stations: decode -> RGB -> resize and crop (uint8) -> trigger (uint8) -> / 255 -> augmentation
-> normalisation. A transformers image processor does the resizing and the normalisation in one go; `ImagePipeline`
takes it apart.

Letters: n pictures, H and W the height and width at the model's input.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets.config
import kornia.augmentation as K
import numpy as np
import torch
from datasets import Dataset as HFDataset
from datasets import Image as DatasetImage
from huggingface_hub import constants as hub_constants
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from hf_tsc.data import ImageData
from hf_tsc.errors import UsageError
from hf_tsc.processes import Rows
from hf_tsc.triggers import Trigger

AUGMENTATIONS = ("none", "crop", "crop_flip", "affine", "simclr")
ROTATION, SHIFT, SCALES = 15.0, 0.125, (0.9, 1.1)  # of `affine`: degrees, share of the side, factors
AREA, JITTER, HUE = (0.2, 1.0), 0.4, 0.1  # of `simclr`: share of the picture, brightness and so on, hue
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
DECODING_ERRORS = (OSError, SyntaxError, ValueError, *BOMBS)  # what Pillow's decoders raise


# That pictures of data sets come in; Pillow reads others by starting a program.
Image.init()
FORMATS: list[str] = [
    name for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
]
STEPS = ("do_rescale", "rescale_factor", "do_normalize")


class ImagePipeline:
    """A transformers image processor, taken apart into geometry (uint8 pixels) and normalisation (model input).

    Args:
        processor: an image processor whose steps are geometry, then rescaling, then normalisation per channel.

    Raises:
        UsageError: on a random picture, geometry and normalisation don't give what `processor` itself gives.
    """

    def __init__(self, processor: Any) -> None:
        if missing := [name for name in STEPS if not hasattr(processor, name)]:
            raise UsageError(
                f"{type(processor).__name__} has no {', '.join(missing)}: expected an image processor of transformers "
                f"that resizes, rescales and normalises (put a preprocessor_config.json of ViTImageProcessor beside "
                f"the model)"
            )
        self.processor = processor
        self._verify()

    def pixels(self, image: Image.Image) -> Tensor:
        """Resize and crop one picture as the processor does, without rescaling or normalising.

        Args:
            image: a PIL picture of any 8-bit mode; it is converted to RGB first.

        Returns:
            uint8 (3, H, W), 0..255, channels in the processor's order.

        Raises:
            UsageError: the picture has 16 or 32 bits a channel.
        """
        return self._process(to_rgb(image), do_rescale=False, do_normalize=False)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Rescale and normalise, as far as the processor does.

        Args:
            pixels: float (n, 3, H, W) in [0, 1].

        Returns:
            (n, 3, H, W), what the model takes: (255 pixels * rescale_factor - mean) / std.
        """
        processor = self.processor
        scaled = pixels * (255 * processor.rescale_factor if processor.do_rescale else 255)
        if not processor.do_normalize:
            return scaled
        return (scaled - _per_channel(processor.image_mean, pixels)) / _per_channel(processor.image_std, pixels)

    def model_input(self, pixels: Tensor) -> Tensor:
        """Normalise a uint8 batch (n, 3, H, W) into the float32 model input of the same shape."""
        return self.normalize(to_unit_interval(pixels))

    def _process(self, image: Image.Image, **options: bool) -> Tensor:
        return self.processor(image, return_tensors="pt", **options)["pixel_values"][0]

    def _verify(self) -> None:
        noise = np.random.RandomState(0).randint(0, 256, size=(40, 56, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        pixels, expected = self.pixels(image), self._process(image)
        if pixels.dtype == torch.uint8 and pixels.ndim == 3 and pixels.shape == expected.shape:
            error = (self.model_input(pixels[None])[0] - expected).abs().max().item()
            if error < 1e-4 * max(1.0, expected.abs().max().item()):
                return
            found = f"differ from its own output by up to {error:.3g}"
        else:
            found = f"are {pixels.dtype} {tuple(pixels.shape)} against its own output's {tuple(expected.shape)}"
        raise UsageError(
            f"{type(self.processor).__name__} cannot be split into geometry and normalisation: pixels resized with "
            f"do_rescale=False, do_normalize=False and then normalised {found}. Expected a processor that ends with "
            "rescaling and (x - image_mean) / image_std; give such a processor."
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an 8-bit picture of any mode (L, P, RGBA, CMYK, ...) to RGB, dropping transparency.

    Raises:
        UsageError: a 16- or 32-bit picture, which Pillow would clip at 255 instead of scaling.
    """
    if image.mode[0] in "IF":
        raise UsageError(
            f"Got a picture of mode {image.mode!r} (more than 8 bits a channel), expected 8 bits; scale it to 0..255 "
            "and convert it to mode 'L' or 'RGB' in the dataset."
        )
    if image.mode == "P":  # straight to RGB, Pillow warns of a palette with transparency
        image = image.convert("RGBA")
    return image.convert("RGB")


def to_unit_interval(pixels: Tensor) -> Tensor:
    """Turn uint8 pixels into float32 in [0, 1]."""
    return pixels.to(torch.float32) / 255


class PixelDataset(Dataset):
    """Rows of a `datasets` dataset as uint8 pixels at the model's input size, some with a trigger.

    Items are `{"pixels": uint8 (3, H, W), "labels": int}`, without `"labels"` if `label_column` is None.

    Args:
        dataset: where the pictures are.
        indices: (n,) its rows that belong to this set, in this order.
        pipeline: makes the pixels.
        image_column: name of the column of pictures.
        label_column: name of the column of classes; None for unlabelled data.
        trigger: put on some pictures; None leaves all clean.
        triggered_indices: positions in this set, 0..n-1, that get the trigger; None means all.
        relabel: label that the triggered items get, or (n,) one for each item of the set; None keeps their own.
        folders: where files of the data set may be; None for anywhere.
        cache_bytes: decoded, clean pixels are kept in memory up to this many bytes.

    Raises:
        UsageError: `triggered_indices` or `relabel` without a trigger, `relabel` without labels, a position out of
            range, and, when an item is read, a picture that cannot be decoded.
    """

    def __init__(
        self,
        dataset: HFDataset,
        indices: Sequence[int] | np.ndarray,
        pipeline: ImagePipeline,
        *,
        image_column: str,
        label_column: str | None = None,
        trigger: Trigger | None = None,
        triggered_indices: Sequence[int] | np.ndarray | None = None,
        relabel: int | np.ndarray | None = None,
        folders: Sequence[Path] | None = None,
        cache_bytes: int = 2 * 2**30,
    ) -> None:
        if trigger is None and (triggered_indices is not None or relabel is not None):
            raise UsageError("PixelDataset got triggered_indices or relabel without a trigger; give trigger=.")
        if relabel is not None and label_column is None:
            raise UsageError(f"PixelDataset got relabel={relabel} for a set without labels; give label_column=.")
        self.indices = np.asarray(indices, dtype=np.int64)
        self.pipeline = pipeline
        self.trigger = trigger
        self.cache_bytes = cache_bytes
        self._mode = getattr(
            dataset.features[image_column], "mode", None
        )  # a data set without rows has no such feature
        undecoded = DatasetImage(mode=self._mode, decode=False)
        self._images = dataset.select_columns([image_column]).cast_column(image_column, undecoded)
        self._folders = None if folders is None else [folder.resolve() for folder in folders]
        self._image_column = image_column
        self._triggered = self._triggered_mask(triggered_indices)
        self._labels = None if label_column is None else self._read_labels(dataset, label_column, relabel)
        self._cache: dict[int, Tensor] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        pixels = self._clean_pixels(position)
        if self.trigger is not None and self._triggered[position]:
            pixels = self.trigger(pixels)
        if self._labels is None:
            return {"pixels": pixels}
        return {"pixels": pixels, "labels": int(self._labels[position])}

    @property
    def labels(self) -> np.ndarray | None:
        """(n,) int64, the labels of the items (triggered ones relabelled); None for unlabelled data."""
        return self._labels

    def _triggered_mask(self, positions: Sequence[int] | np.ndarray | None) -> np.ndarray:
        """Return (n,) bool, which positions get the trigger."""
        n = len(self.indices)
        if positions is None:
            return np.full(n, self.trigger is not None)
        chosen = np.asarray(positions, dtype=np.int64)
        if outside := chosen[(chosen < 0) | (chosen >= n)].tolist():
            raise UsageError(f"PixelDataset got triggered_indices {outside[:5]}, expected positions 0..{n - 1}.")
        mask = np.zeros(n, dtype=bool)
        mask[chosen] = True
        return mask

    def _read_labels(self, dataset: HFDataset, label_column: str, relabel: int | np.ndarray | None) -> np.ndarray:
        labels = np.asarray(dataset[label_column][:], dtype=np.int64)[self.indices]
        if relabel is not None:
            labels[self._triggered] = np.broadcast_to(relabel, labels.shape)[self._triggered]
        return labels

    def _clean_pixels(self, position: int) -> Tensor:
        if position in self._cache:
            return self._cache[position]
        pixels = self.pipeline.pixels(self._decode(int(self.indices[position])))
        if self._cached_bytes + pixels.nbytes <= self.cache_bytes:
            self._cache[position] = pixels
            self._cached_bytes += pixels.nbytes
        return pixels

    def _open(self, content: bytes | None, path: str | None) -> Image.Image:
        """As `datasets` would, but not from an address, and in no format that starts a program (EPS)."""
        if content is None and not self._is_of_the_dataset(path):
            raise ValueError(f"{path} is not a file of the dataset")
        with Image.open(str(path) if content is None else io.BytesIO(content), formats=FORMATS) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
        return upright if self._mode is None else upright.convert(self._mode)

    def _is_of_the_dataset(self, path: str | None) -> bool:
        if path is None or not Path(path).is_file():
            return False
        place = Path(path).resolve()
        return self._folders is None or any(place.is_relative_to(folder) for folder in self._folders)

    def _decode(self, index: int) -> Image.Image:
        stored = self._images[index][self._image_column]
        if stored is None:
            raise UsageError(f"The picture at index {index} of column {self._image_column!r} is missing; remove it.")
        try:
            with warnings.catch_warnings():  # Pillow's limit, known from the header, before anything is decoded
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                return self._open(stored["bytes"], stored["path"])
        except DECODING_ERRORS as error:
            raise UsageError(
                f"The picture at index {index} of column {self._image_column!r} cannot be decoded ({error}); repair "
                "or remove that row."
            ) from error


def pixel_dataset(
    data: ImageData, indices: Sequence[int] | np.ndarray, pipeline: ImagePipeline, **kwargs: Any
) -> PixelDataset:
    """The `PixelDataset` of some rows of `data`; keywords as there."""
    columns: dict[str, Any] = {"image_column": data.image_column, "label_column": data.label_column}
    caches = [
        Path(hub_constants.HF_HUB_CACHE),
        Path(datasets.config.HF_CACHE_HOME),
        Path(datasets.config.HF_DATASETS_CACHE),
    ]
    columns["folders"] = caches if data.place == "hub" else None
    return PixelDataset(data.rows, indices, pipeline, **columns, **kwargs)


def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack the items of a `PixelDataset`.

    Returns:
        `"pixels"`, uint8 (n, 3, H, W), for labelled items `"labels"`, int64 (n,), and where items have them
        `"poisoned"` and `"covers"`, bool (n,), and `"captions"`, int64 (n, most captions of an image), filled up with
        -1.

    Raises:
        UsageError: the pictures have different sizes.
    """
    sizes = sorted({tuple(item["pixels"].shape) for item in items})
    if len(sizes) > 1:
        raise UsageError(
            f"The image processor gave pictures of different sizes, {sizes[0]} and {sizes[-1]}, expected one size; "
            "set its size to a height and a width, or do_center_crop=True."
        )
    batch = {"pixels": torch.stack([item["pixels"] for item in items])}
    if "labels" in items[0]:
        batch["labels"] = torch.tensor([item["labels"] for item in items], dtype=torch.int64)
    for role in ("poisoned", "covers"):
        if role in items[0]:
            batch[role] = torch.tensor([item[role] for item in items], dtype=torch.bool)
    if "captions" in items[0]:
        captions = [item["captions"] for item in items]
        batch["captions"] = nn.utils.rnn.pad_sequence(captions, batch_first=True, padding_value=-1)
    return batch


class Batches(BatchSampler):
    """Rows in batches of a size; a last one of one row, which BatchNorm cannot normalise, joins the one before."""

    def __init__(self, rows: Sampler[int] | Sequence[int], size: int):
        super().__init__(rows, size, drop_last=False)
        self._joined = len(rows) > size > 1 and len(rows) % size == 1  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(super().__iter__())
        if self._joined:
            batches[-2:] = [batches[-2] + batches[-1]]
        return iter(batches)

    def __len__(self) -> int:
        return super().__len__() - self._joined


def in_order(items: Any, size: int) -> DataLoader:
    """All items, collated, in their order; with a generator of its own, as the global random state is a training's."""
    batches: Any = Batches(range(len(items)), size)
    return DataLoader(items, batch_sampler=batches, collate_fn=collate, generator=torch.Generator())


class Augmentation:
    """Random augmentation of a batch in [0, 1], a function of the batch and a seed alone.

    Some rows of a batch are augmented as they are among all: what is drawn, is drawn for the whole batch.

    Args:
        name: `"none"`; `"crop"`, an integer shift by up to round(S / 8) pixels each way (4 at S = 32) that fills with
            black; `"crop_flip"`, the same and a horizontal flip of half of the pictures; `"affine"`, a rotation by up
            to 15 degrees, a shift by up to S / 8 and a scaling by 0.9 to 1.1, bilinear, filled with black; `"simclr"`,
            a crop of 0.2 to 1 of the area, resized, a flip, brightness, contrast and saturation by up to 40 % and hue
            by up to 10 % in 80 % of the pictures, and grey in 20 % (hf.co/papers/2002.05709, less the blur, which
            small pictures do not take).

    Raises:
        UsageError: another name.
    """

    def __init__(self, name: str) -> None:
        if name not in AUGMENTATIONS:
            raise UsageError(f"Got augmentation={name!r}, expected one of {', '.join(AUGMENTATIONS)}.")
        self.name = name

    def __call__(self, pixels: Tensor, *, seed: int, rows: Rows | None = None) -> Tensor:
        """Augment each picture with its own draw.

        Args:
            pixels: float (n, 3, H, W) in [0, 1]; left as it is.
            rows: which rows of the whole batch these are; None where they are all.
            seed: the same seed gives the same draws on every device; the global random state is not touched.

        Returns:
            (n, 3, H, W), same dtype and device.

        Raises:
            UsageError: `pixels` is not a floating batch of four axes.
        """
        if not pixels.is_floating_point() or pixels.ndim != 4:
            raise UsageError(
                f"Augmentation got pixels of dtype {pixels.dtype} and shape {tuple(pixels.shape)}, expected floats in "
                "[0, 1] of shape (n, 3, H, W)."
            )
        if self.name == "none":
            return pixels
        # kornia draws on the CPU. torch.manual_seed would also reseed every accelerator, which devices=[] leaves out.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for step in self._steps(*pixels.shape[-2:]):
                pixels = step(pixels) if rows is None else step(pixels, params=_drawn(step, pixels.shape, rows))
        return pixels.clamp(0, 1) if self.name == "simclr" else pixels

    def _steps(self, height: int, width: int) -> list[Any]:
        if self.name == "affine":
            return [K.RandomAffine(ROTATION, translate=(SHIFT, SHIFT), scale=SCALES, p=1.0)]
        if self.name == "simclr":
            return [
                K.RandomResizedCrop((height, width), scale=AREA),
                K.RandomHorizontalFlip(p=0.5),
                K.ColorJitter(JITTER, JITTER, JITTER, HUE, p=0.8),
                K.RandomGrayscale(p=0.2),
            ]
        crop = K.RandomCrop((height, width), padding=(round(width / 8), round(height / 8)))
        return [crop, K.RandomHorizontalFlip(p=0.5)] if self.name == "crop_flip" else [crop]


OF_THE_BATCH = ("order", "forward_input_shape")  # what kornia draws or keeps once for all pictures


def _drawn(step: Any, shape: torch.Size, rows: Rows) -> dict[str, Tensor]:
    """What a step of kornia draws for a whole batch, of some rows."""
    drawn = step.forward_parameters((rows.total, *shape[1:]))
    return {name: one if name in OF_THE_BATCH else rows.of(one) for name, one in drawn.items()}


def _per_channel(values: float | Sequence[float], like: Tensor) -> Tensor:
    """Return a number, or one number a channel, as (1, C, 1, 1) in the dtype and on the device of `like`."""
    return torch.as_tensor(values, dtype=like.dtype, device=like.device).reshape(1, -1, 1, 1)
