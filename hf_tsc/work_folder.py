"""Where the checkpoints of a training are until its result is there, and what the training was asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hf_tsc.errors import AccuracyBudgetError, OtherRequestError, PurificationError, UsageError
from hf_tsc.folders import LOCK_FILE, half_written, last_whole_checkpoint, locked, write_json
from hf_tsc.processes import is_main_process, number_of_processes, of_all, on_main_process, together

REQUEST_FILE = "request.json"


def work_of(output: Path) -> Path:
    """Where the checkpoints of what is to be written to `output` are."""
    return output.with_name(output.name + ".work")


@contextmanager
def work_folder(output: Path, request: Mapping[str, Any], *, resume: bool) -> Iterator[tuple[Path, str | None]]:
    """The folder for the checkpoints of what is to be written to `output`, and the checkpoint to go on from.

    It records what was asked for: a resumed run must ask for the same. It goes when the block ends without an error,
    when a resumed run would fail in the same way, and when there is nothing in it to go on from.

    Args:
        output: of the result; the folder is `work_of(output)`.
        request: what the result depends on, as JSON can hold it; all but its `arguments` must be the same in all
            processes.
        resume: go on in a folder that is there.

    Raises:
        UsageError: a folder that is there was not made for this, or is not to be gone on in; the processes differ.
        OtherRequestError: it is of another request.
    """
    work = work_of(output)
    asked: dict[str, Any] = json.loads(json.dumps(request))  # as it will be read again
    with together():
        _check_same(asked)
    checkpoint = on_main_process(lambda: _open(work, asked, resume=resume))
    with ExitStack() as stack:
        with together():
            if is_main_process():
                stack.enter_context(locked(work))
        yield from _working(work, checkpoint)


def _working(work: Path, checkpoint: Path | None) -> Iterator[tuple[Path, str | None]]:
    """Gives both, and removes the folder or leaves it, as what happens then asks for."""
    try:
        yield work, str(checkpoint) if checkpoint else None
    except (AccuracyBudgetError, PurificationError):  # the same would happen again
        _remove(work)
        raise
    except BaseException:
        if last_whole_checkpoint(work) is None:
            _remove(work)
        raise
    _remove(work)


def _check_same(request: dict[str, Any]) -> None:
    """Raises UsageError where the processes have different models or images before them."""
    found = of_all({key: value for key, value in request.items() if key != "arguments"})
    if differing := [key for key in found[0] if any(one[key] != found[0][key] for one in found)]:
        raise UsageError(
            f"the {len(found)} processes found different {', '.join(differing)}: name a commit (--revision, "
            "--dataset_revision), or folders that are the same for all of them"
        )


def _remove(work: Path) -> None:
    if is_main_process():
        shutil.rmtree(work, ignore_errors=number_of_processes() > 1)  # another one may be writing to it still


def _open(work: Path, request: dict[str, Any], *, resume: bool) -> Path | None:
    """Make the folder, or go on in it; returns the checkpoint to go on from."""
    record = work / REQUEST_FILE
    if work.is_dir() and not record.is_file() and set(work.iterdir()) - {half_written(record), work / LOCK_FILE}:
        raise UsageError(f"{work} was not made for checkpoints, and they go there: give another output folder")
    if work.is_dir() and not resume:
        raise UsageError(f"{work} is left from an interrupted run: go on with --resume, or remove it to start anew")
    if record.is_file() and (old := json.loads(record.read_text(encoding="utf-8"))) != request:
        differing = ", ".join(key for key in request if old.get(key) != request[key])
        raise OtherRequestError(f"{work} is from a run with other {differing}: give the same arguments, or remove it")
    work.mkdir(parents=True, exist_ok=True)
    write_json(record, request)
    return last_whole_checkpoint(work)
