"""Pull and push while the Hub fails: each fault of `hub_faults` at each step, and a push that is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hostile
import hub_faults
import pytest
from hub_faults import KINDS, PULL, PUSH, REPORT, Fails, finished

from hf_tsc.errors import HfTscError, UsageError
from hf_tsc.folders import sha256
from hf_tsc.hub import PushOptions, push_folder, resolve_model

TOKEN = "hf_alice"
HEALTHY_PULL = {"info": 1, "list of files": 3, "file, its header": 1, "file": 1}  # requests of each kind
ONCE_OR_EVER = [pytest.param(True, id="once"), pytest.param(False, id="from then on")]


@pytest.fixture(autouse=True)
def alice(hub):
    """A user of the Hub."""
    hub.reset()
    hub.cdn = True
    hub.add_user("alice", token=TOKEN)
    yield
    hub.reset()


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    hub_faults.silence(monkeypatch)
    return hub_faults.no_waits(monkeypatch)


@pytest.fixture(scope="module")
def suspect(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("suspect") / "model"
    hostile.healthy(folder)
    return contents(folder)


@pytest.fixture(scope="module")
def new(tmp_path_factory) -> Path:
    return finished(tmp_path_factory.mktemp("new") / "model", value=2.0)


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> dict[str, bytes]:
    """What is in the repo before the push; a part of it must go."""
    files = contents(finished(tmp_path_factory.mktemp("old") / "model"))
    return {**files, "pytorch_model.bin": b"pickle", "notes.txt": b"notes"}


@pytest.fixture
def repo(request) -> str:
    return "alice/" + re.sub(r"\W+", "-", request.node.name)[:90].strip("-.")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def asked(hub, pattern: str) -> int:
    return sum(bool(re.search(pattern, f"{request.method} {request.path}")) for request in hub.requests)


def push(folder: Path, repo: str, **options):
    return push_folder(folder, PushOptions(repo, token=TOKEN, **options))


def check_whole(hub, repo: str, old: dict[str, bytes] | None, new: Path) -> bool:
    """The repo holds the old commit or one new one, whole; whether it is the new one."""
    if repo not in hub.main:
        assert old is None
        return False
    files, changes = hub.files(repo), len(hub.history(repo)) - 1
    assert changes <= 1
    if changes == 0:
        assert files == (old or {".gitattributes": files[".gitattributes"]})
        return False
    kept = {".gitattributes", "notes.txt"}
    assert {name: data for name, data in files.items() if name not in kept} == contents(new)
    assert old is None or files["notes.txt"] == old["notes.txt"]
    assert json.loads(files[REPORT])["purified"]["files"] == {hostile.WEIGHTS: sha256(new / hostile.WEIGHTS)}
    return True


def check_error(error: Exception, says: str) -> None:
    assert says in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 600


def fates(steps: dict[str, str]) -> list:
    """All steps and kinds, less what cannot happen."""
    possible = [(step, kind) for step in steps for kind in KINDS if hub_faults.fate(step, kind, once=True)]
    return [pytest.param(step, kind, id=f"{step}: {kind}") for step, kind in possible]


def check_waits(waits: list[float], step: str, kind: str, *, once: bool) -> None:
    """What a status 429 asks for is waited for. (A header is first asked for again at once, by the client.)"""
    if "429" in kind and not (once and step == "file, its header"):
        assert [wait for wait in waits if wait < 7] == []
        assert waits


@pytest.mark.parametrize("once", ONCE_OR_EVER)
@pytest.mark.parametrize(("step", "kind"), fates(PULL))
def test_pull(hub, suspect, repo, tmp_path, waits, step, kind, once):
    commit = hub.commit(repo, suspect)
    pattern = PULL[step].format(repo=re.escape(repo))
    hub.fault(pattern, times=1 if once else None, **KINDS[kind])
    expected = hub_faults.fate(step, kind, once=once)
    if isinstance(expected, Fails):
        with pytest.raises(HfTscError) as caught:
            resolve_model(repo, cache_dir=tmp_path)
        check_error(caught.value, expected.says)
    else:
        source = resolve_model(repo, cache_dir=tmp_path)
        assert source.revision == commit
        assert source.notes == ()
        assert {name: data for name, data in contents(source.path).items() if data != suspect[name]} == {}
        assert (asked(hub, pattern) > HEALTHY_PULL[step]) == expected.again
    check_waits(waits, step, kind, once=once)


@pytest.mark.parametrize("once", ONCE_OR_EVER)
@pytest.mark.parametrize(("step", "kind"), fates(PUSH))
def test_push(hub, old, new, repo, waits, step, kind, once):
    before = None if step == "new repo" else old
    if before:
        hub.commit(repo, before)
    pattern = PUSH[step].format(repo=re.escape(repo))
    hub.fault(pattern, times=1 if once else None, **KINDS[kind])
    expected = hub_faults.fate(step, kind, once=once)
    if isinstance(expected, Fails):
        with pytest.raises(HfTscError) as caught:
            push(new, repo)
        check_error(caught.value, expected.says)
        done = check_whole(hub, repo, before, new)
        assert done == (step == "file, read back")
        for commit in re.findall(r"\b[0-9a-f]{40}\b", str(caught.value)):  # the commit that it says is there
            assert commit == hub.main[repo]
    else:
        pushed = push(new, repo)
        assert check_whole(hub, repo, before, new)
        assert pushed.commit == hub.main[repo]
        assert (asked(hub, pattern) > 1) == expected.again
    check_waits(waits, step, kind, once=once)
    hub.faults.clear()
    assert push(new, repo).commit == hub.main[repo]
    assert check_whole(hub, repo, before, new)


# Waits


def test_every_request_has_a_limit(hub, suspect, new, old, repo, tmp_path, monkeypatch):
    """Also when the client has opened a new session, since a connection was refused."""
    hub_faults.no_waits(monkeypatch)
    without = hub_faults.requests_without_a_limit(monkeypatch, refuse=r"HEAD .*/config\.json|/preupload/")
    hub.commit(f"{repo}-suspect", suspect)
    resolve_model(f"{repo}-suspect", cache_dir=tmp_path)
    hub.commit(repo, old)
    push(new, repo)
    assert without == []


def test_silence_ends(hub, old, new, repo, monkeypatch):
    """Of the sockets themselves."""
    hub_faults.no_waits(monkeypatch)
    monkeypatch.setattr("hf_tsc.hub.retry.SILENCE", 0.3)
    hub.commit(repo, old)
    hub.fault("/preupload/", slow=2)
    started = time.monotonic()
    push(new, repo)
    assert time.monotonic() - started < 2
    assert check_whole(hub, repo, old, new)


@pytest.mark.parametrize("status", [500, 503])
def test_a_limit_that_is_not_reached_is_not_waited_for(hub, suspect, repo, tmp_path, waits, status):
    hub.commit(repo, suspect)
    hub.fault("GET /api/models/", status=status, headers={"ratelimit": '"api";r=499;t=250'})
    resolve_model(repo, cache_dir=tmp_path)
    assert waits == [1.0]


@pytest.mark.parametrize("step", ["info", "commit"])
def test_a_wait_of_an_hour_is_an_error(hub, old, new, repo, waits, step):
    hub.commit(repo, old)
    hub.fault(PUSH[step].format(repo=repo), status=429, headers={"Retry-After": "3600"})
    with pytest.raises(HfTscError, match="429 and asks to wait 3600 s"):
        push(new, repo)
    assert waits == []
    assert not check_whole(hub, repo, old, new)


def test_the_client_waits_for_an_hour_by_itself(hub, old, new, repo, waits):
    """Not as we would have it; docs/security.md says so."""
    hub.commit(repo, old)
    hub.fault(PUSH["preupload"].format(repo=repo), status=429, headers={"Retry-After": "3600"})
    push(new, repo)
    assert waits == [3601.0]


# Pull requests, other writers, what is replaced


@pytest.mark.parametrize("kind", sorted(hub_faults.LOST | hub_faults.SPOILT))
def test_a_lost_answer_opens_no_second_pull_request(hub, old, new, repo, waits, kind):
    hub.commit(repo, old)
    hub.fault("/commit/", **KINDS[kind])
    try:
        push(new, repo, create_pr=True)
    except HfTscError as error:
        check_error(error, "pull request may have been opened")
    assert [ref for ref in hub.branches[repo] if ref != "main"] == ["refs/pr/1"]
    assert hub.files(repo) == old
    proposed = hub.files(repo, "refs/pr/1")
    assert {name: data for name, data in proposed.items() if name != "notes.txt"} == contents(new)


@pytest.mark.parametrize("kind", ["status 503", "connection closed"])
def test_a_pull_request_is_opened_after_a_retry(hub, old, new, repo, waits, kind):
    """Where the Hub says, or the request never reached it, that nothing was done."""
    hub.commit(repo, old)
    hub.fault("/preupload/", **KINDS[kind])
    push(new, repo, create_pr=True)
    assert [ref for ref in hub.branches[repo] if ref != "main"] == ["refs/pr/1"]
    assert hub.files(repo) == old


def test_somebody_else_pushes_meanwhile(hub, old, new, repo, waits, monkeypatch):
    hub.commit(repo, old)
    other = {**old, "README.md": b"# Other"}

    def upload(hub_, call, *args, real=hub_faults.routes.lfs_batch):
        if len(hub.history(repo)) == 1:
            hub.commit(repo, other)
        return real(hub_, call, *args)

    hub_faults.replace_route(monkeypatch, "lfs_batch", upload)
    with pytest.raises(HfTscError, match="somebody else moved its main") as caught:
        push(new, repo)
    check_error(caught.value, "Nothing was pushed")
    assert hub.files(repo) == other


LOADABLE = [
    "pytorch_model.bin",
    "model-00001-of-00002.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "model.onnx",
    "onnx/model.onnx",
    "model.gguf",
    "tf_model.h5",
    "sub/model.safetensors",
    "sub/pytorch_model.bin",
    "pytorch_model.bin.index.json",
]


def test_nothing_stays_that_a_loader_could_take_instead(hub, old, new, repo, waits):
    kept = {"notes.txt": b"notes", "sub/notes.txt": b"notes", "sub/picture.png": b"picture"}
    hub.commit(repo, kept | dict.fromkeys(LOADABLE, b"old"))
    pushed = push(new, repo)
    assert sorted(pushed.replaced) == sorted(LOADABLE)
    assert hub.files(repo) == kept | contents(new)
    assert len(hub.history(repo)) == 2


# Folders that are not pushed


def edit_report(folder: Path, edit: Callable[[dict], object]) -> None:
    report = json.loads((folder / REPORT).read_text())
    edit(report)
    (folder / REPORT).write_text(json.dumps(report))


def without_weights(folder: Path) -> None:
    (folder / hostile.WEIGHTS).unlink()
    edit_report(folder, lambda report: report["purified"].update(files={}))


UNFINISHED: dict[str, Callable[[Path], object]] = {
    "weights of somebody else": lambda f: (f / hostile.WEIGHTS).write_bytes(b"other"),
    "weights missing": lambda f: (f / hostile.WEIGHTS).unlink(),
    "no weights, and none in the report": without_weights,
    "more weights": lambda f: (f / "model-00001-of-00002.safetensors").write_bytes(b"more"),
    "report missing": lambda f: (f / REPORT).unlink(),
    "report that is not JSON": lambda f: (f / REPORT).write_text("{"),
    "report that is a list": lambda f: (f / REPORT).write_text("[]"),
    "report without a suspect": lambda f: edit_report(f, lambda report: report.pop("suspect")),
    "report without files": lambda f: edit_report(f, lambda report: report["purified"].pop("files")),
    "report with a suspect that is text": lambda f: edit_report(f, lambda report: report.update(suspect="x")),
    "card missing": lambda f: (f / hostile.CARD).unlink(),
    "configuration missing": lambda f: (f / hostile.CONFIG).unlink(),
    "place of this machine in the card": lambda f: (f / hostile.CARD).write_text(f"# From {f}"),
}


@pytest.mark.parametrize("name", UNFINISHED)
def test_unfinished_folder(hub, old, repo, tmp_path, waits, name):
    folder = finished(tmp_path / "folder")
    UNFINISHED[name](folder)
    hub.commit(repo, old)
    with pytest.raises(UsageError) as caught:
        push(folder, repo)
    check_error(caught.value, str(folder))
    assert hub.files(repo) == old


def test_only_the_files_of_the_list_are_pushed(hub, new, repo, tmp_path, waits):
    folder = finished(tmp_path / "folder")
    for name in ("training_args.bin", "optimizer.pt", "evil.py", ".env", "checkpoint-3/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    push(folder, repo)
    pushed = {hostile.WEIGHTS, hostile.CONFIG, hostile.PROCESSOR, hostile.CARD, REPORT}
    assert set(hub.files(repo)) == {".gitattributes", *pushed}
    assert not any(b"secret" in request for request in hub.files(repo).values())


# Killed

FORKS = """
import os, sys
from pathlib import Path
from hf_tsc.hub import PushOptions, push_folder
print("ready", flush=True)
for line in sys.stdin:
    folder, repo, token = line.split()
    child = os.fork()
    if child == 0:
        push_folder(Path(folder), PushOptions(repo, token=token))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def forks():
    """A process that forks a push for each line on its stdin, and says its id and exit code."""
    command = [sys.executable, "-c", FORKS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": {**os.environ}}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("step", "after"),
    [
        ("preupload", False),
        ("LFS, upload", False),
        ("LFS, upload", True),
        ("commit", False),
        ("commit", True),
        ("file, read back", False),
    ],
)
def test_killed(hub, old, new, repo, forks, step, after):
    """`kill -9` while the Hub is about to do a step, or has done it and not answered yet."""
    hub.commit(repo, old)
    pattern = PUSH[step].format(repo=re.escape(repo))
    hub.fault(pattern, slow=0.3, after=after)
    print(new, repo, TOKEN, file=forks.stdin, flush=True)
    child = int(forks.stdout.readline())
    deadline = time.monotonic() + 60
    while not asked(hub, pattern) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert int(forks.stdout.readline()) == -signal.SIGKILL
    first = check_whole(hub, repo, old, new)
    assert first in ({True} if step == "file, read back" else {True, False} if step == "commit" else {False})
    time.sleep(0.4)  # what the Hub was asked for it may still do
    assert check_whole(hub, repo, old, new) == (step in ("commit", "file, read back"))
    push(new, repo)
    assert check_whole(hub, repo, old, new)
