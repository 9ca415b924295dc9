"""Image encoders without a classifier."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import AutoModel, PreTrainedModel

from hf_tsc.data import ImageData, check_apart
from hf_tsc.derive import example_inputs
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Attack, Evaluator
from hf_tsc.hub import Source
from hf_tsc.images import pixel_dataset
from hf_tsc.objectives import FeatureDistillation, LossSettings, Objective, ProjectionHead, SimCLR, features_of
from hf_tsc.readers import LinearProbe, ReadOnce
from hf_tsc.tasks.base import Task, Work


class Encoding(Task):
    kind = "image encoder"
    auto_class = AutoModel
    pipeline_tag = "image-feature-extraction"
    objectives: ClassVar = {
        "distillation": "its own features, no labels needed",
        "simclr": "two views of each image, no labels",
    }
    accuracy = "linear-probe accuracy"

    def __init__(self, work: Work):
        super().__init__(work)
        if work.config.objective == "simclr":
            check_pairs(work)
        if work.data.label_column is None:
            self.notes.append("The clean images had no labels: no linear probe was fitted.")

    @classmethod
    def check_model(cls, model: PreTrainedModel, source: Source) -> None:
        """Refuse an encoder without pooled output."""
        inputs = example_inputs(model)
        if further := sorted(inputs.keys() - {"pixel_values"}):
            raise UsageError(f"{source.name} reads {', '.join(further)}: expected an encoder of pixel_values alone")
        with torch.no_grad():
            features_of(model, inputs["pixel_values"])

    def items(self, rows: np.ndarray) -> Dataset:
        return pixel_dataset(self.work.data, rows, self.work.pipeline)

    def objective_of(self, settings: LossSettings) -> Objective:
        work, augmentation = self.work, settings.augmentation
        if settings.objective == "distillation":
            return FeatureDistillation(
                work.pipeline,
                work.model,
                augmentation=augmentation,
                mixup_alpha=settings.mixup_alpha,
                feature_weight=settings.feature_weight,
                feature_states=settings.feature_states,
            )
        with torch.no_grad():
            pixels = example_inputs(work.model)["pixel_values"].to(work.model.device)
            features = features_of(work.model, pixels).shape[1]
        head = ProjectionHead(features, seed=work.config.seed)
        return SimCLR(work.pipeline, head=head, temperature=settings.temperature, augmentation=augmentation)

    def measure(self, data: ImageData, rows: np.ndarray | None, attack: Attack | None) -> Evaluator | None:
        """By a probe that is fitted on clean images that the purification does not see."""
        work = self.work
        if data.label_column is None or work.data.labels is None:
            return None
        others = np.setdiff1d(np.arange(len(work.data.rows)), work.subset.used)
        if len(others) == 0:
            note = "All clean images were used to purify: none was left to fit a linear probe on."
            self.notes += [note] if note not in self.notes else []
            return None
        drawn = np.sort(np.random.default_rng(work.config.seed).permutation(others)[: work.options.probe_images])
        if data is not work.data:
            self.notes += check_apart(data, work.data, drawn, "to fit the linear probe")
        probe = LinearProbe(pixel_dataset(work.data, drawn, work.pipeline))
        classes = int(work.data.labels.max()) + 1
        return Evaluator(data, work.pipeline, indices=rows, num_classes=classes, attack=attack, reader=ReadOnce(probe))


def check_pairs(work: Work) -> None:
    """Losses that compare the items of a batch need several.

    Raises:
        UsageError: batches of one, or fewer images than a batch.
    """
    batch, images = work.config.train_batch_size, len(work.subset.train)
    if batch < 2:
        raise UsageError(
            f"--per_device_train_batch_size {batch}: the objective {work.config.objective} compares the images of a "
            "batch with each other; give 2 or more (accumulated batches do not count)"
        )
    if images < batch:
        raise UsageError(
            f"--per_device_train_batch_size {batch}: there are {images} images to train on, which makes no whole "
            "batch; give fewer a batch or a larger --budget"
        )
