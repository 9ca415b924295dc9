"""purify: one call from a suspect and a clean data set to a folder with the purified model, its report and its card."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForImageClassification, PreTrainedModel

from hf_tsc.data import CleanSubset, ImageData, check_classes, clean_subset, indices_hash, open_images, parse_budget
from hf_tsc.derive import image_size
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Attack, Evaluator
from hf_tsc.folders import check_output, finished_folder, last_whole_checkpoint, write_json
from hf_tsc.hub import Source, load_image_processor, load_model, resolve_model
from hf_tsc.images import ImagePipeline, PixelDataset
from hf_tsc.objectives import Forward
from hf_tsc.report import CARD_FILE, PLOT_FILE, REPORT_FILE, PurificationReport, environment, plot_curves, summarise_spec
from hf_tsc.triggers import trigger_to_dict
from hf_tsc.tsc_config import TSCConfig
from hf_tsc.tsc_trainer import TSCTrainer

REQUEST_FILE = "request.json"
# Arguments of TSCConfig that do not change the result, or that name places on this machine.
_NOT_REPORTED = ("output_dir", "logging_dir", "run_name", "hub_token", "push_to_hub_token", "resume_from_checkpoint")


@dataclass
class DataArguments:
    """Where the images are."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset id on the Hub, folder of images or parquet, or a save_to_disk folder."}
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


def purify(
    model: str,
    dataset: str | Dataset | ImageData,
    output_dir: str | Path,
    *,
    config: TSCConfig | Mapping[str, Any] | None = None,
    budget: str | int | float = "5%",
    held_out: float = 0.2,
    test: ImageData | Dataset | None = None,
    attack: Attack | None = None,
    revision: str | None = None,
    local: bool = False,
    token: str | bool | None = False,
    resume: bool = False,
) -> PurificationReport:
    """Remove the backdoor that may be in an image classifier, and write the purified model to a folder.

    Args:
        model: repo id on the Hub, or a folder (`./x`, `/x`, or any with `local=True`).
        dataset: clean images: an id, a folder, or a loaded dataset. Labels are optional with `objective="distillation"`.
        output_dir: where the result goes; must not exist, or be empty. Checkpoints live in `{output_dir}.work` until
            the result is there.
        config: hyper-parameters, or a mapping of those that shall differ from the defaults for the model's family
            (`TSCConfig.for_model`). `output_dir` is set here.
        budget: how many clean images to use: a count, or a share such as `"5%"` or `0.05`.
        held_out: share of them kept from training and matching, for measuring and for choosing t*.
        test: further labelled images, to measure on before and after.
        attack: a known trigger, to measure the attack success rate before and after; it never takes part otherwise.
        revision: of the model repo.
        local: `model` is a folder.
        token: for private repos; none is sent by default.
        resume: go on from the last checkpoint of an interrupted run with the same arguments.

    Returns:
        The report, as written to `output_dir/tsc_report.json`.

    Raises:
        UsageError: wrong input (see the message); nothing is written.
        PurificationError: the work failed; checkpoints stay for `resume`.
        AccuracyBudgetError: `max_accuracy_drop` could not be kept; nothing is written to `output_dir`.
    """
    started, output = time.monotonic(), Path(output_dir)
    check_output(output)
    source = resolve_model(model, revision=revision, local=local, token=token)
    suspect, dtype = load_model(source, auto_class=AutoModelForImageClassification)
    _check_classifier(suspect, model)
    if not isinstance(config, TSCConfig):
        config = TSCConfig.for_model(suspect, **(config or {}))
    job = _Job.prepare(source, suspect, _as_image_data(dataset), config, budget, held_out)
    measures = _Measures.prepare(job, _as_image_data(test) if test is not None else None, attack)
    work = _work_folder(output, job, config, resume=resume)

    trainer = TSCTrainer(
        suspect,
        config,
        train_dataset=job.part(job.subset.train),
        eval_dataset=job.part(job.subset.held_out),
        processing_class=job.processor,
        monitors=measures.monitors(str(config.device)),
    )
    before = measures(trainer, suspect.to(config.device))
    checkpoint = last_whole_checkpoint(work) if resume else None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.accelerator.wait_for_everyone()

    with finished_folder(output) as folder:
        _save_model(trainer.purified_model(), dtype, source, job.processor, folder)
        saved = resolve_model(str(folder), local=True)
        purified, _ = load_model(saved, auto_class=AutoModelForImageClassification)
        after = measures(trainer, purified.to(config.device))
        report = PurificationReport(
            suspect=_describe_suspect(source, suspect, model, dtype),
            dataset=job.describe(),
            spec=summarise_spec(trainer.spec, trainer.verification.error, trainer.verification.control),
            arguments=_arguments(config),
            curves=[curve.to_dict() for curve in trainer.curves],
            before=before,
            after=after,
            score_name=trainer.objective.score_name,
            attack=_describe_attack(attack),
            purified={"dtype": str(dtype).removeprefix("torch."), "files": saved.file_hashes},
            environment=environment(config.device),
            cost={
                "seconds": round(time.monotonic() - started, 1),
                "gradient_evaluations": trainer.state.max_steps * config.gradient_accumulation_steps,
            },
            notes=job.notes,
        )
        _write_report(report, trainer, folder)
    shutil.rmtree(work, ignore_errors=True)
    return report


@dataclass(frozen=True)
class _Job:
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
    ) -> _Job:
        labels, notes = data.labels, []
        if labels is None and config.objective == "cross_entropy":
            raise UsageError(
                f"{data.name} has no label column and the objective is cross_entropy: name one with "
                "--label_column_name, or purify without labels by --objective distillation"
            )
        if labels is not None:
            note = check_classes(data.class_names, int(labels.max()) + 1, model.config.id2label)
            notes += [note] if note else []
        size = parse_budget(budget) if isinstance(budget, str) else budget
        subset = clean_subset(labels, len(data.rows), budget=size, held_out=held_out, seed=config.seed)
        processor = load_image_processor(source)
        job = cls(source, model, data, subset, processor, ImagePipeline(processor), notes)
        job._check_size()
        return job

    def part(self, indices: np.ndarray) -> PixelDataset:
        return PixelDataset(
            self.data.rows, indices, self.pipeline, image_column=self.data.image_column, label_column=self.data.label_column
        )

    def _check_size(self) -> None:
        """The processor must give images of the size that the model was made for (where its configuration names one)."""
        given = tuple(self.part(self.subset.train[:1])[0]["pixels"].shape[-2:])
        if hasattr(self.model.config, "image_size") and given != image_size(self.model.config):
            raise UsageError(
                f"the image processor makes images of {given}, the model takes {image_size(self.model.config)}: correct the "
                "`size` (or `crop_size`) in the suspect's preprocessor_config.json"
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
class _Measures:
    """Measures a model on the held-out images, and on a test set where there is one."""

    evaluators: dict[str, Evaluator]

    @classmethod
    def prepare(cls, job: _Job, test: ImageData | None, attack: Attack | None) -> _Measures:
        options: dict[str, Any] = {"num_classes": job.model.config.num_labels, "attack": attack}
        evaluators = {}
        if attack is not None and job.data.label_column is None and test is None:
            raise UsageError("a trigger was given but no labelled images to measure it on: give a test set with labels")
        if job.data.label_column is not None:
            evaluators["held_out"] = Evaluator(job.data, job.pipeline, indices=job.subset.held_out, **options)
        if test is not None:
            if test.labels is not None:
                check_classes(test.class_names, int(test.labels.max()) + 1, job.model.config.id2label)
            evaluators["test"] = Evaluator(test, job.pipeline, **options)
        return cls(evaluators)

    def __call__(self, trainer: TSCTrainer, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
        """By place; without labels the held-out images give the agreement with the suspect."""
        device = trainer.args.device
        found = {place: evaluator(model.eval(), device=device).to_dict() for place, evaluator in self.evaluators.items()}
        if "held_out" not in found:
            tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            score = trainer.measure({name: tensor.detach() for name, tensor in tensors.items()})["score"]
            found = {"held_out": {"n": len(trainer.eval_dataset), trainer.objective.score_name: score}, **found}  # type: ignore[arg-type]
        return found

    def monitors(self, device: str) -> dict[str, Any]:
        """Attack success rate along the curves, where a trigger was given: for the plot, never for a choice."""
        evaluator = self.evaluators.get("test", self.evaluators.get("held_out"))
        if evaluator is None or evaluator.attack is None:
            return {}

        def rate(forward: Forward) -> float:
            return evaluator.attack_success_rate(forward, device=device)

        return {"attack_success_rate": rate}


def _as_image_data(dataset: str | Dataset | ImageData) -> ImageData:
    return dataset if isinstance(dataset, ImageData) else open_images(dataset)


def _check_classifier(model: PreTrainedModel, name: str) -> None:
    if model.config.problem_type == "multi_label_classification":
        raise UsageError(f"{name} is a multi-label classifier: expected one with a single label an image")
    if model.config.problem_type == "regression" or model.config.num_labels < 2:
        raise UsageError(f"{name} has {model.config.num_labels} output(s): expected a classifier with two classes or more")


def _work_folder(output: Path, job: _Job, config: TSCConfig, *, resume: bool) -> Path:
    """The folder for checkpoints, with a record of what was asked for; a resumed run must ask for the same."""
    work = output.with_name(output.name + ".work")
    request = {
        "model": job.source.file_hashes,
        "images": job.describe()["indices_hash"],
        "dataset": job.data.rows._fingerprint,
        "arguments": _arguments(config),
    }
    record = work / REQUEST_FILE
    if work.is_dir() and not resume:
        raise UsageError(f"{work} is left from an interrupted run: go on with --resume, or remove it to start anew")
    if record.is_file() and (old := json.loads(record.read_text(encoding="utf-8"))) != request:
        differing = [key for key in request if old.get(key) != request[key]]
        raise UsageError(f"{work} is from a run with other {', '.join(differing)}: give the same arguments, or remove it")
    work.mkdir(parents=True, exist_ok=True)
    write_json(record, request)
    config.output_dir = str(work)
    return work


def _arguments(config: TSCConfig) -> dict[str, Any]:
    """The arguments that differ from a plain TSCConfig, and those that a reader will look for."""
    values, defaults = config.to_dict(), TSCConfig(use_cpu=config.use_cpu).to_dict()
    always = set(TSCConfig.__annotations__) | {"seed", "num_train_epochs", "weight_decay"}
    return {
        key: value
        for key, value in values.items()
        if key not in _NOT_REPORTED and (key in always or value != defaults.get(key)) and key != "max_steps"
    }


def _save_model(model: PreTrainedModel, dtype: torch.dtype, source: Source, processor: Any, folder: Path) -> None:
    """Weights in the suspect's dtype; its configuration as it was, less the attention implementation it asked for."""
    model.cpu().to(dtype).save_pretrained(folder)
    config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", {k: v for k, v in config.items() if "attn_implementation" not in k})
    processor.save_pretrained(folder)


def _describe_suspect(source: Source, model: PreTrainedModel, given: str, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "name": source.repo_id or Path(given).name,
        "repo_id": source.repo_id,
        "revision": source.revision,
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "files": source.file_hashes,
    }


def _describe_attack(attack: Attack | None) -> dict[str, Any] | None:
    if attack is None:
        return None
    return {"trigger": trigger_to_dict(attack.trigger), "target_label": attack.target_label}


def _write_report(report: PurificationReport, trainer: TSCTrainer, folder: Path) -> None:
    write_json(folder / REPORT_FILE, report.to_dict())
    figure = plot_curves(trainer.curves, score_name=report.score_name)
    figure.savefig(folder / PLOT_FILE, dpi=120)
    report.card().save(folder / CARD_FILE)
