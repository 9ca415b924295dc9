"""Runs the cells of a plan that have no line yet, in processes of one thread each, or on an accelerator they share."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import disable_progress_bars
from tqdm.auto import tqdm

from hf_tsc.benchmark.cells import run_cell
from hf_tsc.benchmark.images import BenchmarkImages
from hf_tsc.benchmark.lines import Line, open_lines, read_lines
from hf_tsc.benchmark.plan import Cell, Plan
from hf_tsc.benchmark.suspect_plan import SuspectPlan
from hf_tsc.benchmark.suspects import is_trained, train
from hf_tsc.errors import PurificationError, UsageError


@dataclass
class Progress:
    """What a run has done."""

    finished: int = 0
    failed: list[str] = field(default_factory=list)


def check_processes(processes: int) -> None:
    """Raises UsageError."""
    if processes < 1:
        raise UsageError(f"processes={processes}: expected 1 or more")


def check_only(plan: Plan, only: Sequence[str]) -> None:
    """Raises UsageError where the words that cells are chosen by are those of no cell, finished or not."""
    if not any(all(word in str(cell) for word in only) for cell in plan.cells):
        raise UsageError(f"--only {' '.join(only)}: no cell of the plan has these words; --dry_run lists the cells")


def cells_to_run(plan: Plan, lines: Iterable[Line], only: Sequence[str] = ()) -> list[Cell]:
    """The cells without a line; `only` keeps those whose description contains all of these words."""
    done = {line["id"] for line in lines}
    return [cell for cell in plan.cells if cell.id not in done and all(word in str(cell) for word in only)]


def lines_of(images: BenchmarkImages, results: Path) -> list[Line]:
    """The lines so far.

    Raises:
        UsageError: they are of other images.
    """
    lines = read_lines(results)
    if others := [line["id"] for line in lines if line.get("images") != images.hash]:
        raise UsageError(f"{results} has results on other images ({others[0]}): give another file")
    return lines


def run_plan(
    plan: Plan,
    images: BenchmarkImages,
    *,
    results: Path,
    cache: Path,
    processes: int = 1,
    only: Sequence[str] = (),
    use_cpu: bool = False,
    say: Callable[[str], None] = print,
) -> Progress:
    """Run what is left of a plan.

    Args:
        plan, images: what to run, and on what.
        results: the file of lines.
        cache: folder of the suspects; those of each dataset have one of their own in it.
        processes: cells at once, a thread each; the results do not depend on it (on an accelerator, but for rounding).
        only: words that the description of a cell must contain.
        use_cpu: work on the CPU, whatever there is; else all processes share the first accelerator.
        say: told of every cell.

    Returns:
        How many cells were finished, and which failed.

    Raises:
        UsageError: the dataset does not have the plan's rows, or another run writes these results.
        PurificationError: a worker process was killed.
    """
    check_processes(processes)
    progress = Progress()
    cache = cache / images.hash
    for cell in cells_to_run(plan, lines_of(images, results), only):
        images.check(cell)
    with open_lines(results) as file:
        waiting = cells_to_run(plan, lines_of(images, results), only)
        _remove_left_over(cache)
        with (
            ProcessPoolExecutor(processes, get_context("spawn"), _prepare_process) as pool,
            tqdm(total=len(waiting), unit=" cells", disable=not sys.stderr.isatty()) as bar,
        ):
            running: dict[Future[Any], Cell | SuspectPlan] = {}
            try:
                while waiting or running:
                    while len(running) < processes and (job := _next(waiting, running.values(), cache)):
                        running[_submit(pool, job, images, cache, use_cpu)] = job
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        job = running.pop(future)
                        if (line := _result(future, job, waiting, cache, progress, say)) is not None:
                            file.add(line)
                            progress.finished += 1
                            bar.update()
                            say(summary(line))
            except BrokenProcessPool as error:
                raise PurificationError(
                    "a worker process was killed, perhaps for want of memory: start again with fewer --processes"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return progress


def _next(waiting: list[Cell], running: Iterable[Cell | SuspectPlan], cache: Path) -> Cell | SuspectPlan | None:
    """The first cell whose suspects are there, or else a suspect to train."""
    in_training = {job.id for job in running if isinstance(job, SuspectPlan)}
    missing = None
    for cell in waiting:
        wanted = _missing(cell, cache)
        if not wanted:
            waiting.remove(cell)
            return cell
        missing = missing or next((suspect for suspect in wanted if suspect.id not in in_training), None)
    return missing


def _missing(cell: Cell, cache: Path) -> list[SuspectPlan]:
    """The suspects that a cell waits for; while what one of them is made of is missing as well, that in its place."""
    missing = []
    for suspect in cell.suspects:
        if not is_trained(suspect, cache):
            start = suspect.start
            missing.append(start if start is not None and not is_trained(start, cache) else suspect)
    return missing


def _submit(
    pool: ProcessPoolExecutor, job: Cell | SuspectPlan, images: BenchmarkImages, cache: Path, use_cpu: bool
) -> Future[Line | None]:
    if isinstance(job, Cell):
        return pool.submit(_run_cell, job, images, cache, use_cpu)
    return pool.submit(_train, job, images, cache, use_cpu)


def _result(
    future: Future[Line | None],
    job: Cell | SuspectPlan,
    waiting: list[Cell],
    cache: Path,
    progress: Progress,
    say: Callable[[str], None],
) -> Line | None:
    """The line of a finished cell. What fails takes nothing else along: a suspect only its own cells."""
    try:
        line = future.result()
    except BrokenProcessPool:
        raise
    except Exception as error:
        if isinstance(job, SuspectPlan):
            lost = [cell for cell in waiting if job.id in {suspect.id for suspect in _missing(cell, cache)}]
            waiting[:] = [cell for cell in waiting if cell not in lost]
            say(f"failed: suspect {job.id}, with its {len(lost)} cells: {error!r}")
            progress.failed += [cell.id for cell in lost]
        else:
            say(f"failed: {job}: {error!r}")
            progress.failed.append(job.id)
        return None
    if line is None:
        assert isinstance(job, SuspectPlan)
        say(f"suspect {job.id}")
        return None
    return line


def summary(line: Line) -> str:
    """A finished cell in a line of text: clean accuracy and attack success rate before, and at the point taken."""
    settings = " ".join(f"{key}={value}" for key, value in line["settings"].items())
    head = f"{line['id']} {line['model']}/{line['attack']}/{line['seed']} {line['method']} {settings}:"
    if "error" in line:
        return f"{head} {line['error']}"
    path = line["paths"][-1]
    point = next(point for point in path["points"] if point["t"] == path["taken"])
    return f"{head} {_pair(line['before']['select'])} -> {_pair(point['select'])} in {line['seconds']['all']:.0f} s"


def _pair(measures: dict[str, float]) -> str:
    return f"{100 * measures['accuracy']:.1f}/{100 * measures['attack_success_rate']:.1f}"


def _remove_left_over(cache: Path) -> None:
    """What a killed process was training."""
    for folder in cache.glob(".*.tmp"):
        process = folder.name.split(".")[-2]
        if process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# --- in the worker processes --------------------------------------------------------------------------------------


def _prepare_process() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("hf_tsc").setLevel(logging.ERROR)
    disable_progress_bars()


def _end_with_parent() -> None:
    """A killed parent would leave its workers waiting for ever."""
    parent = parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


_opened: dict[Any, BenchmarkImages] = {}


def _here(images: BenchmarkImages) -> BenchmarkImages:
    """The same images, opened once in this process."""
    return _opened.setdefault((str(images.arguments), images.test_split), images)


def _run_cell(cell: Cell, images: BenchmarkImages, cache: Path, use_cpu: bool) -> Line:
    return run_cell(cell, _here(images), cache, use_cpu=use_cpu)


def _train(plan: SuspectPlan, images: BenchmarkImages, cache: Path, use_cpu: bool) -> None:
    train(plan, _here(images), cache, use_cpu=use_cpu)
