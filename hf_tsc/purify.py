"""purify: one call from a suspect and a clean data set to a folder with the purified model, its report and card."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_tsc.baseline_run import BaselineRun, check_method
from hf_tsc.data import ImageData
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Attack
from hf_tsc.evidence.gather import gather
from hf_tsc.evidence.settings import EvidenceSettings
from hf_tsc.folders import check_output, finished_folder, write_json
from hf_tsc.hub import Source, declared_license, load_model, quiet, resolve_model
from hf_tsc.hub.folder import kept
from hf_tsc.job import Job, Measures, OwnScore, as_image_data
from hf_tsc.processes import is_main_process, meet_processes, number_of_processes, on_main_process, together
from hf_tsc.report import PurificationReport
from hf_tsc.tasks import Options, Task, task_of
from hf_tsc.tsc_config import NOT_REPORTED, WITHOUT_EFFECT, TSCConfig, reported_arguments
from hf_tsc.tsc_trainer import TSCTrainer
from hf_tsc.work_folder import work_folder

LARGE_LOSS = 0.1  # of a score on the held-out images, a fraction: beyond it a report says so


def purify(
    model: str | Source,
    dataset: str | Dataset | ImageData,
    output_dir: str | Path,
    *,
    config: TSCConfig | Mapping[str, Any] | None = None,
    preset: str = "default",
    method: str = "tsc",
    budget: str | int | float = "5%",
    held_out: float = 0.2,
    test: ImageData | Dataset | None = None,
    attack: Attack | None = None,
    options: Options | None = None,
    evidence: EvidenceSettings | None = None,
    revision: str | None = None,
    local: bool = False,
    token: str | bool | None = False,
    resume: bool = False,
) -> PurificationReport:
    """Remove the backdoor that may be in a model of images, and write the purified model to a folder.

    What kind of model it is (classifier, encoder, image-text dual encoder) is read from its configuration.

    Under `accelerate launch` or `torchrun` every process calls it with the same arguments: the main one writes, and
    all return the same report. They have to see the same folders.

    Args:
        model: repo id on the Hub, or a folder (`./x`, `/x`, any with `local=True`), or a `Source`.
        dataset: clean images: an id, a folder, or a loaded dataset; labels are optional for distillation.
        output_dir: where the result goes; must not exist, or be empty. Checkpoints live in `{output_dir}.work` until
            the result is there.
        config: hyper-parameters, or a mapping of those that shall differ from the defaults for the model's family
            (`TSCConfig.for_model`). `output_dir` is set here.
        preset: what a mapping's fields differ from instead: `paper` for the published settings.
        method: `tsc`, or a baseline to compare with (docs/baselines.md). A baseline's `config` is a mapping of its own
            settings, of `seed` and of `use_cpu`; it trains in one process and leaves no checkpoints.
        budget: how many clean images to use: a count, or a share such as `"5%"` or `0.05`.
        held_out: share of them kept from training and matching, for measuring and for choosing t*.
        test: further labelled images, to measure on before and after.
        attack: a known trigger, to measure the attack success rate before and after; it never takes part otherwise.
        options: prompts of image-text models, and how many images a linear probe is fitted on.
        evidence: also search suspect and result for triggers, without knowing one, and compare the two; it can take
            longer than the purification (docs/evidence.md).
        revision: of the model repo.
        local: `model` is a folder.
        token: for private repos; none is sent by default.
        resume: go on from the last checkpoint of an interrupted run with the same arguments.

    Returns:
        The report, as written to `output_dir/tsc_report.json`.

    Raises:
        UsageError: wrong input (see the message), a method that does not fit the model, processes that would train
            alone, or evidence in several processes; nothing is written.
        PurificationError: a loss is not finite, or the spec does not verify; nothing is written.
        AccuracyBudgetError: `max_accuracy_drop` could not be kept; nothing is written to `output_dir`.
        HfTscError: the model could not be got from the Hub; nothing is written.
    """
    started, output = time.monotonic(), Path(output_dir)
    given = None if isinstance(config, TSCConfig) else dict(config or {})
    asked = vars(config) if isinstance(config, TSCConfig) else given or {}
    meet_processes(use_cpu=bool(asked.get("use_cpu")), timeout=asked.get("ddp_timeout", TSCConfig.ddp_timeout))
    with together():
        check_method(method, config, preset=preset, resume=resume)
        if not isinstance(attack, Attack | None):
            raise UsageError(f"attack={attack!r}: expected an Attack, of a trigger and a target label")
        if evidence is not None and number_of_processes() > 1:
            raise UsageError(
                "--evidence works in one process: leave it out, and search both models by `hf-tsc evaluate --evidence`"
            )
        check_output(output)
        source = (
            model if isinstance(model, Source) else resolve_model(model, revision=revision, local=local, token=token)
        )
        kind = task_of(source)
        suspect, dtype = load_model(source, auto_class=kind.auto_class)
        kind.check_model(suspect, source)
        options, test = options or Options(), None if test is None else as_image_data(test)
        baseline = None if method == "tsc" else BaselineRun.of(method, suspect, kind, given or {})
        config = config_for(suspect, kind, config, preset) if baseline is None else baseline.config
        data = as_image_data(dataset)
        prepared: dict[str, Any] = {"budget": budget, "held_out": held_out, "options": options}
        job = Job.prepare(kind, source, suspect, data, config, **prepared)
        if is_main_process() and not config.disable_tqdm:
            tqdm.write(choice(job, chosen="objective" not in asked and preset == "default"), file=sys.stderr)
        measures = Measures.prepare(job, test, attack)
    told: dict[str, Any] = {"started": started, "evidence": evidence}
    facts: dict[str, Any] = {
        "attack": attack.to_dict() if attack else None,
        "notes": [*source.notes, *data.notes, *job.task.notes],
        "request": None
        if given is None
        else request_of(given, preset, budget, held_out, options, test, method, evidence),
    }
    if baseline is not None:
        own = baseline.prepare(job)
        facts["before"] = measures(own, _to(suspect, own.device))
        purified = baseline.run()
        return _write_result(output, purified, dtype, job, measures, own, baseline, **told, **facts)
    with work_folder(output, _request(job, config), resume=resume) as (work, checkpoint):
        config.output_dir = str(work)
        with together():
            trainer = _trainer(job, measures, config)
        own = OwnScore.of_trainer(trainer)
        _to(suspect, config.device)  # in every process: it may teach
        facts["before"] = on_main_process(lambda: measures(own, suspect))
        trainer.train(resume_from_checkpoint=checkpoint)
        purified = trainer.purified_model()
        return on_main_process(
            lambda: _write_result(output, purified, dtype, job, measures, own, trainer, **told, **facts)
        )


def _write_result(
    output: Path,
    model: PreTrainedModel,
    dtype: torch.dtype,
    job: Job,
    measures: Measures,
    own: OwnScore,
    trainer: TSCTrainer | BaselineRun,
    *,
    started: float,
    evidence: EvidenceSettings | None,
    **facts: Any,
) -> PurificationReport:
    """Save the purified model, measure what was saved, and write its report beside it; in the main process."""
    kind = type(job.task)
    with finished_folder(output) as folder:
        _save_model(model, dtype, job, folder)
        saved = resolve_model(str(folder), local=True)
        purified, _ = load_model(saved, auto_class=kind.auto_class)
        after = measures(own, _to(purified, own.device))
        facts["notes"] = [*facts["notes"], *notes_on_loss(facts["before"], after, own.name)]
        cost = {"seconds": round(trainer.seconds_before + time.monotonic() - started, 1)}
        if evidence is not None:
            progress = not job.work.config.disable_tqdm
            facts["evidence"] = gather(job, purified, evidence, spec=trainer.spec, progress=progress)
        report = trainer.report(
            suspect=_describe_suspect(job.source, job.model, dtype),
            dataset=job.describe(),
            after=after,
            purified={"dtype": str(dtype).removeprefix("torch."), "files": saved.file_hashes},
            cost=cost,
            task=kind.described(),
            **facts,
        )
        report.write(folder, trainer.curves)
    return report


def choice(job: Job, *, chosen: bool) -> str:
    """What a suspect is taken for, and what it is trained for and why, in a sentence or two."""
    fitting, objective = job.task.objectives, job.work.config.objective
    others = ", ".join(name for name in fitting if name != objective)
    why = f"the default for one; --objective takes {others}, too" if chosen else "as asked for"
    name = type(job.model).__name__
    return f"{job.source.name} is an {job.task.kind}, {name}. Objective: {objective} ({fitting[objective]}), {why}."


def notes_on_loss(before: Mapping[str, Any], after: Mapping[str, Any], score: str) -> list[str]:
    """A note where a model has lost much of its score on the held-out images."""
    old, new = (measures["held_out"][score] for measures in (before, after))
    if old - new <= LARGE_LOSS:
        return []
    return [
        f"The {score.replace('_', ' ')} on the held-out images fell from {100 * old:.1f} % to {100 * new:.1f} %: "
        "these settings take too much of this model. A lower --learning_rate, more clean images or "
        "--max_accuracy_drop help."
    ]


def config_for(
    model: PreTrainedModel, kind: type[Task], config: TSCConfig | Mapping[str, Any] | None, preset: str
) -> TSCConfig:
    """A whole configuration as it is, else a preset's or the family's with some fields changed."""
    if isinstance(config, TSCConfig):
        made = config
    elif preset == "default":
        made = TSCConfig.for_model(model, objectives=kind.objectives, **(config or {}))
    else:
        made = TSCConfig.preset(preset, **(config or {}))
    made.check_following()
    return made


def request_of(
    arguments: Mapping[str, Any],
    preset: str,
    budget: str | int | float,
    held_out: float,
    options: Options,
    test: ImageData | None,
    method: str = "tsc",
    evidence: EvidenceSettings | None = None,
) -> dict[str, Any]:
    """What is asked for and has an effect on what comes of it, as the report keeps it."""
    effective = {k: v for k, v in arguments.items() if k not in NOT_REPORTED and not k.startswith(WITHOUT_EFFECT)}
    usual = Options()
    return {
        "budget": str(budget),
        "held_out": held_out,
        "preset": preset,
        "arguments": effective,
        "templates": None if options.templates == usual.templates else list(options.templates),
        "probe_images": None if options.probe_images == usual.probe_images else options.probe_images,
        "test": test.describe() if test else None,
        **({} if method == "tsc" else {"method": method}),
        **({} if evidence is None else {"evidence": asdict(evidence)}),
    }


def _trainer(job: Job, measures: Measures, config: TSCConfig) -> TSCTrainer:
    return TSCTrainer(
        job.model,
        config,
        train_dataset=job.task.items(job.work.subset.train),
        eval_dataset=job.task.items(job.work.subset.held_out),
        processing_class=job.work.pipeline.processor,
        objective=job.task.objective(),
        monitors=measures.monitors(str(config.device)),
    )


def _request(job: Job, config: TSCConfig) -> dict[str, Any]:
    return {
        "model": {**job.source.file_hashes, "texts": job.source.texts_hash},
        "images": job.describe()["indices_hash"],
        "dataset": job.work.data.rows._fingerprint,
        "processes": number_of_processes(),
        "arguments": reported_arguments(config),
    }


def _to(model: Any, device: torch.device) -> PreTrainedModel:
    return model.to(device)


def _save_model(model: PreTrainedModel, dtype: torch.dtype, job: Job, folder: Path) -> None:
    """Weights in the suspect's dtype; its configuration as it was, less what must not pass on (`kept`)."""
    with quiet():
        _to(model, torch.device("cpu")).to(dtype).save_pretrained(folder)  # type: ignore[arg-type]
    config = json.loads((job.source.path / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", kept(config))
    job.task.save(folder)


def _describe_suspect(source: Source, model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "name": source.name,
        "repo_id": source.repo_id,
        "revision": source.revision,
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "license": declared_license(source.path),
        "files": source.file_hashes,
        "texts": source.texts_hash,
    }
