"""Performance of a purification: steps, several processes, memory, compilation. Writes a JSON file and a page of it.

    python recipes/benchmark_performance.py --output docs/performance.json

How variants are timed is that of benchmark_cost.py: they take turns in one run, and what is reported are ratios of
neighbours. Two processes (gloo) are started once a model and do what they are told in turn with the main process. Each
has one thread. Memory is measured in a process of its own for each variant, as the peak that Linux counts (VmHWM,
which is reset between phases) above what the imports have taken.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from benchmark_cost import Seconds, Work, compare, cpu_model, curve_step, plain_step, resnet, vit
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hf_tsc.activations import collect_statistics, matrix_bytes
from hf_tsc.derive import derive_spec, example_inputs
from hf_tsc.functional import tensors_of
from hf_tsc.tsc_config import TSCConfig
from hf_tsc.tsc_trainer import TSCTrainer

RANKS = 2
LABELS = 10
STEP_TARGET = 1.05  # of a curve's step against fine-tuning with the same loss: median of the ratios of processor time
STATISTICS_BATCHES = 4
CURVE_STEPS = 2  # of the purification whose memory is measured
SIDE = 224


def vit_s() -> PreTrainedModel:
    shape = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
    return ViTForImageClassification(ViTConfig(**shape, num_labels=LABELS))


def vit_b() -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig(num_labels=LABELS))


@dataclass(frozen=True)
class Workload:
    """A model, the side of its images, images a step (of all processes), and turns (times --repeats)."""

    name: str
    build: Callable[[], PreTrainedModel]
    side: int
    batch_size: int
    turns: int

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        return torch.randn(size, 3, self.side, self.side), torch.randint(LABELS, (size,))


WORKLOADS = {
    "resnet64": Workload("ResNet, 64 px", resnet, 64, 64, 2),
    "vit": Workload("ViT of 6 layers, 32 px", vit, 32, 64, 2),
    "vit_s": Workload("ViT-S/16, 224 px", vit_s, SIDE, 8, 1),
}


# --- steps and statistics, in one process and in two -----------------------------------------------------------------


def variants_of(workload: Workload, size: int, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Work]:
    """Steps with `size` images in this process, and its share of a pass for statistics."""
    torch.manual_seed(0)
    model, batch = workload.build().train(), workload.batch(size)
    taps = derive_spec(model.eval(), example_inputs(model)).taps
    point = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    share = STATISTICS_BATCHES * size // workload.batch_size
    batches = [{"pixel_values": workload.batch(workload.batch_size)[0]} for _ in range(share)]
    reader = workload.build().eval()
    model.train()
    return {
        "fine-tuning": plain_step(model, *batch, wrap=wrap),
        "fine-tuning, again": plain_step(model, *batch, wrap=wrap),
        "curve": curve_step(model, *batch, wrap=wrap),
        "statistics": lambda: collect_statistics(reader, taps, batches, points=[point]),
    }


def serve(rank: int, address: str, key: str, pipe: Any) -> None:
    """One of the processes: does what it is told, and says how much processor time that took."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # as in the command line
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    workload = WORKLOADS[key]
    # as the Trainer and TSCConfig wrap a curve
    options: dict[str, Any] = {"find_unused_parameters": True, "broadcast_buffers": False}
    variants = variants_of(
        workload, workload.batch_size // RANKS, lambda model: DistributedDataParallel(model, **options)
    )
    pipe.send("ready")
    while (name := pipe.recv()) is not None:
        started = time.process_time()
        variants[name]()
        pipe.send(time.process_time() - started)
    dist.destroy_process_group()


@contextmanager
def several(key: str) -> Iterator[Callable[[str], Work]]:
    """Gives the work of a name, done by all processes together."""
    context = torch.multiprocessing.get_context("spawn")
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{bound.getsockname()[1]}"
    pipes, ends = zip(*(context.Pipe() for _ in range(RANKS)), strict=True)
    processes = [context.Process(target=serve, args=(rank, address, key, ends[rank])) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for pipe in pipes:
        pipe.recv()

    def work(name: str) -> Work:
        def run() -> Seconds:
            started = time.perf_counter()
            for pipe in pipes:
                pipe.send(name)
            return Seconds(sum(pipe.recv() for pipe in pipes), time.perf_counter() - started)

        return run

    yield work
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join()


def timed(key: str, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of the curve's step against fine-tuning, and of two processes against one."""
    workload = WORKLOADS[key]
    turns, target = {"repeats": repeats * workload.turns, "warmup": 1}, {"curve": STEP_TARGET}
    alone = variants_of(workload, workload.batch_size, nn.Module.train)
    steps = ("fine-tuning", "fine-tuning, again", "curve")
    with several(key) as together:
        rows = [{"processes": 1, **row} for row in compare({name: alone[name] for name in steps}, target, **turns)]
        rows += [
            {"processes": RANKS, **row} for row in compare({name: together(name) for name in steps}, target, **turns)
        ]
        scaling = []
        for name in ("curve", "statistics"):
            (row,) = compare({"1 process": alone[name], f"{RANKS} processes": together(name)}, {}, **turns)
            scaling.append({"work": name, **row})
    about = {"model": workload.name, "images": workload.batch_size}
    return {"steps": [{**about, **row} for row in rows], "scaling": [{**about, **row} for row in scaling]}


# --- memory ----------------------------------------------------------------------------------------------------------

# name: what is asked for beside images a step; matching takes longest, and is the same in all
MEMORY: dict[str, dict[str, Any]] = {
    "SGD with momentum": {"move_spaces": TSCConfig().move_spaces},
    "activation checkpointing": {"activation_checkpointing": True},
    "accumulation of 4 batches": {"gradient_accumulation_steps": 4},
    "AdamW": {"optim": "adamw_torch", "optim_args": None},
}
MOMENTS = {"sgd": 1, "adamw_torch": 2}
HELD = {"the model that is given": 1, "its frozen copy, the suspect": 1, "start, bend and end of the curve": 3}


class Pictures(Dataset):
    """Random ones."""

    def __init__(self, count: int):
        self.pixels = torch.randint(256, (count, 3, SIDE, SIDE), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixels": self.pixels[i], "labels": i % LABELS}


class Peaks(TrainerCallback):
    """Peak of the resident memory by phase, in GB above what there was at first."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self.first = self._peak()

    def mark(self, phase: str) -> None:
        self.found[phase] = max(self.found.get(phase, 0.0), self._peak() - self.first)

    def _peak(self) -> float:
        """Since the last call; writing 5 there starts anew (man proc_pid_clear_refs)."""
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1e9

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.mark("matching")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.mark("forward and backward")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.mark("optimizer step")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.mark("measuring the curve")


def measure_memory(variant: str, images: int) -> dict[str, Any]:
    """Of a purification of a ViT-B/16; in a process of its own."""
    options = {"move_spaces": [], "optim": "sgd", "gradient_accumulation_steps": 1, **MEMORY[variant]}
    batch = images // options["gradient_accumulation_steps"]
    peaks = Peaks()
    peaks._peak()
    model = vit_b()
    with tempfile.TemporaryDirectory() as folder:
        fixed = {"output_dir": folder, "stages": 1, "curve_steps": CURVE_STEPS, "sweep_points": 3, "use_cpu": True}
        quiet = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
        sizes = {"statistics_batch_size": 4, "per_device_train_batch_size": batch}
        trainer = TSCTrainer(
            model,
            TSCConfig(**fixed, **quiet, **sizes, **options),
            train_dataset=Pictures(images),
            eval_dataset=Pictures(4),
            processing_class=ViTImageProcessorPil(),
            callbacks=[peaks],
        )
        peaks.mark("preparing")
        trainer.train()
    weights = sum(4 * p.numel() for p in model.parameters()) / 1e9
    activations = saved_bytes(1) / 1e9 * batch
    if options.get("activation_checkpointing"):
        config = model.config
        tokens = (SIDE // config.patch_size) ** 2 + 1
        inputs = 4 * tokens * config.hidden_size * config.num_hidden_layers / 1e9 * batch
        activations = inputs + activations / config.num_hidden_layers
    held = sum(HELD.values()) * weights
    moments = MOMENTS[options["optim"]] * weights
    accumulated = weights if options["gradient_accumulation_steps"] > 1 else 0.0
    matrices = matrix_bytes(trainer.spec.taps) / 1e9 if options["move_spaces"] else 0.0
    derived = {
        "matching": held + max(matrices, weights),
        "forward and backward": held + moments + weights + activations + accumulated,
        "optimizer step": held + moments + weights,
        "measuring the curve": held + moments + 2 * weights,
    }
    if not options["move_spaces"]:
        del peaks.found["matching"], derived["matching"]
    parts = {"weights": weights, "moments": moments, "activations": activations, "statistics": matrices}
    numbers = {"parts": parts, "derived": derived, "measured": peaks.found}
    rounded = {kind: {key: round(gb, 2) for key, gb in found.items()} for kind, found in numbers.items()}
    return {"variant": variant, "batch": batch, "steps_accumulated": options["gradient_accumulation_steps"], **rounded}


def saved_bytes(images: int) -> int:
    """What a forward pass keeps for the backward pass, weights apart; by a pass without data."""
    with torch.device("meta"):
        model = vit_b().train()
        pixels = torch.empty(images, 3, SIDE, SIDE)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(pixel_values=pixels)
    found = sum(tensor.untyped_storage().nbytes() for storage, tensor in saved.items() if storage not in own)
    del output
    return found


def memory_row(variant: str, images: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--memory_of", variant, "--images", str(images)]
    # large tensors go back to the system as soon as they are freed
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


# --- torch.compile ---------------------------------------------------------------------------------------------------


def compiled(backend: str, repeats: int) -> dict[str, Any]:
    """The curve's step with and without; t is another one in each step."""
    workload = WORKLOADS["vit"]
    torch.manual_seed(0)
    model, batch = workload.build().train(), workload.batch(workload.batch_size)
    step = curve_step(model, *batch, wrap=lambda curve: torch.compile(curve, backend=backend))
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        step()
        seconds.append(round(time.perf_counter() - started, 2))
    (row,) = compare({"curve": curve_step(model, *batch), "compiled curve": step}, {}, repeats=repeats, warmup=1)
    counters = torch._dynamo.utils.counters
    return {
        "backend": backend,
        "model": workload.name,
        "first_steps_s": seconds,
        "steps": 4 + repeats,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        **row,
    }


# --- the page --------------------------------------------------------------------------------------------------------


def ratio(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} ({found['p10']:.2f} to {found['p90']:.2f})"


def ratios(row: Mapping[str, Any]) -> tuple[str, str]:
    return ratio(row["cpu_ratio"]), ratio(row["wall_ratio"])


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    names = list(head)
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(row: Mapping[str, Any]) -> str:
    return f"{row['target']:.2f}, {'met' if row['met'] else 'missed'}" if "target" in row else ""


def page(record: Mapping[str, Any]) -> str:
    """The page that the numbers make, in Markdown."""
    hardware, versions = record["hardware"], record["versions"]
    named = {"curve": "curve step", "statistics": "statistics pass"}
    steps = table(
        ("model", "images a step", "processes", "step", "processor time", "wall clock", "target"),
        ((r["model"], r["images"], r["processes"], r["variant"], *ratios(r), verdict(r)) for r in record["steps"]),
    )
    scaling = table(
        ("model", "images a batch", "work", "processor time", "wall clock"),
        ((r["model"], r["images"], named[r["work"]], *ratios(r)) for r in record["scaling"]),
    )
    memory = table(
        ("variant", "images x batches", "phase", "derived, GB", "measured, GB"),
        (
            (r["variant"], f"{r['batch']} x {r['steps_accumulated']}", phase, r["derived"].get(phase, ""), measured)
            for r in record["memory"]
            for phase, measured in r["measured"].items()
        ),
    )
    first = record["memory"][0]["parts"]
    held = ", ".join(f"{name} ({copies})" for name, copies in HELD.items())
    compilation = record["compile"]
    return f"""# Performance

`{record["command"]}`, {record["date"]}: {hardware["cores"]} cores ({hardware["cpu"]}), one thread a process, load
{", ".join(map(str, hardware["load"]))}; torch {versions["torch"]}, transformers {versions["transformers"]}. The
command writes this page and [performance.json](performance.json). Ratios are the median of neighbours in a run in
which all variants take turns, and the 10th to 90th percentile in brackets.

## A step

Forward, cross-entropy, backward and SGD with momentum, against the same step of the model itself. Two processes (gloo,
`DistributedDataParallel`) have half of the images each, and their processor times are added up. The target is for the
median of the processor time. [cost.json](cost.json) has more, in one process.

{steps}

## From one process to two

The same images, in two processes of one thread each, against one process. Perfect would be 0.5 of the wall clock and
1.0 of the processor time.

{scaling}

## Memory

A purification of a ViT-B/16 at {SIDE} pixels in one process, without distillation. Each copy of the weights takes
{first["weights"]} GB. Held throughout are: {held}. An optimizer keeps one copy more (SGD with momentum) or two
(AdamW). In the backward pass there are also the point of the curve, whose place the gradients take by and by, and the
activations. Matching holds matrices of {first["statistics"]} GB in their place (`statistics_memory_gb`), measuring a
curve two of its points. Checkpointing keeps the inputs of the layers, and the activations of one layer; accumulation
keeps the gradients while the next batch goes forward. Measured is the peak of a phase above the interpreter with its
imports; preparing includes the derivation of the spec, and its verification with networks of random weights.

{memory}

## torch.compile

`--torch_compile` is refused: the curve stands at another t in each step, and is compiled anew. In
{compilation["steps"]} steps ({compilation["model"]}, backend `{compilation["backend"]}`) there were
{compilation["graphs"]} graphs and {compilation["graph_breaks"]} graph breaks; the first steps took
{", ".join(map(str, compilation["first_steps_s"]))} s, those after them {ratio(compilation["cpu_ratio"])} times the
processor time of one that is not compiled.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file; the page is written beside it")
    parser.add_argument("--repeats", type=int, default=8, help="turns of the largest model; others have more")
    parser.add_argument("--images", type=int, default=8, help="a step of the purification whose memory is measured")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--compile_backend", default="inductor", help="of torch.compile; eager takes little time")
    parser.add_argument("--memory_of", choices=list(MEMORY), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.repeats < 2:
        parser.error(f"--repeats={args.repeats}: a spread needs at least 2")
    return args


def main() -> None:
    args = parse()
    if args.memory_of:
        print(json.dumps(measure_memory(args.memory_of, args.images)))
        return
    torch.set_num_threads(1)
    load = [round(x, 1) for x in os.getloadavg()]
    rows: dict[str, list[dict[str, Any]]] = {"steps": [], "scaling": []}
    for key in args.workloads:
        for kind, found in timed(key, args.repeats).items():
            rows[kind] += found
            print(*found, sep="\n", flush=True)
    rows["memory"] = []
    for variant in MEMORY:
        rows["memory"].append(memory_row(variant, args.images))
        print(rows["memory"][-1], flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "command": f"python recipes/benchmark_performance.py --repeats {args.repeats} --images {args.images} "
        f"--workloads {' '.join(args.workloads)} --compile_backend {args.compile_backend}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": {"cpu": cpu_model(), "cores": os.cpu_count(), "load": load},
        **rows,
        "compile": compiled(args.compile_backend, args.repeats),
    }
    print(record["compile"])
    if args.output:
        args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        args.output.with_suffix(".md").write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    main()
