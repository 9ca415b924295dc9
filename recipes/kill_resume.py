"""Kills purifications at random moments, lets them go on, and compares what comes out, bit by bit.

    python recipes/kill_resume.py --output docs/kill_resume.json --processes 1
    python recipes/kill_resume.py --output docs/kill_resume.json --processes 2 --steps 30 --append

Tiny models with random weights are purified on scikit-learn's digits by `hf-tsc purify`, which gets a `kill -9`; what
is left goes on with `--resume`, and is killed again. Whenever a purification comes through, its weights must have the
sha256 of those of one that was left alone, and the next begins, until all kills are spent. Moments are drawn uniformly
from a little before the first step on, over a third of the time that training takes; now and then from the start on,
over all preparations. Of several processes all are killed, or only one of those that train; then the others must end
by themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import logging
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}  # the processes inherit them

import datasets
import psutil
import torch
import transformers
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_tsc import cli
from hf_tsc.demo import digits
from hf_tsc.folders import REPORT_FILE, last_whole_checkpoint, sha256
from hf_tsc.hub import quiet
from hf_tsc.work_folder import REQUEST_FILE

SIDE, LABELS = 8, 10  # of the digits
IMAGES, BUDGET = 200, 100
SETTINGS = {
    "stages": 2,
    "per_device_train_batch_size": 16,
    "sweep_points": 3,
    "augmentation": "crop",
    "mixup_alpha": 1.0,
    "save_steps": 1,
    "logging_strategy": "no",
    "disable_tqdm": "true",
    "use_cpu": "true",
}
SHARE_EARLY = 0.1  # of the kills may come at any moment since the start
LEAD = 0.3  # of the preparations of a training belongs to the moments of the others, and of its length
PART = 1 / 3
PATIENCE = 600.0  # seconds for a purification, and for the others when one process is killed
CONTEXT = multiprocessing.get_context("forkserver")


def resnet() -> PreTrainedModel:
    shape = {"embedding_size": 6, "hidden_sizes": [6, 8], "depths": [2, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**shape, num_labels=LABELS))


def vit() -> PreTrainedModel:
    """With dropout: whatever is random must go on where it was."""
    shape = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 10}
    size = {"image_size": SIDE, "patch_size": 4, "num_labels": LABELS}
    return ViTForImageClassification(ViTConfig(**shape, **size, hidden_dropout_prob=0.1))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {"resnet": resnet, "vit": vit}


# --- one attempt -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Purification:
    """A command that can be started again and again.

    Attributes:
        folder: holds suspect, images and result.
        steps: of each of the two curves.
        processes: how many train together.
    """

    folder: Path
    steps: int
    processes: int = 1
    name: str = "out"

    @property
    def output(self) -> Path:
        return self.folder / self.name

    @property
    def work(self) -> Path:
        return self.folder / f"{self.name}.work"

    @property
    def weights(self) -> Path:
        """There when the result is, as its folder comes in one piece."""
        return self.output / "model.safetensors"

    def command(self) -> list[str]:
        """The arguments of `hf-tsc`; what was begun goes on."""
        places = ["./suspect", "--dataset_name", "./digits", "--budget", str(BUDGET), "--output_dir", self.name]
        settings = [f"--{name}={value}" for name, value in {**SETTINGS, "curve_steps": self.steps}.items()]
        launched = ["--accelerate_config=multi_cpu", f"--num_processes={self.processes}"]
        return [
            "purify",
            *places,
            *settings,
            *(launched if self.processes > 1 else []),
            *(["--resume"] if self.work.exists() else []),
        ]

    def opened(self) -> int:
        """Changes whenever a run opens the folder of its checkpoints, which is just before it trains."""
        record = self.work / REQUEST_FILE
        return record.stat().st_mtime_ns if record.exists() else 0

    def saved(self) -> bool:
        """Whether there is a checkpoint, whole or not."""
        return any(self.work.glob("checkpoint-*"))

    def outcome(self) -> dict[str, Any]:
        """What must not depend on kills."""
        report = json.loads((self.output / REPORT_FILE).read_text(encoding="utf-8"))
        return {"sha256": sha256(self.weights), "curves": report["curves"]}

    def state(self) -> str:
        """What a kill has left."""
        if self.weights.exists():
            return "the result, and a folder of checkpoints"
        if list(self.folder.glob(f".{self.name}.*.tmp")):
            return "a part of the result"
        if not (self.work / REQUEST_FILE).exists():
            return "nothing"
        logging.disable()
        whole = last_whole_checkpoint(self.work)
        logging.disable(logging.NOTSET)
        step = int(whole.name.removeprefix("checkpoint-")) if whole else 0
        newest = max((int(p.name.rpartition("-")[2]) for p in self.work.glob("checkpoint-*")), default=0)
        return f"step {step} of {2 * self.steps}" + (f", a part of checkpoint-{newest}" if newest > step else "")


def run_command(folder: str, arguments: Sequence[str]) -> None:
    """`hf-tsc` with the given arguments, in a process of its own that has imported it already."""
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    sys.exit(cli.main(arguments))


def start(purification: Purification) -> Any:
    process = CONTEXT.Process(target=run_command, args=(str(purification.folder), purification.command()))
    process.start()
    return process


def import_once() -> None:
    """Processes are forked from one that has imported everything."""
    CONTEXT.set_forkserver_preload(["hf_tsc.cli"])
    process = CONTEXT.Process(target=int)
    process.start()
    process.join()


def wait(condition: Callable[[], Any], process: Any, *, seconds: float = PATIENCE) -> None:
    """Until something is true, or the process has ended."""
    end = time.monotonic() + seconds
    while process.is_alive() and not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"nothing for {seconds} s")
        time.sleep(0.002)


def kill_all(process: Any) -> None:
    """`kill -9` to a process and all that it has started, wherever they have put themselves."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
        root = psutil.Process(process.pid)
        root.suspend()  # so that it starts no more
        family = [root, *root.children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            member.kill()
    wait(lambda: not any(alive(member) for member in family), process)
    process.join()


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def kill_one(process: Any, draw: random.Random) -> bool:
    """`kill -9` to one of the processes that train; the others must end then. False where there are none yet."""
    workers: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        workers = psutil.Process(process.pid).children()
        if workers:
            draw.choice(workers).kill()
    wait(lambda: not workers, process)
    if any(alive(worker) for worker in workers):
        raise RuntimeError("one process was killed, and others go on")
    return bool(workers)


# --- many kills ------------------------------------------------------------------------------------------------------


@dataclass
class Kill:
    """When it came, in seconds after `since`, whom it hit, and what it left."""

    seconds: float
    since: str
    victim: str
    left: str


@dataclass
class Run:
    """A purification that came through at last, and whether its weights and curves are those of one left alone."""

    kills: list[Kill] = field(default_factory=list)
    resumes: int = 0
    same: bool = False


@dataclass(frozen=True)
class Uninterrupted:
    """What comes of a purification that is left alone.

    Attributes:
        outcome: of `Purification`.
        opened, saved, ended: seconds from the start to the folder of checkpoints, the first of them, and the end.
    """

    outcome: dict[str, Any]
    opened: float
    saved: float
    ended: float


def prepare(folder: Path, family: str) -> None:
    """A suspect and images."""
    torch.manual_seed(0)
    with quiet():
        FAMILIES[family]().save_pretrained(folder / "suspect")
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder / "suspect")
    digits().select(range(IMAGES)).save_to_disk(str(folder / "digits"))


def finish(purification: Purification, process: Any) -> None:
    """Wait for the end."""
    wait(lambda: False, process)
    process.join()
    if process.exitcode != 0:
        log = (purification.folder / "log.txt").read_text(encoding="utf-8")
        raise RuntimeError(f"hf-tsc ended with {process.exitcode}:\n{log[-3000:]}")


def uninterrupted(purification: Purification) -> Uninterrupted:
    moments, process = [time.monotonic()], start(purification)
    for reached in (purification.opened, purification.saved):
        wait(reached, process)
        moments.append(time.monotonic())
    finish(purification, process)
    return Uninterrupted(purification.outcome(), *(moment - moments[0] for moment in (*moments[1:], time.monotonic())))


def kill_at_random(purification: Purification, plain: Uninterrupted, draw: random.Random) -> Kill | None:
    """Start, or go on, and kill; None where it came through before."""
    opened, early = purification.opened(), draw.random() < SHARE_EARLY
    victim = "one process" if purification.processes > 1 and draw.random() < 0.5 else "all"
    prepared, trained = plain.saved - plain.opened, plain.ended - plain.saved
    window = (0.0, plain.saved) if early else ((1 - LEAD) * prepared, prepared + PART * trained)
    seconds = draw.uniform(*window)
    process = start(purification)
    if not early:
        wait(lambda: purification.opened() != opened, process)
    end = time.monotonic() + seconds
    wait(lambda: time.monotonic() >= end, process)
    if not process.is_alive():
        finish(purification, process)
        return None
    if victim == "all" or not kill_one(process, draw):
        victim = "all"
        kill_all(process)
    since = "the start" if early else "the folder of checkpoints was opened"
    return Kill(round(seconds, 3), since, victim, purification.state())


def killed_run(purification: Purification, plain: Uninterrupted, draw: random.Random, kills: int) -> Run:
    """One purification with at most so many kills, to its end."""
    run = Run()
    while not purification.weights.exists():
        run.resumes += purification.work.exists()
        if len(run.kills) == kills:
            finish(purification, start(purification))
        elif kill := kill_at_random(purification, plain, draw):
            run.kills.append(kill)
            print(f"  killed {kill.victim} {kill.seconds:.2f} s after {kill.since}; left: {kill.left}", flush=True)
    run.same = purification.outcome() == plain.outcome
    print(f"  came through after {len(run.kills)} kills: {'the same' if run.same else 'DIFFERENT'}", flush=True)
    return run


def campaign(
    folder: Path, family: str, *, kills: int, steps: int, processes: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Purifications one after the other, until so many kills are spent and the last one is through.

    Args:
        folder: an empty one.
        family: of `FAMILIES`.
        kills: in all.
        steps: of each of the two curves.
        processes: that train together.
        seed: of the moments.
    """
    prepare(folder, family)
    import_once()
    print(f"{family}, {processes} process{'es' * (processes > 1)}", flush=True)
    plain = uninterrupted(Purification(folder, steps, processes, "alone"))
    print(f"  left alone: {plain.saved:.1f} s to the first checkpoint, {plain.ended:.1f} s to the end", flush=True)
    draw, runs = random.Random(f"{seed} {family} {processes}"), list[Run]()
    while (spent := sum(len(run.kills) for run in runs)) < kills:
        runs.append(killed_run(Purification(folder, steps, processes, f"out{len(runs)}"), plain, draw, kills - spent))
    return {
        "family": family,
        "processes": processes,
        "kills": spent,
        "resumes": sum(run.resumes for run in runs),
        "all_same": all(run.same for run in runs),
        "sha256": plain.outcome["sha256"],
        "left_alone_s": {key: round(getattr(plain, key), 2) for key in ("opened", "saved", "ended")},
        "runs": [asdict(run) for run in runs],
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file; without it the kills are only printed")
    parser.add_argument("--append", action="store_true", help="keep what the JSON file holds already")
    parser.add_argument("--kills", type=int, default=20, help="of each family, and as many in several processes")
    parser.add_argument("--steps", type=int, default=40, help="of each of the two curves")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def described(rows: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """What a run is put down as."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": f"python recipes/kill_resume.py --kills {args.kills} --steps {args.steps} --seed {args.seed} "
        f"--families {' '.join(args.families)} --processes {' '.join(map(str, args.processes))}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": {"cores": os.cpu_count(), "load": [round(x, 1) for x in os.getloadavg()]},
        "settings": {**SETTINGS, "images": BUDGET},
        "rows": rows,
    }


def main() -> int:
    args = parse()
    datasets.disable_progress_bars()
    rows = []
    for processes in args.processes:
        kills = args.kills if processes == 1 else -(-args.kills // len(args.families))
        for family in args.families:
            with tempfile.TemporaryDirectory(prefix="kill_resume_") as folder:
                asked = {"kills": kills, "steps": args.steps, "processes": processes, "seed": args.seed}
                rows.append(campaign(Path(folder), family, **asked))
    if args.output:
        earlier = json.loads(args.output.read_text(encoding="utf-8")) if args.append else []
        content = [*earlier, described(rows, args)]
        args.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["all_same"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
