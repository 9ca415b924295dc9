"""Dual encoders of images and texts: CLIP, SigLIP, ..."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModel, PreTrainedModel

from hf_tsc.captions import CaptionedImages, CaptionTable, captions_of, find_caption_column, prompts
from hf_tsc.data import ImageData
from hf_tsc.derive import example_inputs
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Attack, Evaluator
from hf_tsc.hub import Source, load_tokenizer
from hf_tsc.images import ImagePipeline, collate, pixel_dataset
from hf_tsc.objectives import Captions, EmbeddingDistillation, Forward, ImageText, LossSettings, Objective
from hf_tsc.readers import ReadOnce, ZeroShot, image_embeddings, text_embeddings
from hf_tsc.tasks.base import Task, Work
from hf_tsc.tasks.encoding import check_pairs
from hf_tsc.tsc_config import PAIRWISE


class ImageTextMatching(Task):
    kind = "image-text dual encoder"
    auto_class = AutoModel
    pipeline_tag = "zero-shot-image-classification"
    objectives: ClassVar = {
        "distillation": "its own embeddings of images and texts, which need not belong together",
        "image_text": "pairs of image and text",
    }
    accuracy = "zero-shot accuracy"

    def __init__(self, work: Work):
        super().__init__(work)
        self.tokenizer = load_tokenizer(work.source)
        if work.config.objective in PAIRWISE:
            check_pairs(work)
        self.column = find_caption_column(work.data)
        if self.column is None and work.data.class_names is None:
            raise UsageError(
                f"{work.data.name} has neither captions nor class names: expected a column of text "
                "(--caption_column_name) or labels with names (--label_column_name)"
            )
        self.table = CaptionTable()
        self.by_row = self._captions(work.data, self.column)
        self.captions = tokenised(self.table, work.model, self.tokenizer)
        if self.column is None:
            template = work.options.templates[0]
            self.notes.append(f"The images have no captions: prompts were made of class names ({template!r}, ...).")
        if self.captions.truncated:
            self.notes.append(
                f"{self.captions.truncated} of {len(self.captions.texts)} captions were longer than the text tower "
                "takes, and were cut."
            )

    @classmethod
    def check_model(cls, model: PreTrainedModel, source: Source) -> None:
        """Refuse what reads other things than images and texts."""
        if further := sorted(example_inputs(model).keys() ^ {"pixel_values", "input_ids"}):
            raise UsageError(f"{source.name} has other inputs than pixel_values and input_ids: {', '.join(further)}")

    def items(self, rows: np.ndarray) -> Dataset:
        images = pixel_dataset(self.work.data, rows, self.work.pipeline)
        return CaptionedImages(images, [self.by_row[row] for row in rows])

    def objective_of(self, settings: LossSettings) -> Objective:
        work = self.work
        shared: dict[str, Any] = {
            "sigmoid": hasattr(work.model, "logit_bias"),
            "augmentation": settings.augmentation,
        }
        if settings.objective == "image_text":
            return ImageText(work.pipeline, self.captions, **shared)
        return EmbeddingDistillation(
            work.pipeline,
            self.captions,
            work.model,
            mixup_alpha=settings.mixup_alpha,
            feature_weight=settings.feature_weight,
            feature_states=settings.feature_states,
            **shared,
        )

    def measure(self, data: ImageData, rows: np.ndarray | None, attack: Attack | None) -> MatchingMeasure | None:
        work = self.work
        return matching_measure(work.model, self.tokenizer, work.pipeline, data, rows, attack, work.options.templates)

    def save(self, folder: Any) -> None:
        super().save(folder)
        self.tokenizer.save_pretrained(folder)

    def _captions(self, data: ImageData, column: str | None) -> list[list[int]]:
        """The numbers of each row's captions, or of the prompts of its class."""
        if column is not None:
            return [self.table.add(texts) for texts in captions_of(data, column)]
        by_class = [self.table.add(prompts(name, self.work.options.templates)) for name in data.class_names or []]
        labels: Any = data.labels
        return [by_class[label] for label in labels]


def tokenised(table: CaptionTable, model: PreTrainedModel, tokenizer: Any) -> Captions:
    """All texts of a table, as long as the text tower takes them."""
    length = min(model.config.text_config.max_position_embeddings, tokenizer.model_max_length)
    return table.tokenise(tokenizer, model, length)


def zero_shot_reader(
    model: PreTrainedModel, tokenizer: Any, class_names: Sequence[str], templates: Sequence[str]
) -> ZeroShot:
    """Reads classes by prompts made of their names."""
    table = CaptionTable()
    numbers = [table.add(prompts(name, templates)) for name in class_names]
    return ZeroShot(tokenised(table, model, tokenizer), numbers, example_inputs(model)["pixel_values"][:1])


class Retrieval:
    """Recall at 1 both ways among the pairs of a data set; captions that say the same count as the same."""

    def __init__(self, pairs: CaptionedImages, captions: Captions):
        self.pairs, self.captions = pairs, captions

    @torch.no_grad()
    def __call__(self, forward: Forward, *, device: Any) -> dict[str, float]:
        loader: Any = DataLoader(self.pairs, batch_size=128, collate_fn=collate, generator=torch.Generator())
        images, texts, numbers = list[Tensor](), list[Tensor](), list[Tensor]()
        for batch in loader:
            inputs = self.pairs.pipeline.model_input(batch["pixels"].to(device))
            first = batch["captions"][:, 0].to(device)
            images.append(image_embeddings(forward, inputs, self.captions))
            texts.append(text_embeddings(forward, first, self.captions, inputs[:1]))
            numbers.append(first)
        similarity, number = torch.cat(images) @ torch.cat(texts).T, torch.cat(numbers)
        return {
            "image_to_text": (number[similarity.argmax(1)] == number).double().mean().item(),
            "text_to_image": (number[similarity.argmax(0)] == number).double().mean().item(),
        }


@dataclass(frozen=True)
class MatchingMeasure:
    """What there is to measure of a dual encoder."""

    zero_shot: Evaluator | None
    retrieval: Retrieval | None

    def measure(self, forward: Forward, *, device: Any = "cpu") -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.zero_shot is not None:
            found |= self.zero_shot.measure(forward, device=device)
        if self.retrieval is not None:
            found |= {"n": len(self.retrieval.pairs), **self.retrieval(forward, device=device)}
        return found

    def monitors(self) -> dict[str, Any]:
        return self.zero_shot.monitors() if self.zero_shot is not None else {}


def matching_measure(
    model: PreTrainedModel,
    tokenizer: Any,
    pipeline: ImagePipeline,
    data: ImageData,
    rows: np.ndarray | None,
    attack: Attack | None,
    templates: Sequence[str],
) -> MatchingMeasure | None:
    """Zero-shot classification where there are class names, retrieval where there are captions; else None."""
    zero_shot, retrieval = None, None
    chosen = np.arange(len(data.rows)) if rows is None else rows
    if data.class_names is not None:
        reader = zero_shot_reader(model, tokenizer, data.class_names, templates)
        options: dict[str, Any] = {"num_classes": len(data.class_names), "attack": attack, "reader": ReadOnce(reader)}
        zero_shot = Evaluator(data, pipeline, indices=chosen, **options)
    column = find_caption_column(data)
    if column is not None:
        table = CaptionTable()
        by_row = [table.add(texts) for texts in captions_of(data, column)]
        pairs = CaptionedImages(pixel_dataset(data, chosen, pipeline), [by_row[row] for row in chosen])
        retrieval = Retrieval(pairs, tokenised(table, model, tokenizer))
    if attack is not None and zero_shot is None:
        raise UsageError(
            f"{data.name} has no labels with names: the attack success rate of a dual encoder is measured on its "
            "class names (--label_column_name)"
        )
    return MatchingMeasure(zero_shot, retrieval) if zero_shot or retrieval else None
