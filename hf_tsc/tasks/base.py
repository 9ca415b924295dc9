"""What a kind of model is purified by and measured with: one task a kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from hf_tsc.captions import TEMPLATES
from hf_tsc.data import CleanSubset, ImageData
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Attack
from hf_tsc.hub import Source
from hf_tsc.images import ImagePipeline
from hf_tsc.objectives import Forward, LossSettings, Objective
from hf_tsc.tsc_config import TSCConfig


@dataclass(frozen=True)
class Options:
    """What else a task can be told.

    Attributes:
        templates: prompts for class names, each with one `{}`.
        probe_images: images that a linear probe is fitted on, at most.
    """

    templates: Sequence[str] = TEMPLATES
    probe_images: int = 5000


@dataclass(frozen=True)
class Work:
    """What a task works on."""

    source: Source
    model: PreTrainedModel
    data: ImageData
    subset: CleanSubset
    pipeline: ImagePipeline
    config: TSCConfig
    options: Options


class Measure(Protocol):
    """What some images say of a network. Fractions."""

    def measure(self, forward: Forward, *, device: Any) -> dict[str, Any]:
        """All measures by name, and the numbers of images they are of (`n`, `n_triggered`)."""

    def monitors(self) -> dict[str, Callable[..., float]]:
        """`accuracy` and `attack_success_rate`, where there are such: functions of a forward and of `device=`."""


class Task(ABC):
    """How a kind of model is purified and measured.

    Args:
        work: the suspect and its images.

    Attributes:
        kind: the kind of model, in words.
        auto_class: of transformers, that loads it.
        pipeline_tag: of the Hub.
        objectives: those that fit, by names of `TSCConfig.objective`, and what each does; the default first.
        accuracy: what an accuracy is of this kind, in words.
        notes: what a reader of the report should know.

    Raises:
        UsageError: an objective that does not fit, or data that lack what it needs.
    """

    kind: ClassVar[str]
    auto_class: ClassVar[Any]
    pipeline_tag: ClassVar[str]
    objectives: ClassVar[dict[str, str]]
    accuracy: ClassVar[str]

    def __init__(self, work: Work):
        self.work, self.notes = work, self.check_data(work.model, work.data)
        if work.config.objective not in self.objectives:
            raise UsageError(
                f"--objective {work.config.objective} does not fit {work.source.name}, which is an {self.kind}: "
                f"expected one of {', '.join(self.objectives)}"
            )

    @classmethod
    @abstractmethod
    def check_model(cls, model: PreTrainedModel, source: Source) -> None:
        """Raises UsageError where a model cannot be used in this way."""

    @classmethod
    def check_data(cls, model: PreTrainedModel, data: ImageData) -> list[str]:
        """Notes on how the data fit the model. Raises UsageError where they do not."""
        return []

    @abstractmethod
    def items(self, rows: np.ndarray) -> Dataset:
        """Items of some rows of the clean data, as the objective wants them."""

    @classmethod
    def described(cls) -> dict[str, str]:
        """The kind, as a report names it."""
        return {"kind": cls.kind, "pipeline_tag": cls.pipeline_tag, "accuracy": cls.accuracy}

    def objective(self) -> Objective:
        """What the curves are trained for."""
        return self.objective_of(self.work.config)

    @abstractmethod
    def objective_of(self, settings: LossSettings) -> Objective:
        """The objective that some settings describe."""

    @abstractmethod
    def measure(self, data: ImageData, rows: np.ndarray | None, attack: Attack | None) -> Measure | None:
        """On some rows (all by default) of images; None where these say nothing but what the objective does."""

    def save(self, folder: Any) -> None:
        """What belongs to the model besides its weights: the image processor."""
        self.work.pipeline.processor.save_pretrained(folder)
