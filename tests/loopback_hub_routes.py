"""The routes of the loopback Hub: what it answers to each request of huggingface_hub 2.4."""

import base64
import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from urllib.parse import parse_qs, unquote

import yaml
from loopback_hub_repos import (
    GITATTRIBUTES,
    Files,
    HubError,
    file_entry,
    folder_entry,
    git_oid,
    is_lfs,
    sha256,
    sibling,
    tree,
)

_CARD = re.compile(r"\s*---\s*\n(.*?)\n---\s*(?:\n|$)", re.DOTALL)
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass
class Call:
    """A request: its path as it was sent (quoted), its whole body, and the token it was found to carry."""

    method: str
    path: str
    query: dict[str, str]
    headers: Message  # case does not matter
    body: bytes
    token: str | None = None


@dataclass
class Answer:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def answer(hub, call: Call) -> Answer:
    """Carry out `call`: as a whole or not at all, one at a time."""
    method = "GET" if call.method == "HEAD" else call.method
    try:
        with hub.lock:
            for verb, pattern, route in _ROUTES:
                if verb == method and (match := pattern.fullmatch(call.path)):
                    if route not in (storage_get, storage_put):  # signed addresses: no token is needed, or looked at
                        call.token = hub.token_of(call.headers.get("Authorization"))
                    return route(hub, call, *[text and unquote(text) for text in match.groups()])
        raise HubError(404, f"The loopback Hub has no route for {call.method} {call.path}")
    except HubError as error:
        return as_json({"error": error.message}, error.status, error.headers)


def as_json(data, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    body = json.dumps(data, default=str).encode()
    return Answer(status, {"Content-Type": "application/json", **(headers or {})}, body)


# Reading


def whoami(hub, call: Call) -> Answer:
    user = hub.check_login(call.token)
    role = "read" if call.token in hub.readers else "write"
    auth = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": role}}
    return as_json({"type": "user", "name": user, "fullname": user, "orgs": [], "auth": auth})


def info(hub, call: Call, kind: str, name: str, revision: str | None) -> Answer:
    repo = repo_of(kind, name)
    hub.check_found(repo, call.token)
    sha, files = hub.files_at(repo, revision or "main")
    detailed = call.query.get("blobs", "").lower() in ("1", "true")
    siblings = [sibling(path, files[path]) if detailed else {"rfilename": path} for path in sorted(files)]
    card = {}
    with suppress(ValueError):  # such a card can be there already; only a push of it is refused
        card = front_matter(files.get("README.md", b"").decode())
    return as_json(
        {
            "id": name,
            "author": name.split("/")[0],
            "sha": sha,
            "siblings": siblings,
            "private": repo in hub.private,
            "gated": "auto" if repo in hub.gated else False,
            "tags": card.get("tags") or [],
            "cardData": card,
            **{key: card[key] for key in ("library_name", "pipeline_tag") if key in card},
        }
    )


def list_tree(hub, call: Call, kind: str, name: str, revision: str, folder: str | None) -> Answer:
    hub.check_found(repo_of(kind, name), call.token)
    _, files = hub.files_at(repo_of(kind, name), revision)
    return as_json(tree(files, folder, recursive=call.query.get("recursive", "").lower() == "true"))


def paths_info(hub, call: Call, kind: str, name: str, revision: str) -> Answer:
    """Absent paths are left out. The body is a form, not JSON."""
    hub.check_found(repo_of(kind, name), call.token)
    _, files = hub.files_at(repo_of(kind, name), revision)
    entries = []
    for path in parse_qs(call.body.decode()).get("paths", []):
        if path in files:
            entries.append(file_entry(path, files[path]))
        elif any(other.startswith(f"{path}/") for other in files):
            entries.append(folder_entry(path))
    return as_json(entries)


def resolve(hub, call: Call, prefix: str | None, name: str, revision: str, path: str) -> Answer:
    """A file; with `hub.cdn` an LFS file is elsewhere, and the client takes the metadata from the redirect."""
    repo = f"{prefix or ''}{name}"
    hub.check_found(repo, call.token)
    sha, files = hub.files_at(repo, revision)
    hub.check_terms(repo, call.token)
    if path not in files:
        raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": sha})
    data = files[path]
    headers = {"X-Repo-Commit": sha, "ETag": f'"{git_oid(data)}"'}
    if is_lfs(path, len(data)):
        headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data)), "ETag": f'"{sha256(data)}"'}
        if hub.cdn:
            return Answer(302, headers | {"Location": f"{hub.storage}/cdn/{repo}/{sha256(data)}"})
    return ranged(call, headers, data)


def storage_get(hub, call: Call, repo: str, digest: str) -> Answer:
    return ranged(call, {"ETag": f'"{digest}"'}, stored(hub, repo, digest))


def ranged(call: Call, headers: dict[str, str], data: bytes) -> Answer:
    """`data`, or the one range of it that is asked for."""
    match = _RANGE.fullmatch(call.headers.get("Range", ""))
    if call.method == "HEAD" or match is None:
        return Answer(200, headers, data)
    first, last = match.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        return Answer(416, headers | {"Content-Range": f"bytes */{len(data)}"})
    return Answer(206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop])


# Writing


def create_repo(hub, call: Call) -> Answer:
    asked = json.loads(call.body)
    user = hub.check_login(call.token)
    name = f"{asked.get('organization') or user}/{asked['name']}"
    repo = repo_of(f"{asked.get('type') or 'model'}s", name)
    hub.check_write(repo, call.token)
    url = f"{hub.endpoint}/{repo}"
    if repo in hub.commits:
        return as_json({"error": "You already created this repo", "url": url}, 409)
    hub.commit(repo, {".gitattributes": GITATTRIBUTES}, message="initial commit")
    if asked.get("visibility") == "private":
        hub.private.add(repo)
    return as_json({"url": url, "name": name})


def preupload(hub, call: Call, kind: str, name: str, revision: str) -> Answer:
    """How each file is to be sent. `oid` is what is there now: without it each push would be a new commit."""
    hub.check_login(call.token)
    hub.check_found(repo_of(kind, name), call.token)
    _, files = hub.files_at(repo_of(kind, name), revision)
    modes = []
    for path, size in ((file["path"], file["size"]) for file in json.loads(call.body)["files"]):
        mode = {"path": path, "uploadMode": "lfs" if is_lfs(path, size) else "regular", "shouldIgnore": False}
        if path in files:
            data = files[path]
            mode["oid"] = sha256(data) if is_lfs(path, len(data)) else git_oid(data)
        modes.append(mode)
    return as_json({"files": modes})


def lfs_batch(hub, call: Call, prefix: str | None, name: str) -> Answer:
    """Where to send what; nowhere if it is there. A PR is known by the lack of a `ref`."""
    repo = f"{prefix or ''}{name}"
    asked = json.loads(call.body)
    hub.check_found(repo, call.token)
    hub.check_write(repo, call.token, as_pull_request="ref" not in asked)
    objects = []
    for wanted in asked["objects"]:
        entry = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in hub.objects[repo]:
            upload = {"href": f"{hub.storage}/lfs/{repo}/{wanted['oid']}", "header": {}}
            verify = {"href": f"{hub.endpoint}/{repo}.git/info/lfs/verify", "header": {}}
            entry["actions"] = {"upload": upload, "verify": verify}
        objects.append(entry)
    return as_json({"transfer": "basic", "objects": objects})


def storage_put(hub, call: Call, repo: str, digest: str) -> Answer:
    if repo not in hub.objects or sha256(call.body) != digest:
        raise HubError(400, f"{len(call.body)} bytes that are not {digest}")
    hub.objects[repo][digest] = call.body
    return Answer()


def lfs_verify(hub, call: Call, prefix: str | None, name: str) -> Answer:
    asked = json.loads(call.body)
    if len(stored(hub, f"{prefix or ''}{name}", asked["oid"])) != asked["size"]:
        raise HubError(422, f"{asked['oid']} has another size")
    return Answer()


def commit(hub, call: Call, kind: str, name: str, revision: str) -> Answer:
    """A commit on a branch, whose head must be `parentCommit` if that is given; or a PR, on top of it."""
    repo = repo_of(kind, name)
    as_pull_request = call.query.get("create_pr") == "1"
    hub.check_found(repo, call.token)
    hub.check_write(repo, call.token, as_pull_request=as_pull_request)
    header, *changes = [(line["key"], line["value"]) for line in map(json.loads, call.body.splitlines())]
    parent = header[1].get("parentCommit")
    head, _ = hub.files_at(repo, revision)
    if revision not in hub.branches[repo]:
        raise HubError(400, f"{revision} is no branch")
    if parent not in (None, head) and not as_pull_request:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    base, files = hub.files_at(repo, parent or head)
    files = changed(files, changes, hub.objects[repo])
    branch = hub.open_pull_request(repo, base) if as_pull_request else revision
    sha = hub.commit(repo, files, branch=branch, message=header[1]["summary"])
    urls = {"commitUrl": f"{hub.endpoint}/{repo}/commit/{sha}"}
    if as_pull_request:
        urls["pullRequestUrl"] = f"{hub.endpoint}/{repo}/discussions/{branch.rsplit('/')[-1]}"
    return as_json({"success": True, "commitOid": sha, **urls})


def changed(files: Files, changes: list[tuple[str, dict]], objects: dict[str, bytes]) -> Files:
    """`files` after the lines of a commit."""
    files = dict(files)
    for key, value in changes:
        path = value["path"]
        if key == "file":
            files[path] = base64.b64decode(value["content"], validate=True)
        elif key == "lfsFile":
            if value["oid"] not in objects:
                raise HubError(422, f"{path}: {value['oid']} was never uploaded")
            files[path] = objects[value["oid"]]
        elif key in ("deletedFile", "deletedFolder"):
            folder = f"{path.rstrip('/')}/"
            gone = [file for file in files if (file == path if key == "deletedFile" else file.startswith(folder))]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            files = {file: data for file, data in files.items() if file not in gone}
        else:
            raise HubError(400, f"Unknown operation {key}")
    return files


def validate_yaml(hub, call: Call) -> Answer:
    try:
        front_matter(json.loads(call.body)["content"])
    except ValueError as error:
        return as_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return as_json({"errors": [], "warnings": []})


def front_matter(card: str) -> dict:
    """The metadata of a card; `ValueError` if it is no YAML mapping."""
    match = _CARD.match(card)
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        raise ValueError(f"YAML metadata: {error}") from error
    if not isinstance(metadata, dict | None):
        raise ValueError("YAML metadata: expected a mapping.")
    return metadata or {}


def stored(hub, repo: str, digest: str) -> bytes:
    if digest not in hub.objects.get(repo, {}):
        raise HubError(404, f"{repo} has no object {digest}")
    return hub.objects[repo][digest]


def repo_of(kind: str, name: str) -> str:
    return name if kind == "models" else f"{kind}/{name}"


_API = "/api/(models|datasets|spaces)/([^/]+/[^/]+)"
_SITE = r"/(datasets/|spaces/)?([^/]+/[^/]+?)"
_ROUTES = [
    (verb, re.compile(pattern), route)
    for verb, pattern, route in [
        ("GET", "/api/whoami-v2", whoami),
        ("GET", f"{_API}(?:/revision/([^/]+))?", info),
        ("GET", f"{_API}/tree/([^/]+)(?:/(.+))?", list_tree),
        ("POST", f"{_API}/paths-info/([^/]+)", paths_info),
        ("GET", f"{_SITE}/resolve/([^/]+)/(.+)", resolve),
        ("GET", "/cdn/(.+)/([0-9a-f]{64})", storage_get),
        ("POST", "/api/repos/create", create_repo),
        ("POST", "/api/validate-yaml", validate_yaml),
        ("POST", f"{_API}/preupload/([^/]+)", preupload),
        ("POST", rf"{_SITE}\.git/info/lfs/objects/batch", lfs_batch),
        ("PUT", "/lfs/(.+)/([0-9a-f]{64})", storage_put),
        ("POST", rf"{_SITE}\.git/info/lfs/verify", lfs_verify),
        ("POST", f"{_API}/commit/([^/]+)", commit),
    ]
]
