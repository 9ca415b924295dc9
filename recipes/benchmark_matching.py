"""How long the assignment problems of a ViT-B/16 take, and what memory the statistics of large models need.

    python recipes/benchmark_matching.py --dataset_name cifar10 --output docs/matching.json

A ViT-B (86 million weights, 12 spaces of 3072 units) is trained for a few steps on real images, so that its
activations are those of a network that has begun to learn. Un-alignment matches it with itself. Re-alignment matches
it with what a purification aligns to: a point of the curve to the un-aligned copy, trained as many steps. Timed is
`match`, statistics apart; the time of SciPy's solver alone, on the largest problem, is there to compare with. Images
are small (64 pixels): the size of the problems depends on the widths of the network alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
import torch.nn.functional as F
import transformers
from datasets import load_dataset
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    CLIPConfig,
    CLIPModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_tsc.activations import TapStatistics, activation_bytes, collect_statistics, matrix_bytes
from hf_tsc.curve import CurveModel
from hf_tsc.derive import derive_spec, example_inputs
from hf_tsc.functional import tensors_of
from hf_tsc.matching import match
from hf_tsc.passes import parts
from hf_tsc.permutation import KINDS, Params, PermutationSpec, apply

SIDE, LABELS = 64, 10
PUBLISHED_SIDE = 224  # of the images that the large models are made for
TARGETS = {"un-alignment": 60.0, "re-alignment": 15.0}  # seconds
CURVE_T = 0.4
LARGE_VIT = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
CLIP_TEXT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
MODELS = {
    "ViT-B/16": lambda: ViTForImageClassification(ViTConfig()),
    "ViT-L/16": lambda: ViTForImageClassification(ViTConfig(**LARGE_VIT)),
    "ResNet-50": lambda: ResNetForImageClassification(ResNetConfig()),
    "CLIP ViT-L/14": lambda: CLIPModel(
        CLIPConfig(text_config=CLIP_TEXT, vision_config={**LARGE_VIT, "patch_size": 14}, projection_dim=768)
    ),
}


def images_of(dataset: Any, rows: Sequence[int], column: str) -> Tensor:
    """(n, 3, SIDE, SIDE) in [-1, 1]."""
    pictures = [np.array(picture.convert("RGB")) for picture in dataset[list(rows)][column]]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear")


def train(model: nn.Module, dataset: Any, columns: tuple[str, str], *, steps: int, batch_size: int = 32) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(steps), "training"):
        rows = torch.randint(len(dataset), (batch_size,), generator=generator).tolist()
        labels = torch.tensor(dataset[rows][columns[1]])
        model(pixel_values=images_of(dataset, rows, columns[0]), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_point(
    model: nn.Module, theta: Params, copy: Params, dataset: Any, columns: tuple[str, str], *, steps: int
) -> Params:
    """γ(t*) of a curve between a network and its copy; γ(t*) is what is trained."""
    curve = CurveModel(model)
    curve.set_ends(theta, copy)
    curve.t = CURVE_T
    train(curve, dataset, columns, steps=steps)
    return curve.point(CURVE_T)


def solve(
    name: str, spec: PermutationSpec, statistics: list[TapStatistics]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The permutation, and the row of the table: `match`, and SciPy alone on the first of the largest spaces."""
    maximize = name == "re-alignment"
    start = time.perf_counter()
    permutation = match(spec, statistics, maximize=maximize, progress=True)
    taken = time.perf_counter() - start
    widest = max(range(len(spec.taps)), key=lambda k: spec.taps[k].axis.size)
    score = statistics[widest].similarity("l2").cpu().numpy()
    start = time.perf_counter()
    linear_sum_assignment(score, maximize=maximize)
    alone = time.perf_counter() - start
    row = {
        "problem": name,
        "seconds": round(taken, 1),
        "target_s": TARGETS[name],
        "met": taken <= TARGETS[name],
        "scipy_on_one_space_s": round(alone, 1),
        "units_of_that_space": len(score),
    }
    return permutation, row


def assignment_rows(dataset: Any, columns: tuple[str, str], *, steps: int, images: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=SIDE, num_labels=LABELS))
    train(model, dataset, columns, steps=steps)
    model.eval().requires_grad_(False)
    spec = derive_spec(model, example_inputs(model))
    theta = tensors_of(model)

    def batches() -> Iterator[dict[str, Tensor]]:
        for start in tqdm(range(0, images, 64), "statistics"):
            yield {"pixel_values": images_of(dataset, range(start, min(start + 64, images)), columns[0])}

    statistics = collect_statistics(model, spec.taps, batches(), points=[theta])
    permutation, unaligned = solve("un-alignment", spec, statistics)
    point = trained_point(model, theta, apply(theta, spec, permutation), dataset, columns, steps=steps)
    statistics = collect_statistics(model, spec.taps, batches(), points=[point, theta])
    _, realigned = solve("re-alignment", spec, statistics)
    return [unaligned, realigned]


def memory_rows() -> list[dict[str, Any]]:
    """What the matrices of all taps take, those of the largest part that is not cut further, and the activations."""
    rows = []
    for name, build in MODELS.items():
        with torch.device("meta"):
            model = build().eval()
        inputs = example_inputs(model)
        spec = derive_spec(model, inputs)
        largest = max(matrix_bytes(part.taps) for part in parts(spec, KINDS, limit=0))
        taken = {"all_gb": matrix_bytes(spec.taps) / 1e9, "largest_gb": largest / 1e9}
        inputs = {key: value.to("meta") for key, value in inputs.items()}
        inputs["pixel_values"] = torch.empty(1, 3, PUBLISHED_SIDE, PUBLISHED_SIDE, device="meta")
        image = activation_bytes(model, spec.taps, inputs, point=tensors_of(model))
        rows.append({"model": name, "taps": len(spec.taps), **taken, "image_gb": image / 1e9})
    return [{key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="an image data set with labels: a name, or a folder")
    parser.add_argument("--image_column_name", default="img")
    parser.add_argument("--label_column_name", default="label")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20, help="of training, of the network and of the curve")
    parser.add_argument("--images", type=int, default=512, help="for the statistics")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    memory = memory_rows()
    columns = args.image_column_name, args.label_column_name
    dataset = load_dataset(args.dataset_name, split="train")
    rows = assignment_rows(dataset, columns, steps=args.steps, images=args.images)
    record = {
        "date": datetime.date.today().isoformat(),
        "command": f"python recipes/benchmark_matching.py --dataset_name {Path(args.dataset_name).name} "
        f"--steps {args.steps} --images {args.images}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "scipy": scipy.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": {
            "cores": os.cpu_count(),
            "threads": args.threads,
            "load": [round(x, 1) for x in os.getloadavg()],
        },
        "rows": rows,
        "memory": memory,
    }
    args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for row in (*rows, *memory):
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
