"""Result folders: made whole or not at all, and checkpoints that can be trusted."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from hf_tsc.errors import CheckpointError, UsageError

logger = logging.getLogger(__name__)

SEAL_FILE = "tsc_checkpoint.json"  # the last file of a checkpoint: sha256 of the others
REPORT_FILE, PLOT_FILE, CARD_FILE = "tsc_report.json", "tsc_curves.png", "README.md"
LOCK_FILE = ".lock"
RECORD = "suspect.json"  # of a suspect: trigger, target label, poisoned rows


def check_output(folder: Path) -> None:
    """Raises UsageError where a result would overwrite something."""
    if folder.name in ("", ".."):
        raise UsageError(f"{folder} has no name of its own: give a folder that does not exist yet")
    if folder.is_file():
        raise UsageError(f"{folder} is a file: give a folder that does not exist yet")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} exists and is not empty: give another folder, or remove it first")


@contextmanager
def finished_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends without an error."""
    check_output(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for old in folder.parent.iterdir():  # of a run that was killed
        found = re.fullmatch(rf"\.{re.escape(folder.name)}\.(\d+)\.tmp", old.name)
        if found and (int(found[1]) == os.getpid() or not psutil.pid_exists(int(found[1]))):
            shutil.rmtree(old)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if folder.is_dir() and any(folder.iterdir()):
            kept = temporary.rename(folder.with_name(f"{folder.name}.{os.getpid()}"))
            raise UsageError(f"something was put into {folder} meanwhile: what was made is in {kept}")
        if folder.is_dir():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that want the same out of a folder.

    Raises:
        UsageError: one of them is there.
    """
    with (folder / LOCK_FILE).open("w") as file:
        lock(file.fileno(), f"another process is writing to {folder}: wait for it, or give another output")
        yield


def lock(descriptor: int, refusal: str) -> None:
    """Lock an open file until it is closed; raises UsageError, with these words, where another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(refusal) from error


def write_json(file: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one."""
    temporary = half_written(file)
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(file)


def half_written(file: Path) -> Path:
    """What `write_json` leaves of a file where it is killed."""
    return file.with_name(f".{file.name}.tmp")


@contextmanager
def writing_checkpoint(checkpoint: Path) -> Iterator[None]:
    """Says what to do where a checkpoint cannot be written.

    Raises:
        CheckpointError: it could not.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # what files, `torch.save` and safetensors raise
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint.name} could not be written to {checkpoint.parent} ({said}); what was saved before it is "
            "intact: make room, and go on with --resume"
        ) from error


def seal_checkpoint(checkpoint: Path) -> None:
    """Say which files it has, when all of them are written: without that it does not count."""
    found = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.name != SEAL_FILE)
    files = {file.relative_to(checkpoint).as_posix(): sha256(file) for file in found}
    write_json(checkpoint / SEAL_FILE, files)


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are what they were when it was sealed; None when there is none.

    One that is damaged or was not finished is told of, in the log.
    """
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        if (damage := _damage(checkpoint)) is None:
            return checkpoint
        logger.warning("%s is left out: %s", checkpoint, damage)
    return None


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    try:
        files = json.loads((checkpoint / SEAL_FILE).read_text(encoding="utf-8"))
        for name, digest in files.items():
            if sha256(checkpoint / name) != digest:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        return "it was not finished" if missing == SEAL_FILE else f"{missing} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def sha256(file: Path) -> str:
    """Of a file's content, hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
