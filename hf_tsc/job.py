"""What a purification works on, and what it is measured on: model, clean images and test images, checked together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from hf_tsc.data import ImageData, check_apart, clean_subset, indices_hash, open_images, parse_budget
from hf_tsc.derive import image_size
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Attack
from hf_tsc.functional import tensors_of
from hf_tsc.hub import Source, load_image_processor
from hf_tsc.images import ImagePipeline, pixel_dataset
from hf_tsc.permutation import Params
from hf_tsc.tasks import Measure, Options, Task, Work
from hf_tsc.tsc_config import TSCConfig
from hf_tsc.tsc_trainer import TSCTrainer


@dataclass
class DataArguments:
    """Where the images are."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset id on the Hub, folder of images or parquet, or a save_to_disk folder."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split; by default `train` or the only one."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the dataset."})
    image_column_name: str | None = field(default=None, metadata={"help": "Column of images, if there are several."})
    label_column_name: str | None = field(default=None, metadata={"help": "Column of labels, if there are several."})
    caption_column_name: str | None = field(
        default=None, metadata={"help": "Column of captions (image-text models), if there are several of text."}
    )

    def open(self, split: str | None = None, *, token: str | bool | None = False) -> ImageData:
        """The split `dataset_split`, or another one of the same dataset."""
        if self.dataset_name is None:
            raise UsageError("--dataset_name is missing: give a dataset id, or a folder of images")
        return open_images(
            self.dataset_name,
            config_name=self.dataset_config_name,
            split=split or self.dataset_split,
            revision=self.dataset_revision,
            image_column=self.image_column_name,
            label_column=self.label_column_name,
            caption_column=self.caption_column_name,
            token=token,
        )


@dataclass(frozen=True)
class Job:
    """What is purified, and on which images."""

    work: Work
    task: Task

    @classmethod
    def prepare(
        cls,
        kind: type[Task],
        source: Source,
        model: PreTrainedModel,
        data: ImageData,
        config: TSCConfig,
        *,
        budget: str | int | float,
        held_out: float,
        options: Options,
    ) -> Job:
        kind.check_data(model, data)
        size = parse_budget(budget) if isinstance(budget, str) else budget
        subset = clean_subset(data.labels, len(data.rows), budget=size, held_out=held_out, seed=config.seed)
        if not len(subset.held_out):
            raise UsageError(
                f"budget={budget} of {len(data.rows)} images, with held_out={held_out}, leaves {len(subset.train)} to "
                "train on and none to measure on: raise the budget, or the share that is held out"
            )
        pipeline = ImagePipeline(load_image_processor(source))
        work = Work(source, model, data, subset, pipeline, config, options)
        job = cls(work, kind(work))
        job._check_size()
        return job

    @property
    def source(self) -> Source:
        return self.work.source

    @property
    def model(self) -> PreTrainedModel:
        return self.work.model

    def _check_size(self) -> None:
        """The processor must give images of the size that the model's configuration names, if it names one."""
        work = self.work
        vision = getattr(work.model.config, "vision_config", work.model.config)
        given = tuple(pixel_dataset(work.data, work.subset.train[:1], work.pipeline)[0]["pixels"].shape[-2:])
        if hasattr(vision, "image_size") and given != image_size(vision):
            raise UsageError(
                f"the image processor makes images of {given}, the model takes {image_size(vision)}: "
                "correct the `size` (or `crop_size`) in the suspect's preprocessor_config.json"
            )

    def describe(self) -> dict[str, Any]:
        """The data set and the rows that are used, for the report."""
        subset = self.work.subset
        return {
            **self.work.data.describe(),
            "train_indices": subset.train.tolist(),
            "held_out_indices": subset.held_out.tolist(),
            "indices_hash": indices_hash(subset.used),
            "processor_backend": type(self.work.pipeline.processor).__name__,
        }


@dataclass(frozen=True)
class OwnScore:
    """The score of what a model is trained for, on the held-out images.

    Attributes:
        device: where models are measured.
        name: of the score.
        images: how many are held out.
        score: of a model's parameters and buffers, a fraction.
    """

    device: torch.device
    name: str
    images: int
    score: Callable[[Params], float]

    @classmethod
    def of_trainer(cls, trainer: TSCTrainer) -> OwnScore:
        images = len(trainer.eval_dataset)  # type: ignore[arg-type]
        name, device = trainer.objective.score_name, trainer.args.device
        return cls(device, name, images, lambda tensors: trainer.measure(tensors)["score"])


@dataclass(frozen=True)
class Measures:
    """Measures a model on the held-out images, and on a test set where there is one."""

    by_place: dict[str, Measure]

    @classmethod
    def prepare(cls, job: Job, test: ImageData | None, attack: Attack | None) -> Measures:
        data = job.work.data
        if attack is not None and data.label_column is None and test is None:
            raise UsageError(
                "a trigger was given but no labelled images to measure it on: give a test set with labels"
            )
        places = {"held_out": job.task.measure(data, job.work.subset.held_out, attack)}
        if test is not None:
            job.task.notes += check_apart(test, data, job.work.subset.used, "to purify (--test_split)")
            places["test"] = job.task.measure(test, None, attack)
            if places["test"] is None and test.label_column is not None and data.label_column is not None:
                raise UsageError(
                    f"all of {data.name} is used to purify: no image is left to fit a linear probe on, by which "
                    f"{test.name} is measured; lower the budget"
                )
            if places["test"] is None:
                raise UsageError(f"{test.name} has no labels: expected labelled images, to measure accuracy on them")
        return cls({place: measure for place, measure in places.items() if measure is not None})

    def __call__(self, own: OwnScore, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
        """By place; on the held-out images also the objective's own score, where no accuracy says the same."""
        found = {place: measure.measure(model.eval(), device=own.device) for place, measure in self.by_place.items()}
        if own.name not in found.get("held_out", {}):
            held_out = {"n": own.images, own.name: own.score(tensors_of(model))}
            found = {"held_out": {**found.get("held_out", {}), **held_out}} | {
                place: measured for place, measured in found.items() if place != "held_out"
            }
        return found

    def monitors(self, device: str) -> dict[str, Any]:
        """What is recorded along the curves for the plot, never for a choice: test accuracy, attack success rate."""
        found: dict[str, Any] = {}
        if "test" in self.by_place and "accuracy" in (monitors := self.by_place["test"].monitors()):
            found["test_accuracy"] = partial(monitors["accuracy"], device=device)
        attacked = self.by_place.get("test", self.by_place.get("held_out"))
        if attacked is not None and "attack_success_rate" in (monitors := attacked.monitors()):
            found["attack_success_rate"] = partial(monitors["attack_success_rate"], device=device)
        return found


def as_image_data(dataset: str | Dataset | ImageData) -> ImageData:
    """Open what is not open yet."""
    return dataset if isinstance(dataset, ImageData) else open_images(dataset)
