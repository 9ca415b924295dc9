"""The file of results: whole lines only, one writer at a time, and nothing lost to a process that was killed."""

import os
import subprocess
import sys

import pytest

from hf_tsc.benchmark.lines import open_lines, read_lines
from hf_tsc.errors import UsageError

LINES = [{"id": "a", "paths": [{"t": 0.1}]}, {"id": "b", "error": "näher \u2028 …"}, {"id": "c", "x": None}]
CUT = b'{"id": "d", "pat'


@pytest.fixture
def file(tmp_path):
    """A file of three lines."""
    file = tmp_path / "results.jsonl"
    with open_lines(file) as lines:
        for line in LINES:
            lines.add(line)
    return file


def test_round_trip(file):
    assert read_lines(file) == LINES
    assert len(file.read_bytes().splitlines()) == 3


def test_no_file(tmp_path):
    assert read_lines(tmp_path / "nope.jsonl") == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_made(tmp_path):
    with open_lines(tmp_path / "new" / "results.jsonl") as lines:
        lines.add(LINES[0])
    assert read_lines(tmp_path / "new" / "results.jsonl") == LINES[:1]


def test_lines_can_be_read_as_they_are_added(tmp_path):
    with open_lines(tmp_path / "r") as lines:
        for count in (1, 2):
            lines.add(LINES[count])
            assert read_lines(tmp_path / "r") == LINES[1 : count + 1]


def test_a_disk_that_takes_a_line_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("os.write", lambda descriptor, data, real=os.write: real(descriptor, data[:7]))
    with open_lines(tmp_path / "r") as lines:
        for line in LINES:
            lines.add(line)
    assert read_lines(tmp_path / "r") == LINES


def test_opening_again_adds(file):
    before = file.read_bytes()
    with open_lines(file) as lines:
        lines.add({"id": "d"})
    assert read_lines(file) == [*LINES, {"id": "d"}]
    assert file.read_bytes().startswith(before)


@pytest.mark.parametrize("cut", [CUT, b'{"id": "d"}', "ä".encode()[:1]], ids=["half", "no end of line", "half letter"])
def test_a_cut_last_line(file, cut):
    whole = file.read_bytes()
    file.write_bytes(whole + cut)
    assert read_lines(file) == LINES
    assert file.read_bytes() == whole + cut  # reading changes nothing
    with open_lines(file) as lines:
        assert file.read_bytes() == whole
        lines.add({"id": "e"})
    assert read_lines(file) == [*LINES, {"id": "e"}]


def test_nothing_but_a_cut_line(tmp_path):
    (tmp_path / "r").write_bytes(CUT)
    assert read_lines(tmp_path / "r") == []
    with open_lines(tmp_path / "r"):
        assert (tmp_path / "r").read_bytes() == b""


@pytest.mark.parametrize("damaged", [CUT, b'{"name": "b"}', b'["id"]', b'"id"', b"3", b"", b"\0\0"], ids=repr)
def test_a_damaged_line(file, damaged):
    first, _, last = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([first, damaged, last, b""]))
    with pytest.raises(UsageError, match=r"results\.jsonl, line 2: expected a result of hf-tsc benchmark"):
        read_lines(file)


def test_a_line_that_is_no_text(file):
    file.write_bytes(b"\xff\n" + file.read_bytes())
    with pytest.raises(UsageError, match=r"results\.jsonl, line 1: expected a result"):
        read_lines(file)


class TestOneWriter:
    def test_another_descriptor(self, file):
        with open_lines(file) as lines:
            with file.open("ab") as other:
                other.write(CUT)  # as if the first were in the middle of a line
            before = file.read_bytes()
            with pytest.raises(UsageError, match=r"results\.jsonl is being written by another"), open_lines(file):
                pass
            assert file.read_bytes() == before
            lines.add({"id": "d"})
        with open_lines(file):
            pass

    def test_another_process(self, file):
        code = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
        command = [sys.executable, "-S", "-c", code, str(file)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            other.stdout.readline()
            with pytest.raises(UsageError, match="is being written by another benchmark"), open_lines(file):
                pass
            other.communicate(b"\n")
        with open_lines(file):
            pass

    def test_other_files_are_free(self, file):
        with open_lines(file), open_lines(file.with_name("other.jsonl")) as lines:
            lines.add(LINES[0])

    def test_closed_after_an_error(self, file):
        with pytest.raises(KeyboardInterrupt), open_lines(file):
            raise KeyboardInterrupt
        with open_lines(file):
            pass
