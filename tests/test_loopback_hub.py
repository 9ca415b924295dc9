"""The loopback Hub, through the real client: pushes, tokens, private and gated repos, datasets, kinds of faults."""

import hashlib
import http.client
import io
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import loopback_hub_routes
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from loopback_hub import Fault
from transformers import ResNetConfig, ResNetForImageClassification

# The client uploads LFS files by a call that its own HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")

CARD = "---\nlicense: mit\ntags: [purified]\nlibrary_name: transformers\n---\n# Card\n"
WEIGHTS = bytes(range(256)) * 1000
FILES = {
    "config.json": b'{"a": 1}\n',
    "model.safetensors": WEIGHTS,
    "sub/deep/vocab.txt": b"v",
    "README.md": CARD.encode(),
}


@pytest.fixture
def api(hub, monkeypatch):
    """A client who is alice with a write token; bob may only read. The client's waits take no time."""
    no_wait = SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    monkeypatch.setattr("huggingface_hub.utils._http.time", no_wait)
    monkeypatch.setattr("huggingface_hub.file_download.time", no_wait)
    hub.reset()
    hub.add_user("alice", token="hf_alice")
    hub.add_user("alice", token="hf_alice_reads", role="read")
    hub.add_user("bob", token="hf_bob")
    yield HfApi(token="hf_alice")
    hub.reset()


@pytest.fixture
def repo(hub, api, request) -> str:
    """A new repo of alice with `FILES`."""
    name = own_name(request)
    hub.commit(name, FILES)
    return name


def own_name(request) -> str:
    return "alice/" + re.sub(r"\W+", "-", request.node.name).strip("-")


def add(path: str, data: bytes = b"new") -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, data)]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read(folder: str | Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()}


def asked(hub, method: str, text: str) -> list:
    return [request for request in hub.requests if request.method == method and text in request.path]


# Pushes


@pytest.mark.parametrize("cdn", [False, True])
def test_push_round_trip_is_bit_exact(hub, api, tmp_path, cdn):
    hub.cdn = cdn
    name = f"alice/round-trip-{cdn}"
    url = api.create_repo(name)
    assert (url, url.repo_id) == (f"{hub.endpoint}/{name}", name)
    first = hub.main[name]
    done = api.upload_folder(repo_id=name, folder_path=write(tmp_path / "up", FILES), commit_message="Purify")
    assert hub.history(name) == [first, done.oid]
    assert hub.messages[done.oid] == "Purify"
    assert hub.files(name) == {**hub.files(name, first), **FILES}
    assert list(hub.files(name, first)) == [".gitattributes"]
    [sent] = asked(hub, "PUT", "/lfs/")
    assert "authorization" not in sent.headers
    assert sent.headers["host"] == (hub.other_origin if cdn else hub.endpoint).removeprefix("http://")
    folder = snapshot_download(name, revision=done.oid, cache_dir=tmp_path / "cache", token=False)
    assert read(folder) == hub.files(name)
    checked = api.verify_repo_checksums(name, revision=done.oid, cache_dir=tmp_path / "cache")
    assert (checked.checked_count, checked.mismatches, checked.missing_paths) == (5, [], [])


def test_nothing_new_makes_no_commit(hub, api, repo, tmp_path):
    done = api.upload_folder(repo_id=repo, folder_path=write(tmp_path, {**FILES, "empty.bin": b""}))
    again = api.upload_folder(repo_id=repo, folder_path=tmp_path)
    assert again.oid == done.oid
    assert len(hub.history(repo)) == 2
    assert asked(hub, "PUT", "") == []  # the weights were there


def test_body_in_chunks(hub, api, repo):
    """A file that cannot tell its length."""
    body = (part for part in [b"paths=sub&", b"paths=config.json&paths=absent"])
    path = f"/api/models/{repo}/paths-info/main"
    answer = httpx.post(hub.endpoint + path, content=body, trust_env=False)
    assert hub.requests[-1].headers["transfer-encoding"] == "chunked"
    assert [(entry["type"], entry["path"]) for entry in answer.json()] == [
        ("directory", "sub"),
        ("file", "config.json"),
    ]


def test_deletions(hub, api, repo):
    api.create_commit(repo, [CommitOperationDelete("sub/"), CommitOperationDelete("config.json")], commit_message="x")
    assert set(hub.files(repo)) == {"model.safetensors", "README.md"}
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist: absent"):
        api.create_commit(repo, [CommitOperationDelete("absent")], commit_message="x")


def test_stale_parent(hub, api, repo):
    first = hub.main[repo]
    second = api.create_commit(repo, add("a"), commit_message="x", parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        api.create_commit(repo, add("b"), commit_message="x", parent_commit=first)
    assert caught.value.response.status_code == 412
    assert hub.history(repo) == [first, second.oid]


def test_of_concurrent_commits_on_one_parent_one_lands(hub, api, repo, monkeypatch):
    parent, outcomes = hub.main[repo], []

    def changed_slowly(*args, real=loopback_hub_routes.changed):
        time.sleep(0.05)
        return real(*args)

    monkeypatch.setattr(loopback_hub_routes, "changed", changed_slowly)

    def push(i):
        try:
            outcomes.append(api.create_commit(repo, add(f"{i}"), commit_message="x", parent_commit=parent).oid)
        except HfHubHTTPError as error:
            outcomes.append(error.response.status_code)

    threads = [threading.Thread(target=push, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(412) == 5
    assert hub.history(repo) == [parent, *(outcome for outcome in outcomes if outcome != 412)]


def test_pull_request(hub, api, repo):
    base = hub.main[repo]
    hub.commit(repo, {})
    operations = add("model.safetensors", b"better")
    done = HfApi(token="hf_bob").create_commit(
        repo, operations, commit_message="x", create_pr=True, parent_commit=base
    )
    assert (done.pr_num, done.pr_revision) == (1, "refs/pr/1")
    assert hub.files(repo) == {}
    assert hub.files(repo, "refs/pr/1") == {**FILES, "model.safetensors": b"better"}
    assert api.model_info(repo, revision="refs/pr/1").sha == done.oid
    more = api.create_commit(repo, add("more"), commit_message="x", revision="refs/pr/1")
    assert hub.files(repo, "refs/pr/1") == hub.files(repo, more.oid)
    assert hub.history(repo, "refs/pr/1") == [base, done.oid, more.oid]
    assert len(hub.history(repo)) == 2
    second = api.create_commit(repo, add("x"), commit_message="x", create_pr=True)
    assert second.pr_num == 2
    assert hub.files(repo, "refs/pr/2") == {"x": b"new"}


def test_model_push_loads_again(hub, api, tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3)
    model = ResNetForImageClassification(config)
    model.push_to_hub("alice/resnet", token="hf_alice", private=True)
    assert hub.private >= {"alice/resnet"}
    loaded = ResNetForImageClassification.from_pretrained("alice/resnet", token="hf_alice", cache_dir=tmp_path)
    assert all((a == b).all() for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    model.save_pretrained(tmp_path / "saved")
    assert hub.files("alice/resnet")["model.safetensors"] == (tmp_path / "saved/model.safetensors").read_bytes()
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("alice/resnet")


def test_card_push(hub, api, repo):
    card = ModelCard("---\nlicense: apache-2.0\n---\n# Purified\n")
    card.push_to_hub(repo, token="hf_alice")
    assert hub.files(repo) == {**FILES, "README.md": str(card).encode()}
    assert ModelCard.load(repo).data.license == "apache-2.0"
    with pytest.raises(ValueError, match="expected a mapping"):
        api.create_commit(repo, add("README.md", b"---\n- a\n---\n"), commit_message="x")


def test_create_repo(hub, api, repo):
    with pytest.raises(HfHubHTTPError, match="already created") as caught:
        api.create_repo(repo)
    assert caught.value.response.status_code == 409
    assert api.create_repo(repo, exist_ok=True, private=True).repo_id == repo
    assert repo not in hub.private
    url = api.create_repo("of-mine", repo_type="dataset", private=True)
    assert (url.repo_id, url.repo_type) == ("alice/of-mine", "dataset")
    assert "datasets/alice/of-mine" in hub.private


# What the Hub says about a repo


def test_model_info(hub, api, repo):
    hub.private.add(repo)
    info = api.model_info(repo, files_metadata=True)
    assert (info.id, info.sha, info.private, info.gated) == (repo, hub.main[repo], True, False)
    assert (info.tags, info.library_name, info.card_data.license) == (["purified"], "transformers", "mit")
    siblings = {sibling.rfilename: sibling for sibling in info.siblings}
    assert {name: sibling.size for name, sibling in siblings.items()} == {n: len(d) for n, d in FILES.items()}
    config, weights = siblings["config.json"], siblings["model.safetensors"]
    assert (config.blob_id, config.lfs) == (hashlib.sha1(b"blob 9\0" + FILES["config.json"]).hexdigest(), None)
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(WEIGHTS)}\n".encode()
    assert weights.blob_id == hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
    assert weights.lfs["sha256"] == digest
    assert {sibling.size for sibling in api.model_info(repo).siblings} == {None}


def test_revisions(hub, api, repo):
    first = hub.main[repo]
    second = hub.commit(repo, {"only": b""})
    assert api.model_info(repo).sha == second
    assert [sibling.rfilename for sibling in api.model_info(repo, revision=first).siblings] == sorted(FILES)
    for revision in ("v1", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            api.model_info(repo, revision=revision)


def test_paths_info(api, repo):
    file, folder = api.get_paths_info(repo, ["model.safetensors", "sub", "absent"])
    assert (file.size, file.lfs.sha256) == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    assert folder.path == "sub"


# Tokens


def test_whoami(api):
    assert api.whoami()["name"] == "alice"
    assert api.whoami(token="hf_alice_reads")["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as caught:
        api.whoami(token="hf_nobody")
    assert caught.value.response.status_code == 401


def test_public_repo_needs_no_token_but_refuses_a_bad_one(hub, api, repo, tmp_path):
    def pull(token):
        return Path(hf_hub_download(repo, "config.json", token=token, cache_dir=tmp_path / str(token))).read_bytes()

    assert pull(False) == pull("hf_bob") == FILES["config.json"]
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
        api.model_info(repo, token="hf_nobody")
    assert caught.value.response.status_code == 401
    assert type(caught.value) is HfHubHTTPError
    hub.reset()  # no users: tokens are not looked at
    assert api.model_info(repo, token="hf_nobody").id == repo


@pytest.mark.parametrize(
    ("token", "status"), [(False, 401), ("hf_nobody", 401), ("hf_alice_reads", 403), ("hf_bob", 403)]
)
@pytest.mark.parametrize("path", ["a.txt", "a.safetensors"])
def test_push_without_the_right(hub, api, repo, token, status, path):
    calls = [
        lambda: api.create_commit(repo, add(path), commit_message="x", token=token),
        lambda: api.create_repo("alice/never", token=token),
    ]
    for call in calls:
        with pytest.raises(HfHubHTTPError) as caught:
            call()
        assert caught.value.response.status_code == status
    assert hub.files(repo) == FILES
    assert "alice/never" not in hub.commits


def test_private(hub, api, repo, tmp_path):
    hub.private.add(repo)
    for token in (False, "hf_bob"):
        with pytest.raises(RepositoryNotFoundError) as caught:
            api.model_info(repo, token=token)
        assert caught.value.response.status_code == 404
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(repo, "config.json", token=token, cache_dir=tmp_path)
        with pytest.raises(RepositoryNotFoundError):
            list(api.list_repo_tree(repo, token=token))
    hub.allowed.add(("bob", repo))
    for token in ("hf_bob", "hf_alice_reads"):
        assert read(snapshot_download(repo, token=token, cache_dir=tmp_path / token)) == FILES


def test_gated(hub, api, repo, tmp_path):
    hub.gated.add(repo)
    for token, status in ((False, 401), ("hf_bob", 403)):
        assert api.model_info(repo, token=token).gated == "auto"
        with pytest.raises(GatedRepoError) as caught:
            hf_hub_download(repo, "config.json", token=token, cache_dir=tmp_path)
        assert caught.value.response.status_code == status
    hub.allowed.add(("bob", repo))
    assert read(snapshot_download(repo, token="hf_bob", cache_dir=tmp_path)) == FILES


# LFS from another origin


@pytest.mark.parametrize("whole", [False, True])
def test_no_token_goes_to_the_other_origin(hub, api, repo, tmp_path, whole):
    hub.cdn = True
    hub.private.add(repo)
    if whole:
        assert read(snapshot_download(repo, token="hf_alice", cache_dir=tmp_path)) == FILES
    else:
        path = hf_hub_download(repo, "model.safetensors", token="hf_alice", cache_dir=tmp_path)
        assert Path(path).read_bytes() == WEIGHTS
    hosts = {request.headers["host"]: "authorization" in request.headers for request in hub.requests}
    assert hosts == {hub.endpoint[7:]: True, hub.other_origin[7:]: False}
    assert [request.status for request in asked(hub, "GET", "/cdn/")] == [200]


# HTTP


def test_one_connection_carries_all_kinds_of_answers(hub, api, repo):
    connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"))
    url = f"/{repo}/resolve/main/model.safetensors"
    seen = []
    for method, path, headers in [
        ("HEAD", url, {"Range": "bytes=0-4"}),
        ("GET", url, {}),
        ("GET", url, {"Range": "bytes=10-19"}),
        ("GET", url, {"range": "bytes=255990-"}),
        ("GET", url, {"Range": "bytes=-3"}),
        ("GET", url, {"Range": "bytes=256000-"}),
        ("GET", "/nothing/here", {}),
        ("HEAD", f"/{repo}/resolve/main/absent", {}),
    ]:
        connection.request(method, path, headers=headers)
        connection.sock.settimeout(5)
        sock = connection.sock
        answer = connection.getresponse()
        body = answer.read()
        assert connection.sock is sock
        assert method == "HEAD" or int(answer.headers["Content-Length"]) == len(body)
        seen.append((answer.status, answer.headers["Content-Range"], body if len(body) < 99 else len(body)))
    connection.close()
    assert [status for status, _, _ in seen] == [200, 200, 206, 206, 206, 416, 404, 404]
    assert [body for _, _, body in seen[:5]] == [b"", 256000, WEIGHTS[10:20], WEIGHTS[-10:], WEIGHTS[-3:]]
    assert [content_range for _, content_range, _ in seen[2:6]] == [
        "bytes 10-19/256000",
        "bytes 255990-255999/256000",
        "bytes 255997-255999/256000",
        "bytes */256000",
    ]


# Faults, as the client sees them


def download(repo: str, folder: Path, name: str = "model.safetensors") -> bytes:
    return Path(hf_hub_download(repo, name, cache_dir=folder)).read_bytes()


def test_status_with_headers_and_times(hub, api, repo):
    hub.fault("GET /api/models/", status=429, headers={"Retry-After": "7"}, times=2)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError) as caught:
            api.model_info(repo)
        assert (caught.value.response.status_code, caught.value.response.headers["Retry-After"]) == (429, "7")
    assert api.model_info(repo).id == repo
    assert [request.status for request in hub.requests] == [429, 429, 200]


def test_fault_for_ever(hub, api, repo):
    hub.fault("GET /api/models/", status=500, times=None)
    for _ in range(5):
        with pytest.raises(HfHubHTTPError):
            api.model_info(repo)


@pytest.mark.parametrize(("fault", "error"), [({}, httpx.RemoteProtocolError), ({"reset": True}, httpx.ReadError)])
def test_drop(hub, api, repo, fault, error):
    hub.fault("GET /api/models/", drop=True, **fault)
    with pytest.raises(error):
        api.model_info(repo)
    assert [request.status for request in hub.requests] == [0]


def test_cut_body_is_asked_for_again(hub, api, repo, tmp_path):
    hub.fault("GET .*model.safetensors", cut=1000)
    assert download(repo, tmp_path) == WEIGHTS
    assert len(asked(hub, "GET", "model.safetensors")) == 2


def test_cut_body_is_resumed(hub, api, repo, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    hub.fault("GET .*model.safetensors", cut=200_000)
    assert download(repo, tmp_path) == WEIGHTS
    first, second = asked(hub, "GET", "model.safetensors")
    assert (first.status, second.status, second.headers["range"]) == (200, 206, f"bytes={3 << 16}-")


def test_reset_in_mid_body(hub, api, repo, tmp_path):
    hub.fault("GET .*model.safetensors", reset=True)
    with pytest.raises(httpx.ReadError):
        download(repo, tmp_path)
    assert [request.status for request in asked(hub, "GET", "model.safetensors")] == [200]
    assert download(repo, tmp_path) == WEIGHTS


def test_corrupt_byte_is_accepted_by_the_client(hub, api, repo, tmp_path):
    hub.fault("GET .*model.safetensors", corrupt=True)
    data = download(repo, tmp_path)
    assert len(data) == len(WEIGHTS)
    assert [i for i in range(len(data)) if data[i] != WEIGHTS[i]] == [len(data) - 1]
    [bad] = api.verify_repo_checksums(repo, cache_dir=tmp_path).mismatches
    assert bad["path"] == "model.safetensors"


def test_slow(hub, api, repo):
    hub.fault("GET /api/models/", slow=0.3)
    with pytest.raises(httpx.ReadTimeout):
        api.model_info(repo, timeout=0.05)
    hub.fault("GET /api/models/", slow=0.1)
    start = time.monotonic()
    assert api.model_info(repo).id == repo
    assert time.monotonic() - start > 0.1


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"status": 502}, HfHubHTTPError),
        ({"drop": True}, httpx.RemoteProtocolError),
        ({"drop": True, "reset": True}, httpx.ReadError),
    ],
)
def test_commit_whose_answer_is_lost(hub, api, repo, fault, error, after):
    hub.fault("POST .*/commit/main", after=after, **fault)
    with pytest.raises(error):
        api.create_commit(repo, add("a"), commit_message="x")
    assert len(asked(hub, "POST", "/commit/main")) == 1
    assert ("a" in hub.files(repo)) == after
    assert len(hub.history(repo)) == 1 + after


def test_upload_is_tried_again(hub, api, repo):
    """Also when the file went up and only the answer was lost."""
    hub.fault("POST .*/preupload/", status=503)
    hub.fault("PUT /lfs/", status=500)
    hub.fault("PUT /lfs/", drop=True, after=True)
    hub.fault("POST .*/verify", status=503)
    api.create_commit(repo, add("b.safetensors", WEIGHTS[1:]), commit_message="x")
    assert hub.files(repo)["b.safetensors"] == WEIGHTS[1:]
    assert len(asked(hub, "PUT", "/lfs/")) == 3


def test_upload_that_was_mangled_is_refused(hub, api, repo):
    batch = {"objects": [{"oid": "0" * 64, "size": 3}], "ref": {"name": "main"}}
    headers = {"Authorization": "Bearer hf_alice"}
    url = f"{hub.endpoint}/{repo}.git/info/lfs/objects/batch"
    [entry] = httpx.post(url, json=batch, headers=headers, trust_env=False).json()["objects"]
    assert httpx.put(entry["actions"]["upload"]["href"], content=b"abc", trust_env=False).status_code == 400
    verify = entry["actions"]["verify"]["href"]
    asked = {"oid": "0" * 64, "size": 3}
    assert httpx.post(verify, json=asked, headers=headers, trust_env=False).status_code == 404


def test_fault_that_does_nothing_is_refused():
    with pytest.raises(ValueError, match="does nothing"):
        Fault("GET", after=True)


# Datasets


@pytest.fixture
def digits(hub, api, request, monkeypatch, tmp_path) -> str:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    name = own_name(request)
    hub.commit(f"datasets/{name}", parquet([0, 1, 2]))
    return name


def parquet(labels: list[int]) -> dict[str, bytes]:
    buffer = io.BytesIO()
    datasets.Dataset.from_dict({"label": labels}).to_parquet(buffer)
    return {"data/train-00000-of-00001.parquet": buffer.getvalue()}


@pytest.mark.parametrize("cdn", [False, True])
def test_load_dataset(hub, digits, tmp_path, cdn):
    hub.cdn = cdn
    first = hub.main[f"datasets/{digits}"]
    hub.commit(f"datasets/{digits}", parquet([7, 8]))
    assert datasets.load_dataset(digits, split="train")["label"][:] == [7, 8]
    assert datasets.load_dataset(digits, split="train", revision=first)["label"][:] == [0, 1, 2]
    assert [row["label"] for row in datasets.load_dataset(digits, split="train", streaming=True)] == [7, 8]


def test_load_private_dataset(hub, digits):
    hub.private.add(f"datasets/{digits}")
    with pytest.raises(datasets.exceptions.DatasetNotFoundError):
        datasets.load_dataset(digits)
    assert datasets.load_dataset(digits, token="hf_alice")["train"].num_rows == 3


def test_push_dataset(hub, api):
    pushed = datasets.Dataset.from_dict({"label": [4, 5]})
    pushed.push_to_hub("alice/pushed", token="hf_alice")
    assert datasets.load_dataset("alice/pushed", split="train")["label"][:] == [4, 5]
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("alice/pushed", "absent", repo_type="dataset")
