"""The suspects of a benchmark, trained once and kept in a folder by their configuration."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from hf_tsc.benchmark.images import BenchmarkImages, processor, rows_of
from hf_tsc.benchmark.plan import SuspectPlan
from hf_tsc.evaluation import Attack
from hf_tsc.folders import write_json
from hf_tsc.hub import load_model, resolve_model
from hf_tsc.suspects import RECORD, SuspectConfig, train_suspect
from hf_tsc.triggers import trigger_from_dict

TIMES = "times.json"


def suspect_folder(plan: SuspectPlan, cache: Path) -> Path:
    """Where a suspect is, or will be."""
    return cache / plan.id


def is_trained(plan: SuspectPlan, cache: Path) -> bool:
    return (suspect_folder(plan, cache) / RECORD).is_file()  # the folder appears as a whole


def attack_of(plan: SuspectPlan) -> Attack:
    """What the suspect is measured with; its clean twin has learnt nothing of it."""
    return Attack(trigger_from_dict(plan.trigger), plan.target_label)


def train(plan: SuspectPlan, images: BenchmarkImages, cache: Path) -> None:
    """Train a suspect, unless it is there."""
    if is_trained(plan, cache):
        return
    started, folder = time.monotonic(), suspect_folder(plan, cache)
    options: dict[str, Any] = {"disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    train_suspect(
        AutoConfig.for_model(**plan.config),
        processor(plan),
        images.train,
        args=SuspectConfig(output_dir=str(folder), seed=plan.seed, **{**options, **plan.arguments}),
        attack=attack_of(plan) if plan.poison_rate > 0 else None,
        poison_rate=plan.poison_rate,
        indices=rows_of(plan.rows),
    )
    write_json(folder / TIMES, {"seconds": round(time.monotonic() - started, 1), "threads": torch.get_num_threads()})


def load(plan: SuspectPlan, cache: Path) -> PreTrainedModel:
    """A trained suspect in eval mode."""
    source = resolve_model(str(suspect_folder(plan, cache)), local=True)
    model, _ = load_model(source, auto_class=AutoModelForImageClassification)
    return model.eval()
