"""Result folders that are whole or not there, and checkpoints that can be trusted."""

import json
import os
from pathlib import Path

import pytest

from hf_tsc.errors import CheckpointError, UsageError
from hf_tsc.folders import (
    SEAL_FILE,
    check_output,
    finished_folder,
    last_whole_checkpoint,
    locked,
    seal_checkpoint,
    write_json,
    writing_checkpoint,
)


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


class TestCheckOutput:
    def test_nothing_there_or_empty(self, tmp_path):
        check_output(tmp_path / "new")
        check_output(tmp_path)

    @pytest.mark.parametrize("name", ["file", ".hidden", "folder"])
    def test_not_empty(self, tmp_path, name):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).mkdir() if name == "folder" else (tmp_path / "out" / name).touch()
        with pytest.raises(UsageError, match=r"out exists and is not empty: give another folder"):
            check_output(tmp_path / "out")

    def test_a_file(self, tmp_path):
        (tmp_path / "out").touch()
        with pytest.raises(UsageError, match="is a file"):
            check_output(tmp_path / "out")

    @pytest.mark.parametrize("name", [".", "/", "..", "a/.."])
    def test_no_name(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UsageError, match="has no name of its own"):
            check_output(Path(name))


class TestFinishedFolder:
    @pytest.mark.parametrize("exists", [False, True])
    def test_appears_at_the_end(self, tmp_path, exists):
        output = tmp_path / "a" / "out"
        if exists:
            output.mkdir(parents=True)
        with finished_folder(output) as folder:
            (folder / "result").write_text("x")
            assert not (output / "result").exists()
            assert folder.parent == output.parent  # on the same file system, so that the renaming is atomic
        assert listing(tmp_path) == {"a", "a/out", "a/out/result"}

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_nothing_is_left_of_a_failure(self, tmp_path, error):
        def fail(folder):
            (folder / "half").mkdir()
            raise error

        with pytest.raises(error), finished_folder(tmp_path / "out") as folder:
            fail(folder)
        assert listing(tmp_path) == set()

    def test_refused_before_the_work(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
        with pytest.raises(UsageError, match="not empty"), finished_folder(tmp_path / "out"):
            pytest.fail("the block must not run")
        assert listing(tmp_path) == {"out", "out/precious"}

    def test_filled_by_another_meanwhile(self, tmp_path):
        def fill(folder):
            (folder / "made").touch()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "precious").touch()

        expected = r"something was put into .*out meanwhile: what was made is in .*out\.\d+"
        with pytest.raises(UsageError, match=expected), finished_folder(tmp_path / "out") as folder:
            fill(folder)
        kept = f"out.{os.getpid()}"
        assert listing(tmp_path) == {"out", "out/precious", kept, f"{kept}/made"}


def test_a_locked_folder(tmp_path):
    """Another opening of the file is as another process: the lock is the opening's."""
    refused = pytest.raises(UsageError, match=r"another process is writing to .*: wait for it")
    with locked(tmp_path), refused, locked(tmp_path):
        pytest.fail("the block must not run")
    with locked(tmp_path):
        pass


class TestWriteJson:
    def test_what_is_read_back(self, tmp_path):
        content = {"name": "Ziffer ä", "numbers": [1, 0.1], "none": None}
        write_json(tmp_path / "x.json", content)
        assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == content
        assert "ä" in (tmp_path / "x.json").read_text(encoding="utf-8")

    def test_the_old_file_stays_when_the_new_one_fails(self, tmp_path):
        write_json(tmp_path / "x.json", 1)
        with pytest.raises(TypeError):
            write_json(tmp_path / "x.json", object())
        assert (tmp_path / "x.json").read_text() == "1\n"
        write_json(tmp_path / "x.json", 2)
        assert (tmp_path / "x.json").read_text() == "2\n"
        assert listing(tmp_path) == {"x.json"}


class TestLastWholeCheckpoint:
    @staticmethod
    def checkpoint(folder: Path, step: int | str) -> Path:
        path = folder / f"checkpoint-{step}"
        path.mkdir()
        (path / "model.safetensors").write_bytes(bytes(100))
        (path / "trainer_state.json").write_text("{}")
        seal_checkpoint(path)
        return path

    def test_none(self, tmp_path):
        assert last_whole_checkpoint(tmp_path) is None
        assert last_whole_checkpoint(tmp_path / "missing") is None

    def test_newest_by_number(self, tmp_path, caplog):
        for step in (2, 10, 9):
            self.checkpoint(tmp_path, step)
        assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
        assert caplog.text == ""

    @pytest.mark.parametrize(
        ("spoil", "said"),
        [
            (lambda path: (path / SEAL_FILE).unlink(), "it was not finished"),
            (lambda path: (path / SEAL_FILE).write_text('{"model'), "it cannot be read"),
            (lambda path: (path / SEAL_FILE).write_text("[]"), "it cannot be read"),
            (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
            (lambda path: (path / "model.safetensors").write_bytes(bytes(99)), "model.safetensors is damaged"),
            (lambda path: (path / "model.safetensors").write_bytes(bytes(99) + b"x"), "model.safetensors is damaged"),
        ],
    )
    def test_a_damaged_one_is_told_of_and_the_one_before_it_taken(self, tmp_path, caplog, spoil, said):
        self.checkpoint(tmp_path, 4)
        spoil(self.checkpoint(tmp_path, 8))
        assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
        assert f"checkpoint-8 is left out: {said}" in caplog.text

    def test_sealed_anew(self, tmp_path):
        path = self.checkpoint(tmp_path, 4)
        (path / "model.safetensors").write_bytes(b"other")
        seal_checkpoint(path)
        assert last_whole_checkpoint(tmp_path) == path

    def test_other_names_are_skipped(self, tmp_path):
        self.checkpoint(tmp_path, "best")
        self.checkpoint(tmp_path, "5.tmp")
        assert last_whole_checkpoint(tmp_path) is None


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_checkpoint_that_cannot_be_written(tmp_path, error):
    said = r"checkpoint-4 could not be .*(space|failed).*go on with --resume"
    with pytest.raises(CheckpointError, match=said), writing_checkpoint(tmp_path / "checkpoint-4"):
        raise error


def test_what_a_killed_run_left_is_removed(tmp_path):
    dead = tmp_path / f".out.{2**22 + 1}.tmp"  # more than any process has for its number
    own, other, others = (tmp_path / name for name in (f".out.{os.getpid()}.tmp", ".out.1.tmp", f".outer.{2**22}.tmp"))
    for folder in (dead, own, other, others):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
    with finished_folder(tmp_path / "out") as folder:
        assert not list(folder.iterdir())
    assert sorted(tmp_path.iterdir()) == sorted([other, others, tmp_path / "out"])
