"""Whole purifications in two processes: they come out as in one, go on where they were left, and fail as one.

The two processes (gloo, CPU) are started once and run all cases; each sees its share of every batch.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_tsc.images import ImagePipeline
from hf_tsc.objectives import Captions, ImageClassification, ImageText, Objective
from hf_tsc.tsc_config import TSCConfig
from hf_tsc.tsc_trainer import TSCTrainer

RANKS = 2
IMAGES = 16
STEPS = 3
TOLERANCE = 1e-9  # float64; sums over a batch are rounded in another order
# softmax ignores what is added to all keys alike, so that the gradient of this bias is rounding noise
NOISE = "k_proj.bias"


class Doubles(ImagePipeline):
    def normalize(self, pixels: Tensor) -> Tensor:
        return super().normalize(pixels.double())


class Captioned(Dataset):
    """Digits, each with two captions, some of them equal."""

    def __init__(self, start: int, stop: int):
        self.images = tiny.digits(start, stop, labelled=False)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**self.images[i], "captions": torch.tensor([i % 6, 6 + i % 5])}


def captions() -> Captions:
    tokens = torch.randint(17, (11, 6), generator=torch.Generator().manual_seed(0))
    tokens[:, -1] = 19
    return Captions(("",) * 11, {"input_ids": tokens})


def plain(model: Any) -> Objective:
    return ImageClassification(Doubles(tiny.processor()))


def augmented(model: Any) -> Objective:
    return ImageClassification(Doubles(tiny.processor()), augmentation="crop_flip", mixup_alpha=1.0)


def distilled(model: Any) -> Objective:
    options: dict[str, Any] = {"mixup_alpha": 1.0, "teacher_view": "clean", "correct_teacher": True}
    return ImageClassification(Doubles(tiny.processor()), augmentation="affine", teacher=model, **options)


def matched(model: Any) -> Objective:
    return ImageText(Doubles(tiny.processor()), captions(), augmentation="simclr")


# name: family, objective, and what else is asked for
CASES: dict[str, tuple[str, Callable[[Any], Objective], dict[str, Any]]] = {
    "vit": ("vit", plain, {}),
    "vit_augmented": ("vit", augmented, {"max_positions": 3, "max_accuracy_drop": 100.0}),
    "resnet": ("resnet", distilled, {"sync_batch_norm": True, "learning_rate": 0.02}),
    "resnet_apart": ("resnet", plain, {"learning_rate": 0.02}),
    "clip": ("clip", matched, {}),
}


def trainer(folder: Path, name: str, batch: int, **changes: Any) -> TSCTrainer:
    family, objective_of, options = CASES[name]
    model = tiny.random_model(family)
    data = Captioned if family == "clip" else tiny.digits
    settings = {
        "output_dir": str(folder),
        "rounds": 1,
        "curve_steps": STEPS,
        "per_device_train_batch_size": batch,
        "sweep_points": 3,
        "statistics_batch_size": 6,
        "learning_rate": 0.05,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TSCTrainer(
        model,
        TSCConfig(**{**settings, **options, **changes}),
        train_dataset=data(0, IMAGES),
        eval_dataset=data(IMAGES, 2 * IMAGES),
        processing_class=tiny.processor(),
        objective=objective_of(model),
        spec=tiny.spec(family),
    )


def purified(made: TSCTrainer) -> dict[str, Any]:
    """Train; what comes out, in the process that asks."""
    made.train()
    model = made.purified_model()
    inputs = tiny.inputs(model)
    with torch.no_grad():
        output = model(**inputs)
    return {
        "weights": {name: t.detach().clone() for name, t in model.state_dict().items()},
        "output": output.logits if hasattr(output, "logits") else output.logits_per_image,
        "losses": [entry["loss"] for entry in made.state.log_history if "loss" in entry],
        "curves": [curve.to_dict() for curve in made.curves],
    }


def work(number: int, folder: str, port: int) -> None:
    """One process: all cases, written to the folder."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # the Trainer's own, which DDP tells of
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found: dict[str, Any] = {}
    for name in CASES:
        found[name] = purified(trainer(Path(folder) / name, name, 8 // RANKS))
    torch.save(found, f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder), free_port()), nprocs=RANKS)
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(RANKS)]


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """The tensors that differ, and how much."""
    assert a.keys() == b.keys()
    apart = {name: (a[name] - b[name]).abs().max().item() for name in a if not name.endswith(NOISE)}
    return {name: distance for name, distance in apart.items() if distance > TOLERANCE}


class TestTwoProcessesAreOne:
    @pytest.mark.parametrize("name", [name for name in CASES if name != "resnet_apart"])
    def test_weights_outputs_and_measures(self, results, tmp_path, name):
        expected = purified(trainer(tmp_path, name, 8))
        for found in (result[name] for result in results):
            assert far(found["weights"], expected["weights"]) == {}
            torch.testing.assert_close(found["output"], expected["output"], rtol=0, atol=TOLERANCE)
            assert found["losses"] == pytest.approx(expected["losses"], abs=1e-4)  # logged with so many digits
            for ours, theirs in zip(found["curves"], expected["curves"], strict=True):
                assert ours["moved"] == theirs["moved"] > 0
                assert ours["t_star"] == theirs["t_star"]
                for point, other in zip(ours["sweep"], theirs["sweep"], strict=True):
                    assert point["score"] == other["score"]
                    assert point["loss"] == pytest.approx(other["loss"], abs=1e-6)
