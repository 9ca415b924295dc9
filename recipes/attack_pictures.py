"""Draw what each trigger does to two real images, with its residual, for docs/attacks.md.

Label-consistent poison and the input-aware trigger need models: a small ResNet is trained for a few minutes for each,
on few images, which is enough to look at and for nothing else.

Usage: python recipes/attack_pictures.py --dataset_name cifar10 [--images 3 7] [--output docs/attacks/triggers.png]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import ResNetConfig, ViTImageProcessorPil

from hf_tsc.data import ImageData, open_images
from hf_tsc.folders import RECORD
from hf_tsc.images import ImagePipeline, pixel_dataset
from hf_tsc.suspects import Surrogate, SuspectConfig, train_suspect
from hf_tsc.suspects.adversarial import harden
from hf_tsc.triggers import (
    BPP,
    CTRL,
    SIG,
    AdaptiveBlend,
    Attack,
    BadNets,
    Blended,
    FTrojan,
    InputAware,
    LabelConsistent,
    LowFrequency,
    Square,
    WaNet,
    read_trigger,
)

ROOT = Path(__file__).resolve().parent.parent
SIDE, TILE, GAP, TITLE, COLUMNS = 32, 96, 4, 22, 2
PROCESSOR = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
RESNET = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic")
TRAINING_IMAGES = 1000
Change = Callable[[Tensor], Tensor]


def changes(surrogate: Surrogate, labels: Tensor, learnt: InputAware, partners: Tensor) -> dict[str, Change]:
    """What is shown, by title: pictures (n, 3, H, W) -> pictures."""
    wanet, bpp, lc = WaNet(), BPP(), LabelConsistent()
    seeds = [1, 2]

    def lc_poison(pixels: Tensor) -> Tensor:
        hard = harden(surrogate, pixels, labels, epsilon=lc.epsilon, step=lc.step, steps=lc.steps)
        return lc.poison(hard, seeds)

    return {
        "badnets": BadNets(),
        "square": Square(),
        "blended": Blended(),
        "adaptive_blend, poisoned or cover": lambda pixels: AdaptiveBlend().poison(pixels, seeds),
        "sig": SIG(),
        "lf": LowFrequency(),
        "ctrl": CTRL(),
        "ftrojan": FTrojan(),
        "wanet": wanet,
        "wanet, cover (noise)": lambda pixels: wanet.cover(pixels, partners, seeds),
        "bpp": bpp,
        "bpp, cover (negative)": lambda pixels: bpp.cover(pixels, partners, seeds),
        "lc, test": lc,
        "lc, poisoned": lc_poison,
        "input_aware": learnt,
    }


def train(data: ImageData, attack: Attack | None, folder: Path, epochs: int) -> torch.nn.Module:
    """A small ResNet on a few images."""
    options = {"use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "num_train_epochs": epochs}
    args = SuspectConfig(output_dir=str(folder), trigger_last=attack is not None, augmentation="crop_flip", **options)
    return train_suspect(RESNET, PROCESSOR, data, args=args, attack=attack, indices=np.arange(TRAINING_IMAGES)).eval()


def residual(pixels: Tensor, changed: Tensor) -> tuple[Tensor, int]:
    """128 + k (changed - pixels), and k: the greatest of 1, 2, 4, ... that clips at most a tenth of the changes."""
    difference = changed.double() - pixels.double()
    largest = torch.quantile(difference[difference != 0].abs(), 0.9).item()
    factor = 2 ** int(np.log2(max(1, 120 / largest)))
    return (128 + factor * difference).clamp(0, 255).to(torch.uint8), factor


def tile(picture: Tensor) -> Image.Image:
    """(3, H, W) -> a picture of TILE pixels a side, each pixel a square."""
    return Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((TILE, TILE), Image.Resampling.NEAREST)


def draw(pixels: Tensor, rows: dict[str, Change]) -> Image.Image:
    """A sheet: for each change its title, and for each image what becomes of it and the residual."""
    entries = {"no trigger": (pixels, None, 0)} | {
        title: (changed, *residual(pixels, changed)) for title, changed in ((t, f(pixels)) for t, f in rows.items())
    }
    width, height = 2 * len(pixels) * (TILE + GAP) + 4 * GAP, TILE + TITLE + GAP
    lines = -(-len(entries) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width, lines * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for number, (title, (changed, rest, factor)) in enumerate(entries.items()):
        left, top = (number // lines) * width + GAP, (number % lines) * height
        pen.text((left, top + 3), title + (f" (residual x{factor})" if factor else ""), fill="black", font=font)
        for i in range(len(pixels)):
            at = left + 2 * i * (TILE + GAP)
            sheet.paste(tile(changed[i]), (at, top + TITLE))
            if rest is not None:
                sheet.paste(tile(rest[i]), (at + TILE + GAP, top + TITLE))
    return sheet


def main() -> None:
    """Train what is needed, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--images", type=int, nargs=2, default=[3, 7], help="two rows of the data set")
    parser.add_argument("--epochs", type=int, default=4, help="of both models")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/attacks/triggers.png")
    asked = parser.parse_args()
    data = open_images(asked.dataset_name)
    pipeline = ImagePipeline(PROCESSOR)
    items = [pixel_dataset(data, [row], pipeline)[0] for row in (*asked.images, *(row + 1 for row in asked.images))]
    pixels, partners = torch.stack([item["pixels"] for item in items]).chunk(2)
    labels = torch.tensor([item["labels"] for item in items[:2]])
    with tempfile.TemporaryDirectory() as work:
        clean = train(data, None, Path(work) / "clean", asked.epochs)
        attack = Attack(InputAware(mask_epochs=asked.epochs), target_label=0)
        train(data, attack, Path(work) / "suspect", asked.epochs)
        learnt, _ = read_trigger(Path(work) / "suspect" / RECORD)
    assert isinstance(learnt, InputAware)
    sheet = draw(pixels, changes(Surrogate(clean, pipeline, "clean"), labels, learnt, partners))
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(256, method=Image.Quantize.MEDIANCUT).save(asked.output, optimize=True)
    print(f"{asked.output}: {asked.output.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
