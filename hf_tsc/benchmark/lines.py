"""The file of results: one JSON line a finished cell, added as it finishes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_tsc.errors import UsageError
from hf_tsc.folders import lock

Line = dict[str, Any]


def read_lines(file: Path) -> list[Line]:
    """All whole lines; a last one that was cut off is left out.

    Raises:
        UsageError: another line is no JSON object with an `id`.
    """
    if not file.is_file():
        return []
    lines = []
    for number, text in enumerate(_whole(file.read_bytes()).splitlines(), start=1):
        try:
            line = json.loads(text)
            line["id"]
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{file}, line {number}: expected a result of hf-tsc benchmark ({error!r})") from error
        lines.append(line)
    return lines


class Lines:
    """The file, open for one process alone."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def add(self, line: Line) -> None:
        """Add a line; it is on the disk when this returns."""
        rest = (json.dumps(line) + "\n").encode()
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        os.fsync(self._descriptor)


@contextmanager
def open_lines(file: Path) -> Iterator[Lines]:
    """Open the file for adding; a last line that was cut off is removed.

    Raises:
        UsageError: another process has it open.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        lock(descriptor, f"{file} is being written by another benchmark: wait for it, or give another")
        os.ftruncate(descriptor, len(_whole(file.read_bytes())))
        yield Lines(descriptor)
    finally:
        os.close(descriptor)


def _whole(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]
