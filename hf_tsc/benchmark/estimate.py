"""How long a benchmark will take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from hf_tsc.baselines.registry import BASELINES, settings_of
from hf_tsc.benchmark.images import BenchmarkImages
from hf_tsc.benchmark.lines import Line
from hf_tsc.benchmark.plan import Cell
from hf_tsc.benchmark.suspect_plan import SuspectPlan
from hf_tsc.benchmark.suspects import TASKS, is_trained
from hf_tsc.derive import example_inputs
from hf_tsc.images import Augmentation
from hf_tsc.processes import working_device
from hf_tsc.retuning import Retuning
from hf_tsc.tsc_config import PRESETS, TRANSFORMER_DEFAULTS

PROBE_BATCH, PROBE_STEPS = 64, 3
VIEWS = 2  # of each image, in SimCLR
BAD_ENCODER_PASSES = 3 + 1 / 3  # three pictures for each image, and one forward alone, by the clean encoder


def estimate_seconds(
    cells: Sequence[Cell], lines: Sequence[Line], images: BenchmarkImages, cache: Path, *, use_cpu: bool = False
) -> dict[str, float]:
    """Seconds of one process: for the suspects that are missing, and for the cells.

    From finished cells of the same model and method where there are some, else from a few timed steps.
    """
    device = working_device(use_cpu=use_cpu)
    speed = {model: _seconds_per_image(cell.suspect, device) for model, cell in _first_of_each_model(cells).items()}
    named = [suspect for cell in cells for suspect in cell.suspects]
    wanted = {suspect.id: suspect for one in named for suspect in (one, one.start) if suspect is not None}
    missing = {name: suspect for name, suspect in wanted.items() if not is_trained(suspect, cache / images.hash)}
    suspects = sum(_suspect_images(suspect) * speed[suspect.model] for suspect in missing.values())
    return {"suspects": suspects, "cells": sum(_cell_seconds(cell, lines, speed) for cell in cells)}


def _first_of_each_model(cells: Iterable[Cell]) -> dict[str, Cell]:
    found: dict[str, Cell] = {}
    for cell in cells:
        found.setdefault(cell.suspect.model, cell)
    return found


def _suspect_images(plan: SuspectPlan) -> float:
    """How many pictures go forward and backward while it is trained."""
    images = (plan.rows[1] - plan.rows[0]) * float(plan.arguments.get("num_train_epochs", 30))
    if plan.kind != "encoder":
        return images
    return images * (VIEWS if plan.start is None else BAD_ENCODER_PASSES)


def _cell_seconds(cell: Cell, lines: Sequence[Line], speed: dict[str, float]) -> float:
    def per_image(line: Line) -> float:
        return line["seconds"]["all"] / _trained_images(line)

    alike = [
        per_image(line)
        for line in lines
        if (line["model"], line["method"]) == (cell.suspect.model, cell.method) and "error" not in line
    ]
    rate = statistics.median(alike) if alike else 1.5 * speed[cell.suspect.model]  # measuring takes its time, too
    retuning = Retuning(**cell.retuning)
    others = len(cell.retune) * len(cell.retune_with) * retuning.epochs * retuning.images
    return rate * _trained_images(cell.describe()) + speed[cell.suspect.model] * others


def _trained_images(described: dict[str, Any]) -> float:
    """How many pictures go forward and backward in a cell, or in the line of one; 1 where nothing is trained."""
    views = VIEWS if described["settings"].get("objective") == "simclr" else 1
    return _drawn_images(described) * views or 1.0


def _drawn_images(described: dict[str, Any]) -> float:
    method, settings = described["method"], described["settings"]
    if method in BASELINES:
        chosen = settings_of(method, settings)
        images = round(described["budget"] * (1 - described["held_out"]))
        return float(chosen.gradient_evaluations(images) * chosen.batch_size)
    settings = {**PRESETS[settings.get("preset", "default")], **settings}
    curves = float(settings.get("rounds", 1)) * float(settings.get("stages", 1))
    if "curve_steps" in settings:
        return curves * float(settings["curve_steps"]) * float(settings.get("per_device_train_batch_size", 64))
    epochs = settings.get("curve_epochs", TRANSFORMER_DEFAULTS["curve_epochs"])  # the most that a family takes
    return curves * float(epochs) * described["budget"] * (1 - described["held_out"])


def _seconds_per_image(plan: SuspectPlan, device: torch.device) -> float:
    """Of a training step of one process: augmentation, and both towers of a dual encoder, on one picture."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = TASKS[plan.kind].auto_class.from_config(AutoConfig.for_model(**plan.config)).to(device)
        inputs = {name: tensor.to(device) for name, tensor in example_inputs(model, batch_size=PROBE_BATCH).items()}
        inputs["pixel_values"] = torch.rand(PROBE_BATCH, 3, plan.image_size, plan.image_size, device=device)
        augment = Augmentation(plan.arguments.get("augmentation", "none"))
        times = []
        for _ in range(PROBE_STEPS):
            start = time.perf_counter()
            model(**{**inputs, "pixel_values": augment(inputs["pixel_values"], seed=0)})[0].sum().backward()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return min(times) / PROBE_BATCH
