"""A Hugging Face Hub on 127.0.0.1, in memory: what the client needs to pull and push, and all that can go wrong.

Repos are in `loopback_hub_repos`, answers in `loopback_hub_routes`; here are the server, its log and its faults. Only
the standard library is used, and PyYAML for model cards. The answers follow the source of huggingface_hub 2.4; that
the real Hub answers the same way is not proven here. Xet is not served.
"""

import re
import socket
import struct
import sys
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from time import sleep  # by name: a test that replaces `time.sleep` means the client's
from urllib.parse import parse_qsl, unquote, urlsplit

from loopback_hub_repos import Files, Repos
from loopback_hub_routes import Answer, Call, answer


@dataclass
class Fault:
    """What goes wrong with the next requests whose "METHOD /path" (unquoted, without a query) matches `pattern`.

    `status` and `drop` come instead of carrying out the request or, if `after`, instead of the answer to a request
    that was carried out. The others spoil an answer. They combine: `drop` with `reset`, `slow` with anything.
    """

    pattern: str
    times: int | None = 1  # None: for ever
    status: int | None = None  # an answer with this status and an empty JSON object
    headers: dict[str, str] = field(default_factory=dict)  # of that answer, or more of them for the normal one
    drop: bool = False  # the connection is closed before any answer
    after: bool = False  # the request is carried out first
    slow: float = 0.0  # seconds to wait, before the request is carried out, or after it if `after`
    corrupt: bool = False  # one bit of the body's last byte is flipped
    cut: int | None = None  # the connection is closed after so many bytes of the body; Content-Length says more
    reset: bool = False  # that closing (by default in the middle of the body) is a TCP reset

    def __post_init__(self) -> None:
        if self.status is None and not (
            self.headers or self.drop or self.slow or self.corrupt or self.reset or self.cut is not None
        ):
            raise ValueError(f"Fault {self.pattern!r} does nothing.")


@dataclass
class Request:
    """One line of the request log, in the order of arrival."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    status: int  # of the answer as sent; 0 if there was none, or not yet
    query: str = ""


class LoopbackHub(Repos):
    """A Hub that serves from its construction to `close`.

    While there are no users, tokens are not looked at; so nobody can push.
    """

    def __init__(self, repos: dict[str, Files]):
        super().__init__()
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.cdn = False  # LFS files are served (by redirect) and taken by another origin
        for name, files in repos.items():
            self.commit(name, files)
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        self.other_origin = f"http://localhost:{port}"  # the same server; to the client, a stranger
        self.thread = Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def storage(self) -> str:
        """The origin that LFS files come from and go to."""
        return self.other_origin if self.cdn else self.endpoint

    def fault(self, pattern: str, **fault) -> None:
        """Add a `Fault`; earlier ones come first."""
        self.faults.append(Fault(pattern, **fault))

    def reset(self) -> None:
        """Forget faults, the request log, users and `cdn`; not the repos, nor which are private or gated."""
        with self.lock:
            self.faults.clear()
            self.requests.clear()
            self.tokens.clear()
            self.readers.clear()
            self.allowed.clear()
            self.cdn = False

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times != 0 and re.search(fault.pattern, request):
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that went away is no error; anything else is one of the loopback Hub, and printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"  # keep-alive: each answer carries its exact length
    disable_nagle_algorithm = True  # else the body waits 40 ms for the client to acknowledge the headers

    def serve(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        call = Call(self.command, url.path, dict(parse_qsl(url.query)), self.headers, self.read_body())
        headers = {name.lower(): value for name, value in self.headers.items()}
        line = Request(self.command, path, headers, 0, url.query)
        self.hub.requests.append(line)  # before any delay: not into the log of a later test
        fault = self.hub.take_fault(f"{self.command} {path}")
        reply = self.spoilt(call, fault) if fault else answer(self.hub, call)
        if reply is None:
            self.hang_up(reset=fault.reset)
        else:
            line.status = reply.status
            self.send(reply, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def spoilt(self, call: Call, fault: Fault) -> Answer | None:
        """The answer under `fault`; None: there is none."""
        reply = None
        if fault.after:
            reply = answer(self.hub, call)
        sleep(fault.slow)
        if fault.drop:
            return None
        if fault.status is not None:
            reply = Answer(fault.status, {"Content-Type": "application/json"}, b"{}")
        elif reply is None:
            reply = answer(self.hub, call)
        if fault.corrupt and reply.body:
            reply.body = reply.body[:-1] + bytes([reply.body[-1] ^ 1])
        reply.headers |= fault.headers
        return reply

    def read_body(self) -> bytes:
        """The whole body, which a client that streams sends in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, reply: Answer, fault: Fault | None) -> None:
        cut = fault and (len(reply.body) // 2 if fault.reset and fault.cut is None else fault.cut)
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(reply.body[:cut])
        if cut is not None:
            self.hang_up(reset=fault.reset)

    def hang_up(self, *, reset: bool) -> None:
        self.close_connection = True
        if not reset:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # it holds the connection open
        self.connection.close()

    def log_message(self, *args):
        """Keep the test output clean; `LoopbackHub.requests` is the log."""
