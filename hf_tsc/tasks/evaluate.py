"""Measure any kind of model on labelled or captioned images."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from hf_tsc.data import ImageData, check_apart
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Attack, Evaluator
from hf_tsc.evidence.gather import find_triggers
from hf_tsc.evidence.settings import EvidenceSettings
from hf_tsc.hub import Source, load_image_processor, load_model, load_tokenizer
from hf_tsc.images import ImagePipeline, pixel_dataset
from hf_tsc.readers import LinearProbe
from hf_tsc.tasks import Classification, Encoding, Options, task_of
from hf_tsc.tasks.base import Measure
from hf_tsc.tasks.classes import check_labels, class_names
from hf_tsc.tasks.image_text import matching_measure

logger = logging.getLogger(__name__)


def evaluate_source(
    source: Source,
    data: ImageData,
    *,
    attack: Attack | None = None,
    probe_data: ImageData | None = None,
    options: Options | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Accuracy, with a trigger the attack success rate, and for captioned images retrieval.

    Args:
        source: the checked model.
        data: the images to measure on, labelled (classifiers, encoders) or with class names or captions (dual
            encoders).
        attack: a known trigger.
        probe_data: labelled images that a linear probe of an encoder is fitted on.
        options: prompts, and how many images the probe takes.
        device: where to run.

    Returns:
        Measures by name, as fractions, with their numbers of images.

    Raises:
        UsageError: the model or the data do not fit.
    """
    options = options or Options()
    kind = task_of(source)
    model, _ = load_model(source, auto_class=kind.auto_class)
    kind.check_model(model, source)
    pipeline = ImagePipeline(load_image_processor(source))
    measure: Measure | None
    if kind is Classification:
        check_labels(data, model)
        measure = Evaluator(data, pipeline, num_classes=len(class_names(model)), attack=attack)
    elif kind is Encoding:
        measure = _probed(data, probe_data, pipeline, attack, options)
    else:
        tokenizer = load_tokenizer(source)
        measure = matching_measure(model, tokenizer, pipeline, data, None, attack, options.templates)
    if measure is None:
        raise UsageError(
            f"{data.name} has neither captions nor class names: expected a column of text (--caption_column_name) or "
            "labels with names (--label_column_name)"
        )
    on_device: Any = model
    return measure.measure(on_device.to(device), device=device)


def search_source(
    source: Source,
    data: ImageData,
    settings: EvidenceSettings,
    *,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """Search any kind of model for triggers, without knowing one; see `find_triggers`.

    Args:
        source: the checked model.
        data: clean images; labels play no part.
        settings: how much to search.
        device: where to run.
        progress: show a bar.

    Raises:
        UsageError: the model does not fit.
    """
    kind = task_of(source)
    model, _ = load_model(source, auto_class=kind.auto_class)
    kind.check_model(model, source)
    images = pixel_dataset(data, np.arange(len(data.rows)), ImagePipeline(load_image_processor(source)))
    on_device: Any = model
    return find_triggers(on_device.to(device), kind, images, settings, progress=progress)


def _probed(
    data: ImageData, probe_data: ImageData | None, pipeline: ImagePipeline, attack: Attack | None, options: Options
) -> Evaluator:
    if probe_data is None:
        raise UsageError(
            "an encoder is measured by a linear probe, which needs labelled images of its own: name their split with "
            "--probe_split"
        )
    labels = probe_data.labels
    if labels is None:
        raise UsageError(f"{probe_data.name} has no label column: a linear probe is fitted on labels")
    rows = np.sort(np.random.default_rng(0).permutation(len(probe_data.rows))[: options.probe_images])
    for note in check_apart(data, probe_data, rows, "to fit the linear probe (--probe_split)"):
        logger.warning(note)
    probe = LinearProbe(pixel_dataset(probe_data, rows, pipeline))
    return Evaluator(data, pipeline, num_classes=int(labels.max()) + 1, attack=attack, reader=probe)
