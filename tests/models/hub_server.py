"""A hub on loopback: listings, files behind a redirect to another host, tokens, and what can go wrong on the way."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

LISTING = "the listing"
TOKEN = "hf_" + "x" * 30
LFS = (".safetensors", ".model", ".model.v3", "tokenizer.json", ".gguf", ".bin")


@dataclass
class Repo:
    """A repository with one commit, which the name main and the tags lead to."""

    files: dict[str, bytes]
    tags: tuple[str, ...] = ()
    licence: Any = "apache-2.0"
    gated: bool = False
    private: bool = False
    without_sums: bool = False

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(name.encode() + content for name, content in self.files.items())).hexdigest()

    def listing(self, hub_id: str, *, blobs: bool) -> dict[str, Any]:
        siblings = [self._sibling(name, blobs=blobs) for name in self.files]
        card = {"license": self.licence} if self.licence else {}
        return {"id": hub_id, "sha": self.commit, "gated": self.gated, "cardData": card, "siblings": siblings}

    def _sibling(self, name: str, *, blobs: bool) -> dict[str, Any]:
        content = self.files[name]
        told: dict[str, Any] = {"rfilename": name}
        if blobs and not self.without_sums:
            told |= {"size": len(content), "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
            if name.endswith(LFS):
                sha256 = hashlib.sha256(content).hexdigest()
                told["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 134}
        return told


@dataclass
class Fault:
    """What goes wrong with one request: `kind` is one of the cases of `Handler.send`. `at` in bytes of the file."""

    kind: str
    at: int = 0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    happened: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)


@dataclass
class Seen:
    """A request: for what, on which host, from which byte, with which token; the status and the bytes that were sent.

    One for a range that has an `end` is for the header of a file. `declared` is the length that the answer was said to
    have. `at` is when it came, by the monotonic clock.
    """

    what: str
    host: str
    start: int
    token: str | None
    end: int | None = None
    status: int = 0
    declared: int = 0
    sent: int = 0
    at: float = field(default_factory=time.monotonic)


def header_of(name: str) -> str:
    """What a request for the beginning of a file is called."""
    return f"the header of {name}"


class HubServer:
    """Serves `repos` by their ids at `endpoint`; a context manager. `seen` lists the requests.

    `faults` are used up in order; the last one stays where `lasting` names its file.
    """

    def __init__(self, repos: dict[str, Repo], wrap: Callable[[Any], Any] = lambda socket: socket) -> None:
        self.repos = repos
        self.faults: dict[str, list[Fault]] = {}
        self.lasting: set[str] = set()
        self.seen: list[Seen] = []
        self.connections = 0
        self.is_up = False
        server = self

        class Bound(Handler):
            hub = server

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.socket = wrap(self._server.socket)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._all: list[Fault] = []

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        self.is_up = True
        return self

    def __exit__(self, *error: object) -> None:
        if self.is_up:
            self.stop()

    def stop(self) -> None:
        """Take no more connections, and end those that are there with their next request."""
        self.is_up = False
        for fault in self._all:
            fault.over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fail(self, what: str, *faults: Fault, always: bool = False) -> Fault:
        """The next requests for `what` go wrong in this way; `always`: all later ones as the last of them."""
        self.faults[what] = list(faults)
        self._all.extend(faults)
        if always:
            self.lasting.add(what)
        return faults[0]

    def heal(self) -> None:
        self.faults.clear()
        self.lasting.clear()

    def take_fault(self, what: str) -> Fault | None:
        faults = self.faults.get(what, [])
        if not faults:
            return None
        return faults[0] if len(faults) == 1 and what in self.lasting else faults.pop(0)

    def asked(self, what: str, host: str = "") -> list[Seen]:
        return [each for each in self.seen if each.what == what and host in each.host]

    def sent(self, what: str) -> int:
        """Bytes of a file that were sent."""
        return sum(each.sent for each in self.seen if each.what == what and each.status in (200, 206))


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does at 127.0.0.1, and as its store of large files does at localhost."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubServer

    def setup(self) -> None:
        super().setup()
        self.hub.connections += 1

    def do_GET(self) -> None:
        if not self.hub.is_up:
            self.close_connection = True
            return
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            self.listing(path.removeprefix("/api/models/"))
        elif path.startswith("/cdn/"):
            hub_id, _, name = path.removeprefix("/cdn/").rpartition("/")
            self.send(self.look(name), self.hub.repos[hub_id].files[name])
        elif path == "/login":
            self.page()
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(found[1], found[2], found[3])
        else:
            self.refuse(Seen("?", "", 0, None), 404)

    def look(self, what: str) -> Seen:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = (int(asked[1]), int(asked[2]) if asked[2] else None) if asked else (0, None)
        host = "cdn" if self.headers["Host"].startswith("localhost") else "hub"
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        seen = Seen(what if end is None else header_of(what), host, start, token, end)
        self.hub.seen.append(seen)
        return seen

    def listing(self, wanted: str) -> None:
        hub_id, _, revision = wanted.partition("/revision/")
        seen, repo = self.look(LISTING), self.hub.repos.get(hub_id)
        if self.unknown(seen, repo):
            return
        assert repo
        if revision and revision not in ("main", repo.commit, *repo.tags):
            self.refuse(seen, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        blobs = "blobs=true" in self.path
        self.send(seen, json.dumps(repo.listing(hub_id, blobs=blobs)).encode(), "application/json")

    def resolve(self, hub_id: str, revision: str, name: str) -> None:
        repo = self.hub.repos.get(hub_id)
        cdn = bool(repo) and name.endswith(LFS)
        seen = self.look(name)
        if self.unknown(seen, repo):
            return
        assert repo
        if repo.gated:
            self.refuse(seen, 403 if seen.token else 401, "GatedRepo", f"Access to model {hub_id} is restricted.")
        elif revision != repo.commit or name not in repo.files:
            self.refuse(seen, 404, "EntryNotFound", "Entry not found")
        elif cdn:
            self.answer(seen, 302, {"Location": f"http://localhost:{self.hub.port}/cdn/{hub_id}/{name}?sign=secret"})
        else:
            self.send(seen, repo.files[name])

    def unknown(self, seen: Seen, repo: Repo | None) -> bool:
        """Refuses a wrong token, and what nobody may see without one, as if it were not there."""
        if seen.token not in (None, TOKEN):
            self.refuse(seen, 401, "", f"Invalid credentials in Authorization header: {seen.token}")
        elif repo is None or (repo.private and not seen.token):
            self.refuse(seen, 404 if seen.token else 401, "RepoNotFound", "Repository not found")
        else:
            return False
        return True

    def refuse(self, seen: Seen, status: int, code: str = "", message: str = "") -> None:
        self.answer(seen, status, {"X-Error-Code": code, "X-Error-Message": message})

    def page(self) -> None:
        self.answer(self.look("login"), 200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>Log in</html>")

    def answer(self, seen: Seen, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        seen.status = status
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.write(seen, body)

    def send(self, seen: Seen, content: bytes, kind: str = "application/octet-stream") -> None:
        """A file from the byte that is asked for, or what the next fault makes of it."""
        fault = self.hub.take_fault(seen.what) or Fault("none")
        start, end = seen.start, len(content) if seen.end is None else min(seen.end + 1, len(content))
        length, part = end - start, start > 0 or seen.end is not None
        match fault.kind:
            case "status":
                self.answer(seen, fault.status, fault.headers, fault.body)
                return
            case "portal":
                self.answer(seen, 302, {"Location": f"http://localhost:{self.hub.port}/login"})
                return
            case "drop":
                self.close_connection = True
                return
            case "short":
                length, end = fault.at - start, fault.at
            case "flipped":
                content = content[:-1] + bytes([content[-1] ^ 1])
            case "more":
                content, length, end = content + b"x", length + 1, end + 1
            case "whole" | "whole and cut":
                start, length, end, part = 0, len(content), len(content), False
            case "elsewhere":
                start, length = start + 1, length - 1
        if start and start >= len(content):
            self.answer(seen, 416, {"Content-Range": f"bytes */{len(content)}"})
            return
        seen.status, seen.declared = 206 if part else 200, length
        self.send_response(seen.status)
        self.send_header("Content-Type", kind)
        if part:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        if fault.kind == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            piece = content[start : fault.at]
            self.write(seen, b"%x\r\n%s\r\n" % (len(piece), piece))
            self.close_connection = True
            return
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if fault.kind in ("cut", "whole and cut", "stalled"):
            self.write(seen, content[start : fault.at])
            fault.happened.set()
            if fault.kind != "stalled":
                self.close_connection = True
                return
            fault.over.wait(600)
            start = max(start, fault.at)
        self.write(seen, content[start:end])

    def write(self, seen: Seen, piece: bytes) -> None:
        """Counted before: who has it all may look at once."""
        seen.sent += len(piece)
        try:
            self.wfile.write(piece)
            self.wfile.flush()
        except OSError:  # the client has gone
            seen.sent -= len(piece)
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        return


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str, home: Path) -> None:
    """Pulls ask `endpoint` from now on, over no proxy and with no token; what huggingface_hub writes goes to `home`."""
    for name in (*os.environ,):
        if name.startswith(("HF_", "HUGGING")) or name.lower().endswith("_proxy") or name == "TRANSFORMERS_OFFLINE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
