"""How long it takes to derive the permutation specs of models at full size.

    python recipes/benchmark_derive.py --output docs/derive_speed.json

Models are made from configurations on the meta device, with the sizes of the usual checkpoints; a derivation needs no
weights. The first derivation in a process pays for torch's own warm-up and is reported apart.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_tsc.derive import derive_spec, example_inputs

TARGET_SECONDS = 5.0
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "ViT-B/16": lambda: ViTForImageClassification(ViTConfig()),
    "Swin-T": lambda: SwinForImageClassification(SwinConfig()),
    "ConvNeXt-T": lambda: ConvNextForImageClassification(ConvNextConfig()),
    "ResNet-50": lambda: ResNetForImageClassification(ResNetConfig()),
    "DINOv2-B": lambda: Dinov2ForImageClassification(Dinov2Config(image_size=518, patch_size=14)),
    "SigLIP-B/16": lambda: SiglipModel(SiglipConfig()),
}


def seconds_of(model: PreTrainedModel) -> tuple[float, int]:
    """Of one derivation, and the number of spaces found."""
    inputs = example_inputs(model)
    start = time.perf_counter()
    spec = derive_spec(model, inputs)
    return time.perf_counter() - start, len(spec.spaces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name, build in MODELS.items():
        with torch.device("meta"):
            model = build().eval()
        first, spaces = seconds_of(model)
        taken = [seconds_of(model)[0] for _ in range(args.repeats)]
        median = statistics.median(taken)
        rows.append(
            {
                "model": name,
                "parameters": model.num_parameters(),
                "spaces": spaces,
                "first_s": round(first, 2),
                "median_s": round(median, 2),
                "target_s": TARGET_SECONDS,
                "met": median <= TARGET_SECONDS,
            }
        )
        print(
            f"{name:12} {spaces:4} spaces  {median:.2f} s, median of {args.repeats} (first {first:.2f} s)", flush=True
        )
    record = {
        "date": datetime.date.today().isoformat(),
        "command": f"python recipes/benchmark_derive.py --repeats {args.repeats} --threads {args.threads}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": {"cores": os.cpu_count(), "threads": args.threads, "load": [round(x, 1) for x in os.getloadavg()]},
        "rows": rows,
    }
    args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
