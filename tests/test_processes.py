"""Whole purifications in two processes: they come out as in one, go on where they were left, and fail as one.

The two processes (gloo, CPU) are started once and run all cases; each sees its share of every batch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import yaml
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from suspects_and_digits import classifier, digits, save
from torch import Tensor, nn
from torch.distributed.fsdp import StateDictType
from torch.utils.data import Dataset
from transformers import ViTConfig, ViTModel

from hf_tsc import purify
from hf_tsc.curve_trainer import check_sharding
from hf_tsc.errors import UsageError
from hf_tsc.folders import REPORT_FILE, last_whole_checkpoint
from hf_tsc.images import ImagePipeline
from hf_tsc.launching import config_file
from hf_tsc.objectives import (
    Captions,
    EmbeddingDistillation,
    FeatureDistillation,
    ImageClassification,
    ImageText,
    Objective,
    ProjectionHead,
    SimCLR,
)
from hf_tsc.processes import (
    check_world_size,
    leave_processes,
    number_of_processes,
    on_main_process,
    rank,
    speaks_of,
)
from hf_tsc.tsc_config import IN_PLACE, TSCConfig
from hf_tsc.tsc_trainer import TSCTrainer

RANKS = 2
IMAGES = 16
STEPS = 2
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
    options: dict[str, Any] = {"mixup_alpha": 1.0, "teacher_view": "clean", "teacher_errors": "correct"}
    return ImageClassification(Doubles(tiny.processor()), augmentation="affine", teacher=model, **options)


def followed(model: Any) -> Objective:
    return ImageClassification(Doubles(tiny.processor()), augmentation="crop", teacher=model, feature_weight=5.0)


def matched(model: Any) -> Objective:
    return ImageText(Doubles(tiny.processor()), captions(), augmentation="simclr")


def told_apart(model: Any) -> Objective:
    head = ProjectionHead(tiny.HEADS * tiny.HEAD_DIM).double()
    return SimCLR(Doubles(tiny.processor()), head=head, augmentation="crop_flip")


def repeated(model: Any) -> Objective:
    return FeatureDistillation(Doubles(tiny.processor()), model, augmentation="crop", mixup_alpha=1.0)


def embedded(model: Any) -> Objective:
    options: dict[str, Any] = {"augmentation": "crop", "mixup_alpha": 1.0, "feature_weight": 2.0}
    return EmbeddingDistillation(Doubles(tiny.processor()), captions(), model, **options)


def new_model(family: str) -> Any:
    """Random, in float64."""
    if family != "encoder":
        return tiny.random_model(family)
    made = ViTModel(ViTConfig(**tiny.TRANSFORMER)).double().eval()
    tiny.randomise(made)
    return made


# name: family, objective, and what else is asked for
CASES: dict[str, tuple[str, Callable[[Any], Objective], dict[str, Any]]] = {
    "vit": ("vit", plain, {}),
    "vit_augmented": ("vit", augmented, {"max_positions": 3, "max_accuracy_drop": 100.0}),
    "resnet": ("resnet", distilled, {"sync_batch_norm": True, "learning_rate": 0.02, "relative_rate": True}),
    "resnet_followed": (
        "resnet",
        followed,
        {"sync_batch_norm": True, "learning_rate": 0.001, "move_spaces": ["hidden"]},
    ),
    "resnet_apart": ("resnet", plain, {"learning_rate": 0.02}),
    # In one batch, as P and its inverse un-align equally well, and how a sum is rounded decides between them.
    "clip": ("clip", matched, {"learning_rate": 5.0, "statistics_batch_size": IMAGES}),
    "simclr": ("encoder", told_apart, {"statistics_batch_size": IMAGES, "stages": 1}),
    "features": ("encoder", repeated, {"statistics_batch_size": IMAGES, "stages": 1, "learning_rate": 1e-3}),
    "clip_features": (
        "clip",
        embedded,
        {"statistics_batch_size": IMAGES, "stages": 1, "learning_rate": 1e-3, "move_spaces": IN_PLACE},
    ),
}
SHARDED = ("vit", "clip", "resnet")
RESUMED = {"vit": (1, 2), "resnet": (2, 3)}  # in the middle of a curve, and on a boundary


class ShardedTrainer(TSCTrainer):
    """As accelerate's fsdp2 configuration on accelerators; on processors accelerate itself does not shard."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        said = yaml.safe_load(config_file("fsdp2").read_text())["fsdp_config"]
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=said["fsdp_version"],
            auto_wrap_policy=said["fsdp_auto_wrap_policy"].lower(),
            reshard_after_forward=said["fsdp_reshard_after_forward"],
            state_dict_type=said["fsdp_state_dict_type"],
            cpu_ram_efficient_loading=said["fsdp_cpu_ram_efficient_loading"],
        )
        state = self.accelerator.state
        state.distributed_type, state.fsdp_plugin, self.is_fsdp_enabled = DistributedType.FSDP, plugin, True


def trainer(
    folder: Path, name: str, batch: int, *, dropout: float = 0.0, sharded: bool = False, **changes: Any
) -> TSCTrainer:
    family, objective_of, options = CASES[name]
    model = new_model(family)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = dropout
    data = Captioned if family == "clip" else tiny.digits
    spec = None if family == "encoder" else tiny.spec(family)
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
    return (ShardedTrainer if sharded else TSCTrainer)(
        model,
        TSCConfig(**{**settings, **options, **changes}),
        train_dataset=data(0, IMAGES),
        eval_dataset=data(IMAGES, 2 * IMAGES),
        processing_class=tiny.processor(),
        objective=objective_of(model),
        spec=spec,
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
        "output": output.logits if hasattr(output, "logits") else output[0],
        "losses": [entry["loss"] for entry in made.state.log_history if "loss" in entry],
        "curves": [curve.to_dict() for curve in made.curves],
    }


def resumed(folder: Path, name: str, **changes: Any) -> dict[Any, bool]:
    """Whether a training that goes on from a checkpoint ends with the same bits; and one that has saved nothing."""
    saving = {"dropout": 0.1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None, **changes}
    whole = trainer(folder, name, 4, **saving)
    whole.train()
    checkpoints: dict[Any, Path | None] = {step: folder / f"checkpoint-{step}" for step in RESUMED[name]}
    killed = trainer(folder / "killed", name, 4, **saving)
    checkpoints |= {"matching": killed_while_matching(killed), "anew": None}
    found = {}
    for at, checkpoint in checkpoints.items():
        again = trainer(folder / "again", name, 4, dropout=0.1, **changes)
        again.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        ours, theirs = ((made.point(0.0), made.point(0.5)) for made in (again, whole))
        found[at] = again.curves == whole.curves and all(
            torch.equal(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) for key in a
        )
    return found


class Killed(BaseException):
    """As a signal: nothing on the way is to take it for an error and clean up."""


def killed_while_matching(made: Any) -> Path | None:
    """Train until the matching between the two curves, and no further; the checkpoint that is left."""
    match, calls = made._match, itertools.count(1)

    def dying(*args: Any, **kwargs: Any) -> Any:
        found = match(*args, **kwargs)
        if next(calls) == 2:
            raise Killed
        return found

    made._match = dying
    with contextlib.suppress(Killed):
        made.train()
    assert made.state.global_step == STEPS
    return last_whole_checkpoint(Path(made.args.output_dir))


class Broken(Dataset):
    """Digits of which one cannot be read; only the second process reads it for the statistics."""

    def __init__(self) -> None:
        self.images = tiny.digits(0, IMAGES)

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i == 7:
            raise UsageError("the picture at index 7 cannot be decoded")
        return self.images[i]


def errors(folder: Path) -> dict[str, str]:
    """What each process raises."""
    made = trainer(folder / "broken", "vit", 4)
    made.train_dataset = Broken()
    saving: Any = trainer(folder / "full", "vit", 4, save_strategy="steps", save_steps=1)
    saving._save_rng_state = full_disk_of_the_second
    calls: dict[str, Callable[[], Any]] = {
        "picture": made.train,
        "main": lambda: on_main_process(lambda: 1 / 0),
        "checkpoint": saving.train,
        "purify": lambda: purify(str(folder / "suspect"), digits(400, 460), folder / "suspect"),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}; told: {speaks_of(error)}"
    found["left"] = ", ".join(sorted(path.name for path in (folder / "full").iterdir()))
    return found


def full_disk_of_the_second(folder: str) -> None:
    if rank() == 1:
        raise OSError(28, "No space left on device")


def purification(folder: Path) -> dict[str, Any]:
    """`purify` of a saved suspect, from a mapping of options as on the command line."""
    config = {"curve_steps": 2, "sweep_points": 3, "per_device_train_batch_size": 4, "save_steps": 1, "use_cpu": True}
    config |= {"disable_tqdm": True, "logging_strategy": "no"}
    report = purify(str(folder / "suspect"), digits(400, 460), folder / "out", config=config, budget=40)
    return {"report": json.dumps(asdict(report), sort_keys=True), "there": (folder / "out" / REPORT_FILE).is_file()}


def work(number: int, folder_name: str, port: int) -> None:
    """One process: all cases, written to the folder."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # the Trainer's own, which DDP tells of
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    folder = Path(folder_name)
    found: dict[str, Any] = {"purification": purification(folder)}
    for name in CASES:
        found[name] = purified(trainer(folder / name, name, 8 // RANKS))
    found["resumed"] = {name: resumed(folder / "resumed" / name, name) for name in RESUMED}
    # a tensor that the objective views is not written to
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    for name in SHARDED:
        made = trainer(folder / "sharded" / name, name, 8 // RANKS, sharded=True)
        found["sharded", name] = purified(made)
        found["divided", name] = [p.to_local().numel() / p.numel() for p in made.curve.parameters()]  # type: ignore[operator]
    changes: dict[str, Any] = {"optim": "adamw_torch", "optim_args": None, "learning_rate": 1e-3, "sharded": True}
    found["resumed"]["sharded"] = resumed(folder / "resumed" / "sharded", "vit", **changes)
    found["errors"] = errors(folder)
    torch.save(found, folder / f"{number}.pt")
    leave_processes()


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    save(classifier("vit"), folder / "suspect")
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

    @pytest.mark.parametrize("name", SHARDED)
    def test_sharded(self, results, name):
        """`fully_shard` by accelerate: what comes out is what comes out of two whole copies."""
        for result in results:
            found, expected = result["sharded", name], result[name]
            assert far(found["weights"], expected["weights"]) == {}
            torch.testing.assert_close(found["output"], expected["output"], rtol=0, atol=TOLERANCE)
            assert found["losses"] == pytest.approx(expected["losses"], abs=1e-4)
        shares = [sum(parts) for parts in zip(*(result["divided", name] for result in results), strict=True)]
        assert shares == pytest.approx([1.0] * len(shares)), "of each parameter every process has a part"

    def test_accumulated(self, results, tmp_path):
        """1 x 4 with two batches a step is 2 x 4."""
        expected = purified(trainer(tmp_path, "vit", 4, gradient_accumulation_steps=2))
        assert far(results[0]["vit"]["weights"], expected["weights"]) == {}

    @pytest.mark.parametrize("name", CASES)
    def test_something_has_moved(self, results, name):
        """So that the same weights mean something."""
        before = new_model(CASES[name][0]).state_dict()
        moved = far(results[0][name]["weights"], dict(before))
        assert len(moved) > 0.8 * len([key for key in before if not key.endswith(NOISE)])

    def test_batch_norm_apart_is_another_training(self, results, tmp_path):
        """By default each process normalises with its own images; the processes agree all the same."""
        one, other = (result["resnet_apart"]["weights"] for result in results)
        assert all(torch.equal(one[name], other[name]) for name in one)
        expected = purified(trainer(tmp_path / "one", "resnet_apart", 8))["weights"]
        assert max(far(one, expected).values()) > 1e-3
        assert number_of_processes() == 1


@pytest.mark.parametrize("name", [*RESUMED, "sharded"])
def test_resumed_bit_by_bit(results, name):
    for result in results:
        at = ("anew", "matching", *RESUMED.get(name, RESUMED["vit"]))
        assert result["resumed"][name] == dict.fromkeys(at, True)


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("picture", r"^UsageError: the picture at index 7 cannot be decoded; "),
            ("main", r"^(ZeroDivisionError: |ProcessError: process 0 failed: ZeroDivisionError: )division by zero; "),
            ("checkpoint", r"^CheckpointError: checkpoint-1 could not be written to .*No space left on device"),
            ("purify", r"^UsageError: .*suspect exists and is not empty"),
        ],
    )
    def test_one_fails_and_all_raise_it_and_one_tells(self, results, name, said):
        for number, result in enumerate(results):
            assert re.search(said, result["errors"][name])
            assert result["errors"][name].endswith(f"told: {number == 0}")

    def test_nothing_is_left_of_a_checkpoint_that_one_could_not_write(self, results):
        assert {result["errors"]["left"] for result in results} == {""}

    def test_processes_that_would_train_alone(self, tmp_path, monkeypatch):
        made = trainer(tmp_path, "vit", 8)
        monkeypatch.setenv("WORLD_SIZE", "2")
        for call in (check_world_size, lambda: TSCTrainer(made.suspect, made.args, **NOTHING)):
            with pytest.raises(UsageError, match=r"WORLD_SIZE=2, but this process would train alone.*--use_cpu"):
                call()

    def test_sharding_that_accelerate_would_leave_away(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(UsageError, match=r"FSDP was asked for, and accelerate would train as NO: .* single_gpu"):
            trainer(tmp_path, "vit", 8)

    @pytest.mark.parametrize(
        ("name", "changes", "plugin", "said"),
        [
            ("vit", {}, {"kind": DistributedType.DEEPSPEED}, "DEEPSPEED is not supported: .* fsdp2"),
            ("vit", {}, {"fsdp_version": 1}, "expected fsdp_version: 2"),
            ("vit", {}, {"state_dict_type": StateDictType.FULL_STATE_DICT}, "expected .*: SHARDED_STATE_DICT"),
            ("vit", {"channels_last": True}, {}, "channels_last does not go with FSDP2"),
            ("simclr", {}, {}, "trains a projection head, .* multi_gpu"),
        ],
    )
    def test_sharding_that_would_not_be_right(self, name, changes, plugin, said):
        made = trainer(Path("unused"), name, 8, **changes)
        usual: dict[str, Any] = {
            "kind": DistributedType.FSDP,
            "fsdp_version": 2,
            "state_dict_type": StateDictType.SHARDED_STATE_DICT,
        }
        found = SimpleNamespace(**{**usual, **plugin})
        accelerator: Any = SimpleNamespace(
            distributed_type=found.kind,
            is_fsdp2=found.fsdp_version == 2,
            state=SimpleNamespace(fsdp_plugin=found),
        )
        with pytest.raises(UsageError, match=said):
            check_sharding(accelerator, made.args, made.objective)


NOTHING: dict[str, Any] = {"train_dataset": None, "eval_dataset": None, "processing_class": None}


def test_purify_in_two_processes(results):
    one, other = (result["purification"] for result in results)
    assert one == other
    assert one["there"]
    assert json.loads(one["report"])["environment"]["processes"] == RANKS
