"""What a purification works on, and what it is measured on: model, clean images and test images, checked together."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from hf_tsc.batch_norm import batch_norm_buffers
from hf_tsc.data import CleanSubset, ImageData, check_classes, clean_subset, indices_hash, open_images, parse_budget
from hf_tsc.derive import image_size
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Attack, Evaluator
from hf_tsc.functional import tensors_of
from hf_tsc.hub import Source, load_image_processor
from hf_tsc.images import ImagePipeline, PixelDataset, pixel_dataset
from hf_tsc.tsc_config import TSCConfig
from hf_tsc.tsc_trainer import TSCTrainer

DISTILLED_TRANSFORMER = (
    "Distillation from the suspect has brought backdoors of small transformers back in trials; with labels "
    "(objective cross_entropy) they went."
)


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

    def open(self, split: str | None = None) -> ImageData:
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
        )


@dataclass(frozen=True)
class Job:
    """What is purified, and on which images."""

    source: Source
    model: PreTrainedModel
    data: ImageData
    subset: CleanSubset
    processor: Any
    pipeline: ImagePipeline
    notes: list[str]

    @classmethod
    def prepare(
        cls,
        source: Source,
        model: PreTrainedModel,
        data: ImageData,
        config: TSCConfig,
        budget: str | int | float,
        held_out: float,
    ) -> Job:
        labels, notes = data.labels, []
        if labels is None and config.objective == "cross_entropy":
            raise UsageError(
                f"{data.name} has no label column and the objective is cross_entropy: name one with "
                "--label_column_name, or purify without labels by --objective distillation"
            )
        note = check_labels(data, model)
        notes += [note] if note else []
        if config.objective == "distillation" and not batch_norm_buffers(model):
            notes.append(DISTILLED_TRANSFORMER)
        size = parse_budget(budget) if isinstance(budget, str) else budget
        subset = clean_subset(labels, len(data.rows), budget=size, held_out=held_out, seed=config.seed)
        processor = load_image_processor(source)
        job = cls(source, model, data, subset, processor, ImagePipeline(processor), notes)
        job._check_size()
        return job

    def part(self, indices: np.ndarray) -> PixelDataset:
        return pixel_dataset(self.data, indices, self.pipeline)

    def _check_size(self) -> None:
        """The processor must give images of the size that the model's configuration names, if it names one."""
        given = tuple(self.part(self.subset.train[:1])[0]["pixels"].shape[-2:])
        if hasattr(self.model.config, "image_size") and given != image_size(self.model.config):
            raise UsageError(
                f"the image processor makes images of {given}, the model takes {image_size(self.model.config)}: "
                "correct the `size` (or `crop_size`) in the suspect's preprocessor_config.json"
            )

    def describe(self) -> dict[str, Any]:
        train, held_out = self.subset.train, self.subset.held_out
        return {
            **self.data.describe(),
            "train_indices": train.tolist(),
            "held_out_indices": held_out.tolist(),
            "indices_hash": indices_hash(np.concatenate([train, held_out])),
            "processor_backend": type(self.processor).__name__,
        }


@dataclass(frozen=True)
class Measures:
    """Measures a model on the held-out images, and on a test set where there is one."""

    evaluators: dict[str, Evaluator]

    @classmethod
    def prepare(cls, job: Job, test: ImageData | None, attack: Attack | None) -> Measures:
        options: dict[str, Any] = {"num_classes": job.model.config.num_labels, "attack": attack}
        evaluators = {}
        if attack is not None and job.data.label_column is None and test is None:
            raise UsageError(
                "a trigger was given but no labelled images to measure it on: give a test set with labels"
            )
        if job.data.label_column is not None:
            evaluators["held_out"] = Evaluator(job.data, job.pipeline, indices=job.subset.held_out, **options)
        if test is not None:
            if test.rows._fingerprint == job.data.rows._fingerprint:
                raise UsageError(f"the test images are those of {job.data.name} that the clean ones are drawn from")
            check_labels(test, job.model)
            evaluators["test"] = Evaluator(test, job.pipeline, **options)
        return cls(evaluators)

    def __call__(self, trainer: TSCTrainer, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
        """By place; without labels the held-out images give the agreement with the suspect."""
        device = trainer.args.device
        found = {
            place: evaluator(model.eval(), device=device).to_dict() for place, evaluator in self.evaluators.items()
        }
        if "held_out" not in found:
            score = trainer.measure(tensors_of(model))["score"]
            found = {"held_out": {"n": len(trainer.eval_dataset), trainer.objective.score_name: score}, **found}  # type: ignore[arg-type]
        return found

    def monitors(self, device: str) -> dict[str, Any]:
        """What is recorded along the curves for the plot, never for a choice: test accuracy, attack success rate."""
        found: dict[str, Any] = {}
        if "test" in self.evaluators:
            found["test_accuracy"] = partial(self.evaluators["test"].clean_accuracy, device=device)
        attacked = self.evaluators.get("test", self.evaluators.get("held_out"))
        if attacked is not None and attacked.attack is not None:
            found["attack_success_rate"] = partial(attacked.attack_success_rate, device=device)
        return found


def as_image_data(dataset: str | Dataset | ImageData) -> ImageData:
    """Open what is not open yet."""
    return dataset if isinstance(dataset, ImageData) else open_images(dataset)


def class_names(model: PreTrainedModel) -> dict[int, str]:
    """Class number -> name, as the model's configuration has them."""
    return {int(number): str(name) for number, name in (model.config.id2label or {}).items()}


def check_labels(data: ImageData, model: PreTrainedModel) -> str | None:
    """See `check_classes`; unlabelled data fit any model."""
    labels = data.labels
    return None if labels is None else check_classes(data.class_names, int(labels.max()) + 1, class_names(model))


def model_name(source: Source) -> str:
    """Repo id, or the folder's own name without its place."""
    return source.repo_id or source.path.resolve().name


def check_classifier(model: PreTrainedModel, source: Source) -> None:
    """Refuse what is not a single-label classifier."""
    name, count = model_name(source), len(class_names(model))
    if model.config.problem_type == "multi_label_classification":
        raise UsageError(f"{name} is a multi-label classifier: expected one with a single label an image")
    if model.config.problem_type == "regression" or count < 2:
        raise UsageError(f"{name} has {count} output(s): expected a classifier with two classes or more")
