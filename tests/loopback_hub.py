"""A Hugging Face Hub on 127.0.0.1, in memory, standard library only: what the client needs to pull, and faults.

Its answers follow the source of huggingface_hub 2.4; that the real Hub answers the same way is not proven here.
"""

import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_LFS_SUFFIXES = (".safetensors", ".bin", ".parquet")
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?")
_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /path" matches `pattern`."""

    pattern: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    corrupt: bool = False
    drop: bool = False


@dataclass
class Request:
    """One line of the request log."""

    method: str
    path: str
    headers: dict[str, str]
    status: int


class HubError(Exception):
    """An answer with a status and the `X-Error-Code` by which the client tells errors apart."""

    def __init__(self, code: str, headers: dict[str, str] | None = None):
        super().__init__(code)
        self.headers = {"X-Error-Code": code, **(headers or {})}


class LoopbackHub:
    """Repos by name (`owner/name`, `datasets/owner/name`), each with commits (sha -> files) and the branch `main`."""

    def __init__(self, repos: dict[str, dict[str, bytes]]):
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.main: dict[str, str] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        for name, files in repos.items():
            self.commit(name, files)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Make `files` the whole content of `main`; returns the commit. Earlier commits stay."""
        commits = self.commits.setdefault(repo, {})
        listing = "".join(f"{name}{git_oid(data)}" for name, data in sorted(files.items()))
        sha = hashlib.sha1(f"{repo}{len(commits)}{listing}".encode()).hexdigest()
        commits[sha] = files
        self.main[repo] = sha
        return sha

    def fault(self, pattern: str, **fault) -> None:
        """Add a `Fault`; earlier ones come first."""
        self.faults.append(Fault(pattern, **fault))

    def reset(self) -> None:
        """Forget faults and the request log, not the repos."""
        self.faults.clear()
        self.requests.clear()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def take_fault(self, method: str, path: str) -> Fault:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, f"{method} {path}"):
                    fault.times -= 1
                    return fault
        return Fault("")

    def files_at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """The commit that `revision` is, and its files."""
        if repo not in self.commits:
            raise HubError("RepoNotFound")
        sha = self.main[repo] if revision == "main" else revision
        if sha not in self.commits[repo]:
            raise HubError("RevisionNotFound")
        return sha, self.commits[repo][sha]


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"  # keep-alive: each answer carries its exact length

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.take_fault(self.command, path)
        if fault.drop:
            self.hub.requests.append(Request(self.command, path, dict(self.headers), 0))
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status, headers, body = self.answer(path)
        if fault.status is not None:
            status, headers, body = fault.status, {"Content-Type": "application/json"}, b"{}"
        if fault.corrupt:
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.hub.requests.append(Request(self.command, path, dict(self.headers), status))
        self.send(status, headers | fault.headers, body)

    do_HEAD = do_GET

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        try:
            if match := _API.fullmatch(path):
                return 200, {"Content-Type": "application/json"}, json.dumps(self.api(*match.groups())).encode()
            if match := _RESOLVE.fullmatch(path):
                return 200, *self.resolve(*match.groups())
            raise HubError("NoSuchRoute")
        except HubError as error:
            return 404, error.headers, b"{}"

    def api(self, kind: str, name: str, what: str | None, revision: str | None, folder: str | None):
        repo = name if kind == "models" else f"{kind}/{name}"
        sha, files = self.hub.files_at(repo, revision or "main")
        if what == "tree":
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
            return tree(files, folder, recursive=recursive)
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {"id": name, "sha": sha, "siblings": siblings, "tags": [], "private": False, "gated": False}

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> tuple[dict[str, str], bytes]:
        sha, files = self.hub.files_at(f"{kind or ''}{name}", revision)
        if path not in files:
            raise HubError("EntryNotFound", {"X-Repo-Commit": sha})
        data = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{git_oid(data)}"'}
        if path.endswith(_LFS_SUFFIXES):
            digest = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        return headers, data

    def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        """Keep the test output clean; `LoopbackHub.requests` is the log."""


def tree(files: dict[str, bytes], folder: str | None, *, recursive: bool) -> list[dict]:
    """The entries of `folder` (None: the root) as `list_repo_tree` expects them."""
    prefix = f"{folder}/" if folder else ""
    inside = {path: data for path, data in sorted(files.items()) if path.startswith(prefix)}
    if folder and not inside:
        raise HubError("EntryNotFound")
    entries, folders = [], set()
    for path, data in inside.items():
        parents = path.removeprefix(prefix).split("/")[:-1]
        folders |= {
            prefix + "/".join(parents[: i + 1]) for i in range(len(parents) if recursive else min(len(parents), 1))
        }
        if recursive or not parents:
            entries.append(tree_file(path, data))
    return entries + [{"type": "directory", "path": path, "oid": git_oid(path.encode())} for path in sorted(folders)]


def tree_file(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
    if path.endswith(_LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def git_oid(data: bytes) -> str:
    """The sha1 by which git names a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
