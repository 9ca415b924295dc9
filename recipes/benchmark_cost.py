"""What the curve and the statistics cost, as ratios to plain fine-tuning and to a plain forward pass.

    python recipes/benchmark_cost.py --output docs/cost.json

All variants of a comparison take turns (A B C, C B A, ...) in one run on random images, so that what else the machine
does hits all of them alike; the first one is measured twice, and its ratio to itself shows the noise. Reported are the
median and the 10th to 90th percentile of the ratios of neighbours: in processor time, which other processes on the
machine hardly change, and in wall-clock time. Targets are judged by the median of the former.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # a waiting thread sleeps: its spinning would count as processor time

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_tsc.activations import collect_statistics
from hf_tsc.curve import CurveModel, mix
from hf_tsc.derive import derive_spec, example_inputs

Work = Callable[[], object]
Wrapper = Callable[[nn.Module], nn.Module]
LABELS = 10
STATISTICS_BATCHES = 2
MAX_POSITIONS = 16
# For the ResNet at 32 pixels there is none: its last stage sees one pixel an image, and reading three sets of weights
# and writing one takes 5 of the step's 70 ms, whichever way it is programmed.
STEP_TARGETS = {"resnet64": 1.05, "vit": 1.05}
STATISTICS_TARGETS = {
    ("resnet", "exact"): 1.5,
    ("resnet64", "exact"): 1.5,
    ("vit", "exact"): 4.0,
    ("vit", "max_positions"): 1.5,
}
REPEATS = {"resnet": 4, "resnet64": 2, "vit": 1}  # times --repeats: a ResNet's step is some ten times shorter
WHY_PARAMETRIZE = (
    "it mixes where a layer reads its weight, so that under fully_shard it mixes what that layer has gathered "
    "(tests/test_distributed.py); what it costs more than functional_call is in the rows"
)


def resnet() -> PreTrainedModel:
    config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 2, 2], layer_type="basic")
    config.num_labels = LABELS
    return ResNetForImageClassification(config)


def vit() -> PreTrainedModel:
    shape = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
    return ViTForImageClassification(ViTConfig(**shape, patch_size=4, image_size=32, num_labels=LABELS))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {"resnet": resnet, "resnet64": resnet, "vit": vit}
# The stem of a ResNet shrinks images fourfold: at 32 pixels it does little work an image, and costs a weight show.
SIDES = {"resnet": 32, "resnet64": 64, "vit": 32}


# --- timing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seconds:
    """One call's processor time (all threads) and wall-clock time."""

    cpu: float
    wall: float


def measure(work: Work) -> Seconds:
    """Work that other processes do returns what it took them."""
    cpu, wall = time.process_time(), time.perf_counter()
    done = work()
    return done if isinstance(done, Seconds) else Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def take_turns(variants: Mapping[str, Work], *, repeats: int, warmup: int = 3) -> dict[str, list[Seconds]]:
    """Every variant once a repeat, in alternating order."""
    names = list(variants)
    taken: dict[str, list[Seconds]] = {name: [] for name in names}
    for repeat in range(repeats + warmup):
        for name in names if repeat % 2 else reversed(names):
            seconds = measure(variants[name])
            if repeat >= warmup:
                taken[name].append(seconds)
    return taken


def summary(ours: list[float], base: list[float]) -> dict[str, float]:
    """Of the ratios of neighbours: median, 10th and 90th percentile; and the ratio of both minima."""
    ratios = [a / b for a, b in zip(ours, base, strict=True)]
    deciles = statistics.quantiles(ratios, n=10, method="inclusive")
    found = {
        "median": statistics.median(ratios),
        "p10": deciles[0],
        "p90": deciles[-1],
        "minima": min(ours) / min(base),
    }
    return {name: round(value, 3) for name, value in found.items()}


def compare(
    variants: Mapping[str, Work], targets: Mapping[str, float], *, repeats: int, warmup: int = 3
) -> list[dict[str, Any]]:
    """Every variant but the first, against the first."""
    taken = take_turns(variants, repeats=repeats, warmup=warmup)
    base_name, *others = taken
    rows = []
    for name in others:
        times = {
            clock: ([getattr(s, clock) for s in taken[name]], [getattr(s, clock) for s in taken[base_name]])
            for clock in ("cpu", "wall")
        }
        row: dict[str, Any] = {"variant": name, "against": base_name}
        row |= {f"{clock}_ratio": summary(*pair) for clock, pair in times.items()}
        row["cpu_ms"], row["against_cpu_ms"] = (round(1e3 * statistics.median(x), 2) for x in times["cpu"])
        if name in targets:
            row |= {"target": targets[name], "met": row["cpu_ratio"]["median"] <= targets[name]}
        rows.append(row)
    return rows


# --- what is timed ---------------------------------------------------------------------------------------------------


def training_step(forward: Callable[..., Any], trained: list[Tensor], images: Tensor, labels: Tensor) -> Work:
    """Forward, cross-entropy, backward, SGD with momentum."""
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)

    def step() -> None:
        F.cross_entropy(forward(pixel_values=images).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_step(model: nn.Module, *batch: Tensor, wrap: Wrapper = nn.Module.train) -> Work:
    model = copy.deepcopy(model)
    return training_step(wrap(model), list(model.parameters()), *batch)


def curve_step(model: nn.Module, *batch: Tensor, wrap: Wrapper = nn.Module.train) -> Work:
    """`CurveModel` at a random t."""
    curve = CurveModel(model)
    wrapped = wrap(curve)

    def forward(**inputs: Tensor) -> Any:
        curve.t = torch.rand(()).item()
        return wrapped(**inputs)

    return training_step(forward, list(curve.bend.values()), *batch)


def functional_step(model: nn.Module, *batch: Tensor) -> Work:
    """The alternative to `CurveModel`: all tensors are mixed first, then `torch.func.functional_call`."""
    model = copy.deepcopy(model)
    start, end = ({name: p.detach().clone() for name, p in model.named_parameters()} for _ in range(2))
    bend = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}

    def forward(**inputs: Tensor) -> Any:
        t = torch.rand(()).item()
        point = {name: mix(start[name], bend[name], end[name], t=t) for name in bend}
        return torch.func.functional_call(model, point, kwargs=inputs)

    return training_step(forward, list(bend.values()), *batch)


def step_rows(family: str, model: PreTrainedModel, *, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    side = SIDES[family]
    batch = torch.randn(batch_size, 3, side, side), torch.randint(LABELS, (batch_size,))
    model.train()
    variants = {
        "fine-tuning step": plain_step(model, *batch),
        "fine-tuning step, again": plain_step(model, *batch),
        "curve step": curve_step(model, *batch),
        "curve step, functional_call": functional_step(model, *batch),
    }
    targets = {"curve step": STEP_TARGETS[family]} if family in STEP_TARGETS else {}
    return compare(variants, targets, repeats=repeats)


def statistics_rows(family: str, model: PreTrainedModel, *, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    """Un-alignment's pass over the images against the same images' forward passes."""
    model.eval()
    taps = derive_spec(model, example_inputs(model)).taps
    batches = [
        {"pixel_values": torch.randn(batch_size, 3, SIDES[family], SIDES[family])} for _ in range(STATISTICS_BATCHES)
    ]
    point = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(**batch)

    def collect(limit: int | None) -> Work:
        return lambda: collect_statistics(model, taps, batches, points=[point], max_positions=limit)

    variants: dict[str, Work] = {"forward pass": forward, "forward pass, again": forward}
    targets = {}
    for (name, kind), target in STATISTICS_TARGETS.items():
        if name == family:
            limit = MAX_POSITIONS if kind == "max_positions" else None
            label = f"statistics, {kind}" + (f"={limit}" if limit else "")
            variants[label], targets[label] = collect(limit), target
    return compare(variants, targets, repeats=repeats)


# --- the report ------------------------------------------------------------------------------------------------------


def cpu_model() -> str:
    """As Linux names it; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor()


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "command": f"python recipes/benchmark_cost.py --threads {args.threads} --repeats {args.repeats} "
        f"--batch_size {args.batch_size} --families {' '.join(args.families)}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": [round(x, 1) for x in os.getloadavg()],
        },
        "settings": {
            "batch_size": args.batch_size,
            "statistics_batches": STATISTICS_BATCHES,
            "repeats": {family: REPEATS[family] * args.repeats for family in args.families},
        },
        "rows": rows,
        "mixing": {"used": "torch.nn.utils.parametrize", "why": WHY_PARAMETRIZE},
    }


def line(row: Mapping[str, Any]) -> str:
    cpu, wall = row["cpu_ratio"], row["wall_ratio"]
    judged = f"<= {row['target']:.2f} {'met' if row['met'] else 'MISSED'}" if "target" in row else ""
    return (
        f"{row['family']:<9} {row['variant']:<28} {row['cpu_ms']:>9.1f} {cpu['median']:>7.3f} "
        f"[{cpu['p10']:.2f}, {cpu['p90']:.2f}] {wall['median']:>7.3f} [{wall['p10']:.2f}, {wall['p90']:.2f}]  {judged}"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file; without it the table is only printed")
    parser.add_argument("--threads", type=int, default=1, help="more add the noise of their scheduling")
    parser.add_argument("--repeats", type=int, default=25, help=f"turns; times {REPEATS}")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    args = parser.parse_args(arguments)
    if args.repeats < 2:
        parser.error(f"--repeats={args.repeats}: a spread needs at least 2")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print("family    variant                        ms (CPU)   CPU time ratio       wall-clock ratio      target")
    rows: list[dict[str, Any]] = []
    for family in args.families:
        model, repeats = FAMILIES[family](), REPEATS[family] * args.repeats
        found = step_rows(family, model, batch_size=args.batch_size, repeats=repeats)
        found += statistics_rows(family, model, batch_size=args.batch_size, repeats=repeats)
        rows += [{"family": family, **row} for row in found]
        print(*(line(row) for row in rows[-len(found) :]), sep="\n", flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report(rows, args), indent=2) + "\n")


if __name__ == "__main__":
    main()
