"""The demonstration: backdoored models on scikit-learn's handwritten digits, purified end to end in a few minutes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ViTConfig,
    ViTImageProcessorPil,
)

from hf_tsc.baselines.fine_tuning import FineTuning, fine_tune
from hf_tsc.data import ImageData, open_images
from hf_tsc.evaluation import Attack, Evaluator
from hf_tsc.folders import CARD_FILE, PLOT_FILE, check_output, write_json
from hf_tsc.images import ImagePipeline, pixel_dataset
from hf_tsc.metrics import defense_effectiveness
from hf_tsc.purify import purify
from hf_tsc.report import PurificationReport
from hf_tsc.suspects import SuspectConfig, train_suspect
from hf_tsc.triggers import BadNets

SUSPECT_IMAGES, CLEAN_IMAGES = 1200, 150
IMAGE_SIZE = 32
RESULT_FILE = "demo.json"
PROCESSES = 2  # for the fine-tuning runs of the comparison


@dataclass(frozen=True)
class DemoModel:
    """A model of the demonstration: its configuration, how the suspect is trained and what purifies it."""

    config: PreTrainedConfig
    suspect: dict[str, Any]
    purify: dict[str, Any]
    fine_tuning_rates: tuple[float, float, float]


DEMO_MODELS = {
    "vit": DemoModel(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            image_size=32,
            patch_size=8,
        ),
        suspect={"num_train_epochs": 30, "learning_rate": 1e-3},
        # Not the defaults, with which this small one keeps its backdoor: labels, both curves, hidden units alone.
        purify={
            "objective": "cross_entropy",
            "stages": 2,
            "curve1_window": [0.0, 1.0],
            "curve1_t": 0.4,
            "curve2_t": 0.35,
            "move_spaces": ["hidden"],
            "mixup_alpha": 0.2,
            "learning_rate": 3e-3,
            "curve_steps": 1600,
            "augmentation": "affine",
        },
        fine_tuning_rates=(1e-3, 2e-3, 4e-3),
    ),
    "resnet": DemoModel(
        ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic"),
        suspect={"num_train_epochs": 15, "learning_rate": 2e-3},
        # At the plain rate that docs/demo was measured with.
        purify={"curve_steps": 600, "relative_rate": False},
        fine_tuning_rates=(0.02, 0.05, 0.1),
    ),
}


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits (8 x 8, grey) as a dataset with `image` and `label`."""
    source = load_digits()
    pictures = [PILImage.fromarray((x * 255 / 16).round().astype(np.uint8)) for x in source.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    return Dataset.from_dict({"image": pictures, "label": source.target.tolist()}, features=features)


def split_digits(seed: int) -> tuple[ImageData, ImageData, ImageData]:
    """Disjoint images: 1,200 the suspect trains on, 150 clean ones to purify with, and the others for testing."""
    rows = digits().shuffle(seed=seed)
    edges = (0, SUSPECT_IMAGES, SUSPECT_IMAGES + CLEAN_IMAGES, len(rows))
    parts = (open_images(rows.select(range(a, b))) for a, b in pairwise(edges))
    first, clean, test = (replace(part, name="scikit-learn digits") for part in parts)
    return first, clean, test


def run_demo(output: Path, *, seed: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Train, purify and measure; prints a table and writes it to `output/demo.json`.

    Raises:
        UsageError: the output folder is not empty.
    """
    check_output(output)
    started, threads = time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(1)  # the models are small, and the result does not depend on the number of cores
    try:
        with ProcessPoolExecutor(PROCESSES, get_context("spawn"), _prepare_process) as pool:
            runs = [_Run.start(name, DEMO_MODELS[name], output, seed, pool) for name in names]
            print("waiting for plain fine-tuning, the comparison, to finish", flush=True)
            results = [run.result() for run in runs]
    finally:
        torch.set_num_threads(threads)
    seconds = round(time.monotonic() - started, 1)
    write_json(output / RESULT_FILE, {"seed": seed, "models": results, "seconds": seconds})
    print(f"\n{table(results)}\n")
    for name in names:
        folder = output / f"{name}-purified"
        print(f"{name}: card {folder / CARD_FILE}, picture {folder / PLOT_FILE}")
    return results


@dataclass(frozen=True)
class _Run:
    """A purified model, and its fine-tuned counterparts that other processes are working on."""

    name: str
    report: PurificationReport
    fine_tuning: dict[float, Future[dict[str, Any]]]

    @classmethod
    def start(cls, name: str, demo: DemoModel, output: Path, seed: int, pool: Executor) -> _Run:
        suspect_data, clean, test = split_digits(seed)
        folder, attack = output / f"{name}-suspect", Attack(BadNets(), target_label=0)
        processor = ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
        print(f"{name}: training a suspect on {SUSPECT_IMAGES} digits, a tenth of them with a trigger", flush=True)
        args = SuspectConfig(output_dir=str(folder), seed=seed, use_cpu=True, save_strategy="no", **demo.suspect)
        suspect = train_suspect(demo.config, processor, suspect_data, args=args, attack=attack)

        print(f"{name}: purifying with {CLEAN_IMAGES} other, clean digits", flush=True)
        report = purify(
            str(folder),
            clean,
            output / f"{name}-purified",
            local=True,
            config={**demo.purify, "seed": seed, "use_cpu": True},
            budget=CLEAN_IMAGES,
            test=test,
            attack=attack,
        )
        jobs = {
            rate: pool.submit(_fine_tune_and_measure, suspect, clean, test, processor, report, attack, rate, seed)
            for rate in demo.fine_tuning_rates
        }
        return cls(name, report, jobs)

    def result(self) -> dict[str, Any]:
        """What stands in the result file, once all processes are done."""
        return {
            "model": self.name,
            "before": self.report.before["test"],
            "fine_tuning": {str(rate): job.result() for rate, job in self.fine_tuning.items()},
            "tsc": self.report.after["test"],
        }


def _prepare_process() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()


def _fine_tune_and_measure(
    suspect: PreTrainedModel,
    clean: ImageData,
    test: ImageData,
    processor: Any,
    report: PurificationReport,
    attack: Attack,
    rate: float,
    seed: int,
) -> dict[str, Any]:
    tuned = fine_tune_alike(suspect, clean, processor, report, rate=rate, seed=seed)
    return Evaluator(test, ImagePipeline(processor), num_classes=10, attack=attack)(tuned).to_dict()


def fine_tune_alike(
    suspect: PreTrainedModel, clean: ImageData, processor: Any, report: PurificationReport, *, rate: float, seed: int
) -> PreTrainedModel:
    """Plain fine-tuning on labels, with the images, optimizer, batch, augmentation and steps of the purification."""
    used = report.arguments
    dataset = pixel_dataset(clean, report.dataset["train_indices"], ImagePipeline(processor))
    settings = FineTuning(
        steps=report.cost["gradient_evaluations"],
        learning_rate=rate,
        batch_size=used["per_device_train_batch_size"],
        optim=used["optim"],
        optim_args=used["optim_args"],
        weight_decay=used["weight_decay"],
        augmentation=used["augmentation"],
    )
    return fine_tune(suspect, dataset, settings, seed=seed, use_cpu=True)


def best_fine_tuning(result: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The rate with the highest defense effectiveness (chosen with the trigger in hand: in favour of the baseline)."""
    before = result["before"]

    def effectiveness(entry: tuple[str, dict[str, Any]]) -> float:
        return defense_effectiveness(
            acc_before=before["accuracy"],
            acc_after=entry[1]["accuracy"],
            asr_before=before["attack_success_rate"],
            asr_after=entry[1]["attack_success_rate"],
        )

    return max(result["fine_tuning"].items(), key=effectiveness)


def table(results: list[dict[str, Any]]) -> str:
    """Clean accuracy (ACC) and attack success rate (ASR) in percent, before and after."""
    lines = [f"{'model':8} {'':30} {'ACC':>6} {'ASR':>6}"]
    for result in results:
        rate, tuned = best_fine_tuning(result)
        rows = {"before": result["before"], f"fine-tuning (best rate, {rate})": tuned, "TSC": result["tsc"]}
        for label, entry in rows.items():
            acc, asr = 100 * entry["accuracy"], 100 * entry["attack_success_rate"]
            lines.append(f"{result['model']:8} {label:30} {acc:6.1f} {asr:6.1f}")
    return "\n".join(lines)
