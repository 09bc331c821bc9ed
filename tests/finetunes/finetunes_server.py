"""A server on a real loopback socket that keeps adapters as Cloudflare does, with faults on demand."""

from __future__ import annotations

import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from tests.backends.scripted import ACCOUNT, PATIENCE, TOKEN, Seen, environment_of

BASE = f"/client/v4/accounts/{ACCOUNT}/ai"
PUBLIC = {
    "id": "99999999-0000-4000-8000-000000000001",
    "name": "cf-public-cnn-summarization",
    "model": "@cf/mistral/mistral-7b-instruct-v0.2-lora",
    "description": "summaries",
    "created_at": "2024-03-01T00:00:00Z",
    "modified_at": "2024-03-01T00:00:00Z",
    "public": True,
}
FILES = {"adapter_config.json", "adapter_model.safetensors"}

Fault = tuple[int, Any] | tuple[int, Any, dict[str, str]] | str | threading.Event
"""A status with a body and headers; "closed" before an answer, "stored" before it with all done, or "cut" in the middle
of an upload; or an event to wait for, after which all goes on."""


def error(code: int, message: str) -> dict[str, Any]:
    return {
        "errors": [{"message": f"AiError: {message}", "code": code}],
        "success": False,
        "result": {},
        "messages": [],
    }


@dataclass
class FinetunesServer:
    """`faults` are taken one after another by the requests `METHOD path`, with the path behind `/ai/`.

    An adapter is found by requests after `unfound` of them have not.
    """

    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list, repr=False)
    nested: bool = False
    unfound: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    """A fault was reached."""

    def __post_init__(self) -> None:
        outer = self

        class Handler(_Handler):
            finetunes = outer

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/client/v4"

    def __enter__(self) -> FinetunesServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join(PATIENCE)
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which this is the account."""
        return environment_of(self.url)

    def asked(self, start: str = "") -> list[str]:
        """What was asked, such as `POST finetunes`."""
        told = [f"{each.method} {each.path.removeprefix(f'{BASE}/')}" for each in self.seen]
        return [each for each in told if each.startswith(start)]

    def add(self, name: str, model: str = PUBLIC["model"], files: dict[str, bytes] | None = None) -> dict[str, Any]:
        number = len(self.adapters) + 1
        record = {**PUBLIC, "id": f"11111111-0000-4000-8000-{number:012}", "name": name, "model": model}
        record |= {"description": "", "public": False}
        self.adapters[record["id"]] = record
        self.files[record["id"]] = dict(files or {})
        return record


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may go
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    finetunes: FinetunesServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        faults = self.finetunes.faults.get(f"POST {self.path.removeprefix(f'{BASE}/')}")
        if faults and faults[0] == "cut":
            self.rfile.read(70_000)
            self._answer(b"")
            return
        size = int(self.headers["content-length"])
        body = self.rfile.read(size)
        if len(body) == size:
            self._answer(body)
        else:
            self.close_connection = True

    def _answer(self, body: bytes) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.finetunes.seen.append(Seen(self.requestline, headers, body))
        if self.headers["authorization"] != f"Bearer {TOKEN}":
            return self._send(401, error(10000, "Authentication error"))
        path = self.path.removeprefix(f"{BASE}/")
        if self._fault(path, body):
            return None
        return self._send(*self._result(path, body))

    def _fault(self, path: str, body: bytes) -> bool:
        """Whether a fault was played instead of an answer."""
        state = self.finetunes
        faults = state.faults.get(f"{self.command} {path}")
        if not faults:
            return False
        fault = faults.pop(0)
        state.reached.set()
        if isinstance(fault, threading.Event):
            assert fault.wait(PATIENCE)
            return False
        if isinstance(fault, str):
            if fault == "stored":
                self._result(path, body)
            self.close_connection = True
            return True
        self._send(*fault)
        return True

    def _result(self, path: str, body: bytes) -> tuple[int, Any]:
        state = self.finetunes
        if path.startswith("run/"):
            return self._run(json.loads(body))
        if (self.command, path) == ("GET", "finetunes/public"):
            return _ok([PUBLIC])
        if (self.command, path) == ("GET", "finetunes"):
            adapters = list(state.adapters.values())
            return _ok([adapters] if state.nested else adapters)
        if (self.command, path) == ("POST", "finetunes"):
            asked = json.loads(body)
            if any(each["name"] == asked["name"] for each in state.adapters.values()):
                return 400, error(5006, "a finetune of that name exists")
            return _ok(state.add(asked["name"], asked["model"]) | {"description": asked["description"]})
        owner = path.split("/")[1]
        form = self._form(body)
        name, content = form["file_name"].decode(), form["file"]
        if name not in FILES or owner not in state.files:
            return 400, error(5006, "no such file or finetune")
        if name in state.files[owner]:
            return 400, error(5006, "assets cannot be edited")
        state.files[owner][name] = content
        return 200, {"success": True}

    def _form(self, body: bytes) -> dict[str, bytes]:
        boundary = re.findall("boundary=(.+)", self.headers["content-type"])[0].encode()
        parts = [part.partition(b"\r\n\r\n") for part in body.split(b"--" + boundary)[1:-1]]
        names = [re.findall(rb'[; ]name="(\w+)"', head)[0].decode() for head, _, _ in parts]
        return {name: content.removesuffix(b"\r\n") for name, (_, _, content) in zip(names, parts, strict=True)}

    def _run(self, inputs: Any) -> tuple[int, Any]:
        state = self.finetunes
        owner = next((key for key, each in state.adapters.items() if inputs["lora"] in (key, each["name"])), None)
        if owner is None or state.unfound:
            state.unfound = max(0, state.unfound - 1)
            return 404, error(3037, "Finetune not found")
        if set(state.files[owner]) != FILES:
            return 400, error(3039, "Finetune is missing required files")
        return _ok({"response": "Hi"})

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        size = str(len(content))
        sent = {"content-type": "application/json", "content-length": size, **(headers or {})}
        for name, value in sent.items():
            self.send_header(name, value)
        self.close_connection = self.close_connection or sent["content-length"] != size
        self.end_headers()
        self.wfile.write(content)


def _ok(result: Any) -> tuple[int, Any]:
    return 200, {"result": result, "success": True, "errors": [], "messages": []}
