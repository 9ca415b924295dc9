"""Evidence of one model and of two: triggers searched in each, and how far the two are apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_tsc.activations import Batch
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Reader, read_logits
from hf_tsc.evidence.agreement import feature_cosine, same_class
from hf_tsc.evidence.barrier import clean_loss, loss_barrier, parameters_of
from hf_tsc.evidence.classes import invert_classes
from hf_tsc.evidence.encoder import features_function, invert_encoder
from hf_tsc.evidence.settings import CLASS_SEARCH, ENCODER_SEARCH, EvidenceSettings
from hf_tsc.functional import tensors_of
from hf_tsc.images import in_order
from hf_tsc.job import Job
from hf_tsc.objectives import FeatureDistillation, ImageClassification, Objective
from hf_tsc.passes import match_networks
from hf_tsc.permutation import Params, PermutationSpec, apply, identity
from hf_tsc.tasks import Classification, Encoding, ImageTextMatching, Task
from hf_tsc.tasks.classes import class_names
from hf_tsc.tasks.image_text import zero_shot_reader

BATCH_SIZE = 128  # images a forward pass where nothing is searched


def find_triggers(
    model: PreTrainedModel,
    kind: type[Task],
    images: Any,
    settings: EvidenceSettings,
    *,
    progress: bool = False,
    title: str = "Searching for triggers",
) -> dict[str, Any]:
    """Search one model for triggers: for one of each class, or of an encoder's features.

    Args:
        model: where it is to run; left as it was.
        kind: of the model.
        images: a `PixelDataset` (or one like it) of clean images; at most `settings.images` of them are used, drawn
            with the seed. Labels play no part.
        settings: how much to search.
        progress: show a bar, called `title`.

    Returns:
        See `ClassTriggers.to_dict` and `EncoderTrigger.to_dict`.
    """
    if len(images) < 2:
        raise UsageError(f"triggers are searched on several images, and there are {len(images)}: give more")
    order = np.random.default_rng(settings.seed).permutation(len(images))
    drawn = np.sort(order[: settings.images]).tolist()
    pixels = torch.stack([images[number]["pixels"] for number in drawn]).to(model.device)
    shown: dict[str, Any] = {"seed": settings.seed, "progress": progress, "title": title}
    normalize = images.pipeline.normalize
    if kind is Classification:
        classes, how = len(class_names(model)), settings.limit(CLASS_SEARCH)
        return invert_classes(model, pixels, normalize, classes=classes, how=how, **shown).to_dict()
    return invert_encoder(model, pixels, normalize, how=settings.limit(ENCODER_SEARCH), **shown).to_dict()


def gather(
    job: Job,
    purified: PreTrainedModel,
    settings: EvidenceSettings,
    *,
    spec: PermutationSpec | None,
    progress: bool = False,
) -> dict[str, Any]:
    """Everything that a report says without a trigger of a suspect and of what became of it.

    Triggers are searched on all clean images of the job, those included that the purification has seen; the two models
    are compared on those that were held out.

    Args:
        job: of the purification; its model is the suspect, as it was.
        purified: the result, on the suspect's device.
        settings: how much to search.
        spec: the model's permutations, to see the barrier with the purified model re-aligned; None: as it is, only.
        progress: show bars.
    """
    started, kind, work = time.monotonic(), type(job.task), job.work
    items, held_out = job.task.items(work.subset.train), job.task.items(work.subset.held_out)
    images = job.task.items(work.subset.used)
    found = {
        name: find_triggers(model, kind, images, settings, progress=progress, title=f"Searching {words} for triggers")
        for name, words, model in (("before", "suspect", job.model), ("after", "result", purified))
    }
    objective = FeatureDistillation(work.pipeline, job.model) if kind is Encoding else job.task.objective()
    reader = _reader(job)
    agreement = agreement_of(job.model, purified, held_out, kind=kind, reader=reader)
    barriers = barriers_of(
        job.model,
        purified,
        objective,
        items,
        held_out,
        spec=spec,
        batch_size=work.config.statistics_batch_size,
        memory_limit=work.config.statistics_bytes,
    )
    seconds = round(time.monotonic() - started, 1)
    return {"settings": asdict(settings), **found, "agreement": agreement, **barriers, "seconds": seconds}


def agreement_of(
    suspect: PreTrainedModel, purified: PreTrainedModel, images: Any, *, kind: type[Task], reader: Reader | None
) -> dict[str, Any]:
    """How alike two models are on some images: `top_1` (a share), where classes can be read; `cosine`, of features."""
    found: dict[str, Any] = {"n": len(images)}
    one, other, device = suspect.eval(), purified.eval(), suspect.device
    if reader is not None:
        found["top_1"] = same_class(one, other, images, reader=reader, device=device)
    if kind is not Classification:
        found["cosine"] = feature_cosine(features_function(one), features_function(other), images, device=device)
    return found


def barriers_of(
    suspect: PreTrainedModel,
    purified: PreTrainedModel,
    objective: Objective,
    statistics: Any,
    measured: Any,
    *,
    spec: PermutationSpec | None = None,
    batch_size: int = BATCH_SIZE,
    memory_limit: int | None = None,
) -> dict[str, Any]:
    """The loss barrier between two models, and with a spec also that after re-aligning the second one.

    Args:
        objective: gives the loss.
        statistics: items that BatchNorm's statistics are computed over, and that units are matched by.
        measured: items that the loss is of.
        spec: of the two.
        batch_size: images a forward pass.
        memory_limit: bytes of statistics for the matching that may be held at once.
    """
    read, of = partial(_batches, suspect, batch_size=batch_size), parameters_of
    loss = clean_loss(
        suspect.eval(), objective, statistics=partial(read, statistics), measured=partial(read, measured)
    )
    found = {"barrier": loss_barrier(loss, of(suspect), of(purified)).to_dict()}
    if spec is not None:
        aligned = _aligned(
            suspect, purified, spec, lambda: map(objective.model_inputs, read(statistics)), memory_limit
        )
        end = {name: aligned[name] for name in of(suspect)}
        found["aligned_barrier"] = loss_barrier(loss, of(suspect), end).to_dict()
    return found


def flat_evidence(
    suspect: PreTrainedModel,
    purified: PreTrainedModel | None,
    images: Any,
    *,
    kind: type[Task] = Classification,
    settings: EvidenceSettings | None = None,
) -> dict[str, Any]:
    """The figures alone, for a benchmark: of a suspect, and if there is one of what became of it.

    Args:
        suspect, purified: classifiers or encoders on one device.
        images: a `PixelDataset` of clean images, for everything.
        kind: of the models.
        settings: how much to search.

    Returns:
        `suspect_` and `purified_` with the keys of `find_triggers` that are single values, `agreement` and `barrier`.
    """
    settings = settings or EvidenceSettings()
    models = {"suspect": suspect, **({} if purified is None else {"purified": purified})}
    flat: dict[str, Any] = {}
    for name, model in models.items():
        triggers = find_triggers(model, kind, images, settings)
        flat |= {f"{name}_{key}": value for key, value in triggers.items() if key != "norms"}
    if purified is None:
        return flat
    reader = read_logits if kind is Classification else None
    agreement = agreement_of(suspect, purified, images, kind=kind, reader=reader)
    objective: Objective = FeatureDistillation(images.pipeline, suspect)
    if kind is Classification:
        objective = ImageClassification(images.pipeline, teacher=suspect)
    barrier = barriers_of(suspect, purified, objective, images, images)["barrier"]
    return {**flat, "agreement": agreement.get("top_1", agreement.get("cosine")), "barrier": barrier["height"]}


def _reader(job: Job) -> Reader | None:
    """How classes are read off the models of a job, if they can be."""
    if isinstance(job.task, ImageTextMatching) and (names := job.work.data.class_names) is not None:
        return zero_shot_reader(job.model, job.task.tokenizer, names, job.work.options.templates)
    return read_logits if isinstance(job.task, Classification) else None


def _aligned(
    suspect: PreTrainedModel,
    purified: PreTrainedModel,
    spec: PermutationSpec,
    inputs: Callable[[], Iterable[Batch]],
    memory_limit: int | None,
) -> Params:
    """The purified model with its units in the places of those of the suspect that they are most like."""
    points = [tensors_of(suspect), tensors_of(purified)]
    permutation = identity(spec) | match_networks(
        suspect, spec, inputs, points=points, maximize=True, memory_limit=memory_limit
    )
    return apply(points[1], spec, permutation)


def _batches(model: PreTrainedModel, items: Any, *, batch_size: int) -> Iterator[Batch]:
    return ({name: one.to(model.device) for name, one in batch.items()} for batch in in_order(items, batch_size))
