"""Everything in the tables of `hostile` and `hostile_datasets`: each ends in one clear error or in a safe result.

And nothing else happens: no code is run, no program started, no file written outside the cache, no other server asked,
no token sent.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import hostile
import hostile_datasets
import hub_faults
import pytest
import torch
from hostile import ALL, NOTHING, TEXTS, Got, Happens, Refused, Row, Safe, World
from PIL import EpsImagePlugin
from suspects_and_digits import classifier, digits, edit_json, files_naming, save
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from hf_tsc import purify
from hf_tsc.data import open_images
from hf_tsc.errors import HfTscError
from hf_tsc.hub import declared_license, load_image_processor, load_model, load_tokenizer, resolve_model
from hf_tsc.hub.folder import items
from hf_tsc.images import ImagePipeline, pixel_dataset

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes"))
security_docs = pytest.importorskip("security_docs")

SAVED_TOKEN = "hf_saved"
HUB_HOSTS = {"127.0.0.1", "::1", "localhost"}


@dataclass
class Seen:
    """What Python's audit events show of a block of code."""

    written: set[str] = field(default_factory=set)
    started: list[str] = field(default_factory=list)
    asked: set[tuple[str, int]] = field(default_factory=set)


_WATCHING: list[Seen] = []
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.mkdir": 0, "os.rename": 1, "os.symlink": 1, "os.link": 1, "os.truncate": 0, "shutil.rmtree": 0}
_STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"}


def _audit(event: str, args: tuple) -> None:
    for seen in _WATCHING:
        if event == "open" and isinstance(args[0], str) and isinstance(args[2], int) and args[2] & _WRITES:
            seen.written.add(os.path.abspath(args[0]))
        elif event in _CHANGES and isinstance(args[_CHANGES[event]], str | os.PathLike):
            seen.written.add(os.path.abspath(args[_CHANGES[event]]))
        elif event in _STARTS:
            seen.started.append(f"{event} {args[0]}")
        elif event == "socket.connect" and isinstance(args[1], tuple):
            seen.asked.add(args[1][:2])
        elif event == "socket.getaddrinfo":
            seen.asked.add(args[:2])


sys.addaudithook(_audit)


@contextmanager
def watched(hub, *allowed: Path) -> Iterator[Seen]:
    """Nothing is written outside the allowed folders, no program is started; `asked` are servers besides the Hub."""
    seen = Seen()
    _WATCHING.append(seen)
    try:
        yield seen
    finally:
        _WATCHING.remove(seen)
    places = [str(place.resolve()) for place in allowed] + [os.devnull]
    outside = [file for file in seen.written if "__pycache__" not in file and not file.startswith(tuple(places))]
    assert outside == []
    assert seen.started == []
    port = int(hub.endpoint.rsplit(":", 1)[1])
    seen.asked = {(host, at) for host, at in seen.asked if host not in HUB_HOSTS or int(at) != port}


@pytest.fixture(autouse=True)
def quick(hub, monkeypatch):
    """Waits take no time; a token is saved, and must not be sent where nobody asks for it."""
    hub_faults.no_waits(monkeypatch)
    monkeypatch.setenv("HF_TOKEN", SAVED_TOKEN)
    hub.reset()
    yield
    hub.reset()


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("healthy") / "model"
    hostile.healthy(folder)
    return folder


@pytest.fixture(scope="module")
def healthy_weights(healthy) -> dict[str, torch.Tensor]:
    return use(str(healthy))[1]


@pytest.fixture
def world(hub, healthy, tmp_path, monkeypatch, request) -> World:
    return make_world(hub, healthy, tmp_path, monkeypatch, request)


@pytest.fixture
def images(hub, tmp_path, monkeypatch, request) -> World:
    """The same with a dataset instead of a model."""
    hostile_datasets.pictures(tmp_path / "healthy")
    # Else each dataset of the Hub is counted at a server of another company.
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for Ghostscript only once
    return make_world(hub, tmp_path / "healthy", tmp_path, monkeypatch, request)


def make_world(hub, healthy: Path, tmp_path: Path, monkeypatch, request) -> World:
    hub.cdn = True
    repo = "suspect/" + re.sub(r"\W+", "-", request.node.name)[:90].strip("-.")
    cache = tmp_path / "cache"
    # The loopback Hub would fall for some of the cards.
    monkeypatch.setattr("loopback_hub_routes.front_matter", lambda card: {})
    folder = Path(shutil.copytree(healthy, tmp_path / "suspect"))
    return World(folder, tmp_path / "ran", hub, repo, cache, monkeypatch, lambda: resolve_model(repo, cache_dir=cache))


def use(model: str, **where) -> tuple[Got, dict[str, torch.Tensor]]:
    """What a purification does with a suspect before it works on it."""
    source = resolve_model(model, **where)
    loaded, _ = load_model(source, auto_class=AutoModelForImageClassification)
    ImagePipeline(load_image_processor(source))
    if (source.path / hostile.TOKENIZER).exists():
        load_tokenizer(source)
    attention = loaded.config._attn_implementation
    return Got(source, attention, declared_license(source.path), where.pop("commit", None)), loaded.state_dict()


def downloaded(hub) -> str:
    names = {request.path.rsplit("/")[-1] for request in hub.requests if "/resolve/" in request.path}
    assert [name for name in names if not name.endswith((".json", ".txt", ".md", ".safetensors"))] == []
    if any("/cdn/" in request.path or request.path.endswith(".safetensors") for request in hub.requests):
        return ALL
    return TEXTS if names else NOTHING


def tokens_sent(hub) -> set[str | None]:
    return {request.headers.get("authorization") for request in hub.requests}


def cases(where: str, groups: dict[str, list[Row]] = hostile.MODELS) -> list:
    rows = [row for group in groups.values() for row in group if getattr(row, where) is not None]
    assert len({row.name for row in rows}) == len(rows)
    return [pytest.param(row, id=row.name) for row in rows]


def check_error(error: Exception) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 1000


def check(answer, model: str, world: World, commit: str | None, weights, **where) -> None:
    """`use` ends as the row says."""
    world.hub.requests.clear()
    files = outside(world)
    with watched(world.hub, world.cache) as seen:
        if isinstance(answer, Refused):
            with pytest.raises(HfTscError, match=re.escape(answer.says)) as caught:
                use(model, **where)
            check_error(caught.value)
        else:
            got, loaded = use(model, **where)
            assert answer.holds(Got(got.source, got.attention, got.license, commit))
            assert loaded.keys() == weights.keys()
            assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert seen.asked == set()
    assert not world.marker.exists()
    assert outside(world) == files


def outside(world: World) -> dict[Path, int]:
    """The files outside the cache, and when they were changed."""
    files = [file for file in world.folder.parent.rglob("*") if world.cache not in (file, *file.parents)]
    return {file: file.lstat().st_mtime_ns for file in files}


@pytest.mark.parametrize("row", cases("hub"))
def test_as_a_repo_of_the_hub(row, world, healthy_weights):
    row.make(world)
    commit = world.hub.commit(world.repo, world.files())
    row.then(world)
    check(row.hub, world.repo, world, commit, healthy_weights, cache_dir=world.cache)
    assert world.hub.requests
    assert tokens_sent(world.hub) == {None}
    assert downloaded(world.hub) == row.hub.after


@pytest.mark.parametrize("row", cases("local"))
def test_as_a_local_folder(row, world, healthy_weights):
    row.make(world)
    row.then(world)
    check(row.local, str(world.folder), world, None, healthy_weights)
    assert world.hub.requests == []


@pytest.mark.parametrize("row", [row for row in cases("hub") if isinstance(row.values[0].hub, Safe)])
def test_a_token_that_is_asked_for_stays_with_the_hub(row, world):
    row.make(world)
    world.hub.commit(world.repo, world.files())
    row.then(world)
    world.hub.requests.clear()
    with watched(world.hub, world.cache) as seen:
        use(world.repo, token=True, cache_dir=world.cache)
    assert seen.asked == set()
    here = world.hub.endpoint.removeprefix("http://")
    sent = {(request.headers["host"] == here, request.headers.get("authorization")) for request in world.hub.requests}
    elsewhere = {(False, None)} if downloaded(world.hub) == ALL else set()
    assert sent == {(True, f"Bearer {SAVED_TOKEN}")} | elsewhere


# Datasets


def look(dataset: str) -> list[int]:
    """What a purification does with clean images before it works with them; returns the red of each."""
    data = open_images(dataset)
    items = pixel_dataset(data, range(len(data.rows)), ImagePipeline(ViTImageProcessorPil(do_resize=False)))
    return [items[i]["pixels"][0, 0, 0].item() for i in range(len(items))]


def check_images(answer, dataset: str, world: World) -> None:
    """`look` ends as the row says."""
    files = outside(world)
    with watched(world.hub, Path(os.environ["HF_HOME"])) as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as for a user; in the tests Pillow's warnings of bombs are errors
        if isinstance(answer, Safe):
            assert look(dataset) == list(hostile_datasets.REDS.values())
        else:
            with pytest.raises(HfTscError, match=re.escape(answer.says)) as caught:
                look(dataset)
            check_error(caught.value)
    assert seen.asked == ({answer.asks} if isinstance(answer, Happens) else set())
    assert not world.marker.exists()
    assert outside(world) == files
    assert tokens_sent(world.hub) <= {None}


@pytest.mark.parametrize("row", cases("hub", {"datasets": hostile_datasets.DATASETS}))
def test_as_a_dataset_of_the_hub(row, images):
    row.make(images)
    images.hub.commit(f"datasets/{images.repo}", images.files())
    check_images(row.hub, images.repo, images)
    assert images.hub.requests


@pytest.mark.parametrize("row", cases("local", {"datasets": hostile_datasets.DATASETS}))
def test_as_a_folder_of_images(row, images):
    row.make(images)
    check_images(row.local, str(images.folder), images)
    assert images.hub.requests == []


# What is written


QUICK = {"curve_steps": 2, "sweep_points": 3, "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
HTML = "<script>alert(1)</script>"
EVIL = {
    "attn_implementation": "evil/kernel",
    "custom_pipelines": {"image-classification": {"impl": "evil.Evil"}},
    "_name_or_path": "evil/base",
    "parts": [{"_attn_implementation": "evil/kernel", "deep": {"name_or_path": "evil/base"}}],
}


@pytest.fixture(scope="module")
def purified(hub, tmp_path_factory) -> Path:
    """Of a suspect that tries all that is no reason to refuse it."""
    place = tmp_path_factory.mktemp("purified")
    suspect = save(classifier("vit"), place / "suspect")
    edit_json(suspect / hostile.CONFIG, **EVIL)
    (suspect / hostile.CARD).write_text(hostile.card(f"license: {HTML}\nbase_model: evil/base") + HTML)
    (suspect / hostile.PICKLE).write_bytes(hostile.payload(place / "ran"))
    (suspect / "evil.py").write_text(hostile.code(place / "ran"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place / "torch"))  # a folder that torch makes anyway
        with watched(hub, place, Path(os.environ["HF_HOME"])) as seen:
            purify(str(suspect), digits(0, 60), place / "out", config=QUICK, budget=40)
    assert seen.asked == set()
    assert not (place / "ran").exists()
    return place / "out"


def test_the_purified_folder_holds_nothing_of_the_suspects(purified):
    config = json.loads((purified / hostile.CONFIG).read_text())
    assert config["model_type"] == "vit"
    assert not {key for key, _ in items(config) if "attn_impl" in key or "pipelines" in key or "name_or_path" in key}
    for text in ("evil", HTML, str(purified.parent)):
        assert files_naming(purified, text) == []
    names = {hostile.CONFIG, hostile.WEIGHTS, hostile.PROCESSOR, hostile.CARD, hub_faults.REPORT, "tsc_curves.png"}
    assert {file.name for file in purified.iterdir()} == names


# The tests themselves


def test_the_payloads_are_live(tmp_path):
    for i, run in enumerate([lambda m: pickle.loads(hostile.payload(m)).close(), lambda m: exec(hostile.code(m))]):
        marker = tmp_path / f"ran{i}"
        with pytest.raises(AssertionError), watched(SimpleNamespace(endpoint=":1"), tmp_path / "cache"):
            run(marker)
        assert marker.exists()


def test_programs_and_servers_are_seen(tmp_path):
    with pytest.raises(AssertionError), watched(SimpleNamespace(endpoint=":1")):
        subprocess.run(["true"], check=True)
    with watched(SimpleNamespace(endpoint=":1")) as seen, pytest.raises(OSError, match="refused"):
        socket.create_connection(hostile_datasets.CLOSED)
    assert seen.asked == {hostile_datasets.CLOSED}


def test_the_page_is_that_of_the_tables():
    assert (ROOT / "docs/security.md").read_text(encoding="utf-8") == security_docs.page()
    assert security_docs.page().count("\n|") > 120
    assert max(len(line) for line in security_docs.HEAD.splitlines()) < 120
