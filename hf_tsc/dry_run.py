"""What a purification would take, from a model's configuration alone: no weights are downloaded."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_tsc.baseline_run import BaselineRun, check_method
from hf_tsc.baselines.registry import BASELINES
from hf_tsc.derive import example_inputs
from hf_tsc.hub import Source, list_repo, offline, quiet, resolve_model
from hf_tsc.hub.folder import no_weights
from hf_tsc.hub.loading import attention, bounded, making_a_model, read_config
from hf_tsc.images import pixel_dataset
from hf_tsc.job import Job, Measures
from hf_tsc.many import Access, Order
from hf_tsc.purify import config_for
from hf_tsc.specs import spec_of
from hf_tsc.tasks import task_of
from hf_tsc.tsc_config import TSCConfig, reported_arguments

PROBE_IMAGES = 32  # at most, in the step that is timed
# Of the weights, in float32: the suspect and its frozen copy, start, bend and end of the curve, the point and two
# gradients (of the point and of the bend).
COPIES = 8
MOMENTS = {"sgd": 1, "adamw_torch": 2, "adamw_torch_fused": 2}
FORWARD_SHARE = 1 / 3  # of a step: the usual ratio of a forward pass to forward and backward


@dataclass(frozen=True)
class DryRun:
    """What would be done, and what it would take.

    Attributes:
        model, revision: the suspect, and its commit on the Hub.
        files, weight_bytes: what would be pulled.
        kind, architecture, parameters: of the model.
        spaces: permutable spaces by kind.
        images: to train on, and held out.
        steps: optimisation steps in all, and images a step.
        memory_gb, free_memory_gb: estimated for weights and activations; free on this machine now.
        minutes: estimated, on this machine as it is now.
        arguments: of the configuration, by name.
        method: that would be used; a baseline has no spaces, and its steps are gradient evaluations.
        notes: what was seen while listing.
    """

    model: str
    revision: str | None
    files: int
    weight_bytes: int
    kind: str
    architecture: str
    parameters: int
    spaces: dict[str, int]
    images: tuple[int, int]
    steps: tuple[int, int]
    memory_gb: float
    free_memory_gb: float
    minutes: float
    arguments: dict[str, Any]
    notes: tuple[str, ...] = ()
    method: str = "tsc"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """For a reader."""
        train, held_out = self.images
        return [
            ("model", self.model + (f" at commit {self.revision}" if self.revision else "")),
            ("kind", f"{self.kind}: {self.architecture}, {self.parameters:,} weights"),
            ("to pull", f"{self.files} files, {self.weight_bytes / 1e6:,.1f} MB of them weights"),
            *self._rows_of_the_method(("clean images", f"{train:,} to train on, {held_out:,} held out")),
            ("objective", str(self.arguments["objective"])),
            (
                "memory",
                f"about {self.memory_gb:.1f} GB for weights and activations; free now: {self.free_memory_gb:.1f} GB",
            ),
            ("time", f"about {self.minutes:.0f} minutes here" if self.minutes >= 1 else "less than a minute here"),
            *(("note", note) for note in self.notes),
        ]

    def _rows_of_the_method(self, images: tuple[str, str]) -> list[tuple[str, str]]:
        if self.method != "tsc":
            steps = f"{self.steps[0]:,} gradient evaluations of {self.steps[1]} images"
            return [("method", BASELINES[self.method].title), images, ("steps", steps)]
        spaces = ", ".join(f"{count} {kind}" for kind, count in sorted(self.spaces.items()))
        stages, rounds = self.arguments["stages"], self.arguments["rounds"]
        return [
            ("spaces", f"{sum(self.spaces.values())} ({spaces})"),
            images,
            ("steps", f"{self.steps[0]:,} of {self.steps[1]} images, in {rounds} round(s) of {stages} curve(s)"),
        ]


def dry_run(model: str, order: Order) -> DryRun:
    """Look at what a purification would do; only the model's configurations are downloaded.

    Raises:
        UsageError: as `purify`, as far as that shows without weights.
    """
    source, files, weight_bytes = _look(model, order.access)
    task = task_of(source)
    suspect = _without_weights(source, task.auto_class, weight_bytes)
    task.check_model(suspect, source)
    check_method(order.method, order.arguments, preset=order.preset, resume=False)
    baseline = None if order.method == "tsc" else BaselineRun.of(order.method, suspect, task, order.arguments)
    config = config_for(suspect, task, order.arguments, order.preset) if baseline is None else baseline.config
    asked: dict[str, Any] = {"budget": order.budget, "held_out": order.held_out, "options": order.options}
    job = Job.prepare(task, source, suspect, order.data, config, **asked)
    Measures.prepare(job, order.test, order.attack)
    subset = job.work.subset
    train, kept = len(subset.train), len(subset.held_out)
    if baseline is None:
        steps = config.segment_steps(train) * config.stages * config.rounds
        arguments, measured = reported_arguments(config), config.stages * config.rounds * (config.sweep_points + 2)
        spec = spec_of(suspect, example_inputs(suspect))
        spaces: dict[str, int] = dict(Counter(str(space.kind) for space in spec.spaces.values()))
    else:
        steps, arguments, measured = baseline.settings.gradient_evaluations(train), asdict(baseline.settings), 2
        spaces = {}
    parameters = sum(parameter.numel() for parameter in suspect.parameters())
    batch = config.train_batch_size
    seconds, activations = _probe(suspect, _inputs(job, subset.train[: min(batch, PROBE_IMAGES)]))
    copies = COPIES + MOMENTS.get(str(getattr(config.optim, "value", config.optim)), 2)
    memory = 4 * parameters * copies + activations * max(batch, config.statistics_batch_size // 2)
    return DryRun(
        model=source.name,
        revision=source.revision,
        files=files,
        weight_bytes=weight_bytes,
        kind=task.kind,
        architecture=type(suspect).__name__,
        parameters=parameters,
        spaces=spaces,
        images=(train, kept),
        steps=(steps, batch),
        memory_gb=round(memory / 1e9, 2),
        free_memory_gb=round(psutil.virtual_memory().available / 1e9, 2),
        minutes=round(seconds * _images(config, steps, measured * (train + kept)) / 60, 2),
        arguments=arguments,
        notes=source.notes,
        method=order.method,
    )


def _look(model: str, access: Access) -> tuple[Source, int, int]:
    """A model's configurations, the number of files and the bytes of weights."""
    if access.is_folder(model):
        source = access.resolve(model)
        sizes = [file.stat().st_size for file in source.path.glob("*.safetensors")]
        return source, sum(1 for file in source.path.iterdir() if file.is_file()), sum(sizes)
    listing = list_repo(model, revision=access.revision, token=access.token)
    if not listing.weights:
        raise no_weights(model)
    source = resolve_model(model, revision=listing.revision, token=access.token, weights=False)
    return source, len(listing.sizes), listing.weights


def _without_weights(source: Source, auto_class: Any, weight_bytes: int) -> PreTrainedModel:
    """The model with random weights; it may not be larger than those that are stored."""
    with quiet(), offline():
        config = read_config(source, auto_class)
        implementation = attention(config, auto_class)
        elements = weight_bytes // 2  # of two bytes each, at most
        with bounded(elements // 1000 + 1000, elements), making_a_model(source, config):
            with torch.device("meta"):
                auto_class.from_config(config, attn_implementation=implementation)
            model: PreTrainedModel = auto_class.from_config(config, attn_implementation=implementation)
    return model.eval()


def _inputs(job: Job, rows: np.ndarray) -> dict[str, Tensor]:
    """Some of the clean images as the model takes them, with texts that mean nothing where it reads any."""
    pipeline = job.work.pipeline
    images = pixel_dataset(job.work.data, rows, pipeline)
    pixels = torch.stack([images[i]["pixels"] for i in range(len(rows))])
    return {**example_inputs(job.model, batch_size=len(rows)), "pixel_values": pipeline.model_input(pixels)}


def _probe(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[float, int]:
    """Seconds and bytes of activations that one image takes in a training step; the better of two steps."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    seconds, images = [], len(inputs["pixel_values"])
    for _ in range(2):
        saved.clear()
        started = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model(**inputs).to_tuple()
        loss: Any = sum(value.square().sum() for value in outputs if isinstance(value, Tensor))
        loss.backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - started)
    return min(seconds) / images, sum(saved.values()) // images


def _images(config: TSCConfig, steps: int, measured: int) -> float:
    """How many images are trained on, in passes forward and backward; forward ones count by their share.

    `measured` are passes forward alone.
    """
    trained = steps * config.train_batch_size * config.gradient_accumulation_steps
    teacher = FORWARD_SHARE if config.objective == "distillation" else 0.0
    return trained * (1 + teacher) + FORWARD_SHARE * measured
