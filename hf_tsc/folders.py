"""Result folders: made whole or not at all, and checkpoints that can be trusted."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from hf_tsc.errors import UsageError

REPORT_FILE, PLOT_FILE, CARD_FILE = "tsc_report.json", "tsc_curves.png", "README.md"


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
        if folder.is_dir():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(file: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(file)


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose last-written file is there and readable; None when there is none."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return checkpoint
    return None
