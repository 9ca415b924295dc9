"""What can go wrong at each step of a pull and a push, and how it must end."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import loopback_hub_routes as routes
import pytest
import torch
from hostile import CARD, CONFIG, DIFFERS, PROCESSOR, WEIGHTS, card
from huggingface_hub.utils import httpx
from safetensors.torch import save_file

from hf_tsc.folders import sha256

REPORT = "tsc_report.json"
SILENT = "X-Silent"  # an answer with this header does not reach the client, which waits for it


KINDS: dict[str, dict[str, Any]] = {
    "status 500": {"status": 500},
    "status 503": {"status": 503},
    "status 408": {"status": 408},
    "status 429, Retry-After 7": {"status": 429, "headers": {"Retry-After": "7"}},
    "connection closed": {"drop": True},
    "no answer": {"status": 503, "headers": {SILENT: "yes"}},
    "slow": {"slow": 0.05},
    "body cut short": {"cut": 5},
    "connection reset in the body": {"reset": True, "cut": 5},
    "last byte damaged": {"corrupt": True},
    "done, then status 503": {"after": True, "status": 503},
    "done, then connection closed": {"after": True, "drop": True},
    "done, then no answer": {"headers": {SILENT: "yes"}},
}
DAMAGED = "last byte damaged"
SPOILT = {"body cut short", "connection reset in the body", DAMAGED}  # less an answer without a body
LOST = {kind for kind in KINDS if kind.startswith("done, then")}
PULL = {
    "info": "GET /api/models/{repo}$",
    "list of files": "GET /api/models/{repo}/tree/",
    "file, its header": "HEAD /{repo}/resolve/.*/" + WEIGHTS,
    "file": "GET /cdn/{repo}/",
}
PUSH = {
    "info": "GET /api/models/{repo}$",
    "new repo": "POST /api/repos/create",
    "check of the card": "POST /api/validate-yaml",
    "preupload": "POST /api/models/{repo}/preupload/",
    "LFS, where to": "POST /{repo}.git/info/lfs/objects/batch",
    "LFS, upload": "PUT /lfs/{repo}/",
    "LFS, check": "POST /{repo}.git/info/lfs/verify",
    "commit": "POST /api/models/{repo}/commit/",
    "file, read back": "GET /cdn/{repo}/",
}


@dataclass(frozen=True)
class Done:
    """The whole thing is done, and only once; `again`: something was asked for again."""

    again: bool


@dataclass(frozen=True)
class Fails:
    """One error of one line that holds `says`; the user may try again."""

    says: str


Fate = Done | Fails | None  # None: it cannot happen there
AT_ONCE, AGAIN, NEVER = Done(again=False), Done(again=True), None
DIFFERENT = Fails(DIFFERS)
ANY_STEP, ANY_KIND = {*PULL, *PUSH}, set(KINDS)
# Steps, kinds, and how it ends if the fault happens once, or from then on. The first that fits holds.
FATES: list[tuple[set[str], set[str], Fate, Fate]] = [
    ({"file, its header", "LFS, upload", "LFS, check"}, SPOILT, NEVER, NEVER),  # answers without a body
    (ANY_STEP, {"slow"}, AT_ONCE, AT_ONCE),
    ({"file"}, {DAMAGED}, DIFFERENT, DIFFERENT),
    ({"commit"}, SPOILT | LOST, AT_ONCE, AT_ONCE),  # it is looked up whether the commit was made
    ({"LFS, upload"}, LOST, AGAIN, AGAIN),  # it is looked up whether the file is there
    ({"LFS, check"}, ANY_KIND, AGAIN, AGAIN),  # the same; and the file is read back later
    ({"file, read back"}, {DAMAGED}, AGAIN, Fails("is not what was sent")),
    (ANY_STEP, ANY_KIND, AGAIN, Fails("Could not")),
]


def fate(step: str, kind: str, *, once: bool) -> Fate:
    """How a pull or push must end."""
    return next(first if once else ever for steps, kinds, first, ever in FATES if step in steps and kind in kinds)


def finished(folder: Path, repo_id: str | None = "suspect/model", value: float = 1.0) -> Path:
    """What `purify` writes, with weights of almost nothing; another value makes all files others."""
    folder.mkdir(parents=True)
    save_file({"bias": torch.full((8,), value)}, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps({"model_type": "vit", "value": value}))
    (folder / PROCESSOR).write_text(json.dumps({"value": value}))
    (folder / CARD).write_text(card("license: mit") + f"\n{value}\n")
    report = {"suspect": {"repo_id": repo_id}, "purified": {"files": {WEIGHTS: sha256(folder / WEIGHTS)}}}
    (folder / REPORT).write_text(json.dumps(report))
    return folder


def no_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let waits take no time; returns them, in seconds, those of the client and ours."""
    waits: list[float] = []
    clock = SimpleNamespace(sleep=waits.append, time=time.time)
    monkeypatch.setattr("hf_tsc.hub.retry.sleep", waits.append)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    monkeypatch.setattr("huggingface_hub.file_download.time", clock)
    return waits


def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an answer with the header `SILENT` time out at once, if its request has a limit, or fail the test."""

    def handle_request(self: Any, request: Any, real: Any = httpx.HTTPTransport.handle_request) -> Any:
        response = real(self, request)
        if SILENT not in response.headers:
            return response
        response.close()
        assert request.extensions["timeout"]["read"] is not None, f"{request} would be waited for without end"
        raise httpx.ReadTimeout("silent", request=request)

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", handle_request)


def requests_without_a_limit(monkeypatch: pytest.MonkeyPatch, *, refuse: str) -> list[str]:
    """The requests that would be waited for without end; the first of each that fits `refuse` is refused."""
    found: list[str] = []
    refused: set[str] = set()

    def handle_request(self: Any, request: Any, real: Any = httpx.HTTPTransport.handle_request) -> Any:
        line = f"{request.method} {request.url.path}"
        if request.extensions["timeout"]["read"] is None:
            found.append(line)
        if re.search(refuse, line) and line not in refused:
            refused.add(line)
            raise httpx.ConnectError("refused", request=request)
        return real(self, request)

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", handle_request)
    return found


def replace_route(monkeypatch: pytest.MonkeyPatch, name: str, route: Any) -> None:
    """Let the loopback Hub answer otherwise."""
    old = getattr(routes, name)
    changed = [(verb, pattern, route if it is old else it) for verb, pattern, it in routes._ROUTES]
    monkeypatch.setattr(routes, "_ROUTES", changed)
