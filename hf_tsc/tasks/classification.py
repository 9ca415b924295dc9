"""Image classifiers."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, PreTrainedModel

from hf_tsc.batch_norm import batch_norm_buffers
from hf_tsc.data import ImageData
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Attack, Evaluator
from hf_tsc.hub import Source
from hf_tsc.images import pixel_dataset
from hf_tsc.objectives import ImageClassification, LossSettings, Objective
from hf_tsc.tasks.base import Task, Work
from hf_tsc.tasks.classes import check_labels, class_names

UNCORRECTED_TRANSFORMER = (
    "The model was trained on the suspect's own answers. On a tiny transformer that is nearly always right they "
    "have brought the backdoor back in trials, on a larger one with more errors they did not; `--teacher_errors "
    "correct` is safer, and costs accuracy where the suspect is often wrong."
)


class Classification(Task):
    kind = "image classifier"
    auto_class = AutoModelForImageClassification
    pipeline_tag = "image-classification"
    objectives: ClassVar = {
        "distillation": "its own answers, no labels needed",
        "cross_entropy": "the labels of the images",
    }
    accuracy = "clean accuracy"

    def __init__(self, work: Work):
        super().__init__(work)
        config, data = work.config, work.data
        if data.label_column is None and config.objective == "cross_entropy":
            raise UsageError(
                f"{data.name} has no label column and the objective is cross_entropy: name one with "
                "--label_column_name, or purify without labels by --objective distillation"
            )
        corrected = config.teacher_errors != "keep" and work.data.label_column is not None
        if config.objective == "distillation" and not corrected and not batch_norm_buffers(work.model):
            self.notes.append(UNCORRECTED_TRANSFORMER)

    @classmethod
    def check_model(cls, model: PreTrainedModel, source: Source) -> None:
        """Refuse what is not a single-label classifier."""
        count = len(class_names(model))
        if model.config.problem_type == "multi_label_classification":
            raise UsageError(f"{source.name} is a multi-label classifier: expected one with a single label an image")
        if model.config.problem_type == "regression" or count < 2:
            raise UsageError(f"{source.name} has {count} output(s): expected a classifier with two classes or more")

    @classmethod
    def check_data(cls, model: PreTrainedModel, data: ImageData) -> list[str]:
        note = check_labels(data, model)
        return [note] if note else []

    def items(self, rows: np.ndarray) -> Dataset:
        return pixel_dataset(self.work.data, rows, self.work.pipeline)

    def objective_of(self, settings: LossSettings) -> Objective:
        score_name = "accuracy" if self.work.data.label_column is not None else "agreement"
        return ImageClassification.of(settings, self.work.pipeline, self.work.model, score_name=score_name)

    def measure(self, data: ImageData, rows: np.ndarray | None, attack: Attack | None) -> Evaluator | None:
        if data.label_column is None:
            return None
        check_labels(data, self.work.model)
        num_classes = len(class_names(self.work.model))
        return Evaluator(data, self.work.pipeline, indices=rows, num_classes=num_classes, attack=attack)
