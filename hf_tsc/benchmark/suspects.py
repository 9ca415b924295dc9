"""The suspects of a benchmark, trained once and kept in a folder by their configuration."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from hf_tsc.benchmark.images import BenchmarkImages, processor, rows_of
from hf_tsc.benchmark.suspect_plan import SuspectPlan
from hf_tsc.errors import OtherRequestError
from hf_tsc.evaluation import Attack
from hf_tsc.folders import write_json
from hf_tsc.hub import Source, load_image_processor, load_model, resolve_model
from hf_tsc.images import ImagePipeline
from hf_tsc.processes import working_device
from hf_tsc.suspects import (
    RECORD,
    Adaptive,
    Surrogate,
    SuspectConfig,
    adapt_suspect,
    backdoor_encoder,
    train_dual_encoder,
    train_encoder,
    train_suspect,
)
from hf_tsc.tasks import Classification, Encoding, ImageTextMatching, Task
from hf_tsc.triggers import trigger_from_dict
from hf_tsc.work_folder import work_of

TIMES = "times.json"
TASKS: dict[str, type[Task]] = {"classifier": Classification, "encoder": Encoding, "dual_encoder": ImageTextMatching}
TRAINERS: dict[str, Callable[..., PreTrainedModel]] = {
    "classifier": train_suspect,
    "encoder": train_encoder,
    "dual_encoder": train_dual_encoder,
}


def suspect_folder(plan: SuspectPlan, cache: Path) -> Path:
    """Where a suspect is, or will be."""
    return cache / plan.id


def is_trained(plan: SuspectPlan, cache: Path) -> bool:
    return (suspect_folder(plan, cache) / RECORD).is_file()  # the folder appears as a whole


def attack_of(plan: SuspectPlan, cache: Path) -> Attack:
    """What the suspect is measured with, as it was learnt where it is; its clean twin has learnt nothing of it."""
    folder = suspect_folder(plan, cache) if is_trained(plan, cache) else None
    return Attack(trigger_from_dict(plan.trigger, folder=folder), plan.target_label)


def train(plan: SuspectPlan, images: BenchmarkImages, cache: Path, *, use_cpu: bool = False) -> None:
    """Train a suspect, or go on from its last checkpoint, unless it is there."""
    if is_trained(plan, cache):
        return
    started, folder = time.monotonic(), suspect_folder(plan, cache)
    try:
        _train(plan, images, cache, folder, use_cpu=use_cpu)
    except OtherRequestError:  # left by another version, or from another copy of the images
        shutil.rmtree(work_of(folder))
        _train(plan, images, cache, folder, use_cpu=use_cpu)
    write_json(folder / TIMES, {"seconds": round(time.monotonic() - started, 1), "threads": torch.get_num_threads()})


def _train(plan: SuspectPlan, images: BenchmarkImages, cache: Path, folder: Path, *, use_cpu: bool) -> None:
    on_cpu = working_device(use_cpu=use_cpu).type == "cpu"  # transformers refuses bf16 there unless it is asked for
    options: dict[str, Any] = {"disable_tqdm": True, "logging_strategy": "no", "use_cpu": on_cpu, "resume": True}
    args = SuspectConfig(output_dir=str(folder), seed=plan.seed, **{**options, **plan.arguments})
    made, rows = processor(plan), rows_of(plan.rows)
    attack = attack_of(plan, cache) if plan.poison_rate > 0 or plan.start is not None else None
    how: dict[str, Any] = {"args": args, "attack": attack, "indices": rows}
    if plan.start is not None:
        train(plan.start, images, cache, use_cpu=use_cpu)
        source, start = load(plan.start, cache)
    if plan.adaptive is not None:
        settings = Adaptive(**plan.adaptive)
        adapt_suspect(start, made, images.train, poison_rate=plan.poison_rate, settings=settings, **how)
    elif plan.start is not None and plan.kind == "encoder":
        backdoor_encoder(start, made, images.train, **how)
    else:
        if plan.start is not None:
            how["surrogate"] = Surrogate(start, ImagePipeline(load_image_processor(source)), plan.start.id)
        config = AutoConfig.for_model(**plan.config)
        TRAINERS[plan.kind](config, made, images.train, poison_rate=plan.poison_rate, **how)


def load(plan: SuspectPlan, cache: Path) -> tuple[Source, PreTrainedModel]:
    """A trained suspect in eval mode, and where it is."""
    source = resolve_model(str(suspect_folder(plan, cache)), local=True)
    model, _ = load_model(source, auto_class=TASKS[plan.kind].auto_class)
    return source, model.eval()
