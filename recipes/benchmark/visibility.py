"""Do the networks of a plan see its triggers? A minute for each, before hours go into training suspects.

    python recipes/benchmark/visibility.py recipes/benchmark/small.yaml --dataset_name uoft-cs/cifar10 \\
        --image_column_name img

For each model and trigger of the plan, a network of the model's configuration with two classes learns from nothing to
tell triggered images from clean ones, for five short epochs. A suspect has to learn the same difference beside its
classes, and from fewer images. Nothing here depends on a method that removes backdoors. Triggers that are learnt
together with their suspect are left out.

Writes a JSON line each to docs/benchmark/visibility.jsonl, and the table beside it; what has its line is not run
again.
"""

from __future__ import annotations

import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForImageClassification, HfArgumentParser, PreTrainedModel

from hf_tsc.benchmark.images import processor
from hf_tsc.benchmark.lines import Line, open_lines, read_lines
from hf_tsc.benchmark.plan import Plan
from hf_tsc.benchmark.points import markdown, percent, told
from hf_tsc.benchmark.suspect_plan import SuspectPlan, digest
from hf_tsc.cli_arguments import parse
from hf_tsc.data import ImageData
from hf_tsc.images import ImagePipeline, pixel_dataset
from hf_tsc.job import DataArguments
from hf_tsc.report import environment
from hf_tsc.triggers import trigger_from_dict

OUTPUT = Path(__file__).resolve().parents[2] / "docs" / "benchmark" / "visibility.jsonl"


@dataclass
class Probe:
    """How the difference is learnt: AdamW, half of each batch triggered, images mirrored at random."""

    epochs: int = 5
    images: int = 8000
    held_out: int = 1000
    batch_size: int = 100
    learning_rate: float = 1e-3
    seed: int = 0


def line_id(suspect: SuspectPlan, probe: Probe) -> str:
    """Of all that the figures depend on, but the images."""
    content = [suspect.config, suspect.image_size, suspect.rows, suspect.trigger, asdict(probe)]
    return f"{suspect.model}-{suspect.attack}-{digest(content)}"


def pixels_of(suspect: SuspectPlan, data: ImageData, count: int) -> Tensor:
    """The first images that suspects are trained on, uint8 (count, 3, H, W)."""
    first, last = suspect.rows
    images = pixel_dataset(data, np.arange(first, min(first + count, last)), ImagePipeline(processor(suspect)))
    return torch.stack([images[k]["pixels"] for k in range(len(images))])


def probe_trigger(suspect: SuspectPlan, pixels: Tensor, probe: Probe) -> dict[str, float]:
    """The shares of held-out images that are told right, without the trigger and with it.

    Args:
        suspect: of the network and the trigger.
        pixels: uint8 (n, 3, H, W), the last `probe.held_out` of which are held out.
        probe: how it is learnt.
    """
    torch.manual_seed(probe.seed)
    trigger, pipeline = trigger_from_dict(suspect.trigger), ImagePipeline(processor(suspect))
    config = AutoConfig.for_model(**suspect.config, num_labels=2)
    model = AutoModelForImageClassification.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), probe.learning_rate)
    train, held_out = pixels[: -probe.held_out], pixels[-probe.held_out :]
    for _ in range(probe.epochs):
        for rows in torch.randperm(len(train)).split(probe.batch_size):
            mirrored, triggered = torch.rand(2, len(rows)) < 0.5
            images = train[rows]
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
            images = torch.where(triggered[:, None, None, None], trigger(images), images)
            loss = cross_entropy(model(pipeline.model_input(images)).logits, triggered.long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    share = {"clean": held_out, "triggered": trigger(held_out)}
    return {
        name: (_said_triggered(model, pipeline, images) == (name == "triggered")).float().mean().item()
        for name, images in share.items()
    }


@torch.no_grad()
def _said_triggered(model: PreTrainedModel, pipeline: ImagePipeline, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(pipeline.model_input(some)).logits.argmax(-1) == 1 for some in images.split(250)])


def table(lines: Iterable[Line]) -> str:
    """A row for each model and trigger, in percent, as markdown."""
    rows = []
    for line in sorted(lines, key=lambda line: (line["model"], line["attack"], line["id"])):
        numbers = told([(name, str(value)) for name, value in line["trigger"].items() if name != "name"])
        rows.append(
            [line["model"], line["attack"], numbers, *(percent([line[name]]) for name in ("clean", "triggered"))]
        )
    return markdown(["model", "attack", "numbers given", "clean told right", "triggered told right"], rows) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Probe what has no line yet, and write the table."""
    types: Any = (DataArguments, Probe)
    parser = HfArgumentParser(types, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="a plan of hf-tsc benchmark, of classifiers")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file of JSON lines; the table goes to its .md")
    parser.add_argument("--only", nargs="*", default=[], help="only those whose `model/attack` contains these words")
    data_args, probe, args = parse(parser, sys.argv[1:] if argv is None else argv)
    found = [s for s in Plan.read(args.plan).suspects if not s.is_clean and s.start is None and not s.learns_trigger]
    chosen = {line_id(s, probe): s for s in found if all(word in f"{s.model}/{s.attack}" for word in args.only)}
    data = data_args.open()
    with open_lines(args.output) as lines:
        done = {line["id"] for line in read_lines(args.output)}
        for name, suspect in tqdm([item for item in chosen.items() if item[0] not in done], unit=" triggers"):
            started = time.monotonic()
            shares = probe_trigger(suspect, pixels_of(suspect, data, probe.images + probe.held_out), probe)
            lines.add(
                {
                    "id": name,
                    "model": suspect.model,
                    "attack": suspect.attack,
                    "trigger": suspect.trigger,
                    **shares,
                    "probe": asdict(probe),
                    "dataset": {key: data.describe().get(key) for key in ("name", "fingerprint", "split")},
                    "seconds": round(time.monotonic() - started, 1),
                    "environment": environment(torch.device("cpu")),
                }
            )
    args.output.with_suffix(".md").write_text(table(read_lines(args.output)), encoding="utf-8")


if __name__ == "__main__":
    main()
