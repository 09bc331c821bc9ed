"""Who may come in, what each request leaves behind, and listening where others can reach it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mistral_nb.errors import ConfigurationError
from mistral_nb.runtime import EngineRecord
from mistral_nb.server import lifecycle
from mistral_nb.server.connections import BoundedHttp
from mistral_nb.server.edge import Door
from mistral_nb.server.journal import REQUEST_LOG, Journal, Journalled
from mistral_nb.server.listening import Tls
from mistral_nb.server.logs import LogFile
from tests.server.engines import DEADLINE, MODEL, STAND_IN, Engines, EngineUnderTest, eventually, free_port, run_path

SHORT = {"prompt": "Name three colours.", "temperature": 0, "max_tokens": 6}
SECRET = "planted-token-for-a-test"


def lines(engine: EngineUnderTest, request_id: str) -> list[dict[str, Any]]:
    """What the log says of a request, once it says it."""

    def found() -> list[dict[str, Any]]:
        parsed = [json.loads(line) for line in engine.log().splitlines() if line.startswith("{")]
        return [line for line in parsed if line["request_id"] == request_id]

    eventually(lambda: bool(found()), "the request is in the log")
    return found()


def stranger(engine: EngineUnderTest, path: str, **headers: str) -> httpx.Response:
    """A request without a token."""
    return httpx.get(f"{engine.record.base_url}{path}", headers=headers, timeout=DEADLINE, trust_env=False)


@pytest.mark.parametrize(
    "host",
    ["{host}:{port}", "{host}", "localhost:{port}", "LOCALHOST", "localhost:8000", "127.0.0.1:1", "[::1]:8000"],
)
def test_hosts_that_it_answers_to(engine: EngineUnderTest, host: str) -> None:
    """A tunnel has another port than the server."""
    named = host.format(host=engine.record.host, port=engine.record.port)
    assert stranger(engine, "/health", host=named).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", "192.0.2.1", ""),
        *("a b", "localhost@evil.example", "evil.example/localhost", "[::1", "localhost:port:", "0.0.0.0"),
    ],
)
def test_a_foreign_host_is_sent_away(engine: EngineUnderTest, host: str) -> None:
    """Also with the token, and in the shape of the interface that was asked."""
    headers = {"host": host.format(port=engine.record.port)}
    for path in ("/health", "/", "/v1/models"):
        answer = engine.client.get(path, headers=headers)
        assert answer.status_code == 421
        assert "access-control-allow-origin" not in answer.headers
    assert engine.client.get("/v1/models", headers={"host": "evil.example"}).json()["error"]["message"]
    assert "--allow-host" in engine.client.get("/health", headers={"host": "evil.example"}).text


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://{host}:{port}", 200),
        ("HTTP://{host}:{port}", 200),
        ("https://{host}:{port}", 403),
        ("http://{host}", 403),
        ("http://localhost:{port}", 403),
        ("http://evil.example", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_pages_of_other_origins_are_sent_away(engine: EngineUnderTest, origin: str, status: int) -> None:
    named = origin.format(host=engine.record.host, port=engine.record.port)
    answer = engine.client.get("/health", headers={"origin": named})
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["errors"][0]["code"] == 10000


def through_proxy(path: str, *names: str, **headers: str) -> tuple[str, int]:
    """The scheme that the application is told, and the status, for a request that came in the clear on loopback."""
    seen = [""]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen[0] = scope["scheme"]
        await Response()(scope, receive, send)

    transport = httpx.ASGITransport(Door(app, SECRET, names))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.get(path, headers=headers)

    status = asyncio.run(ask()).status_code
    return seen[0], status


@pytest.mark.parametrize(
    ("host", "origin", "expected"),
    [
        ("play.example", "https://play.example", ("https", 200)),
        ("Play.example:443", "https://play.example", ("https", 200)),
        ("play.example", "http://play.example", ("", 403)),
        ("play.example", "https://evil.example", ("", 403)),
        ("127.0.0.1:8000", "https://play.example", ("", 403)),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", ("http", 200)),
        ("evil.example", "https://evil.example", ("", 421)),
    ],
)
def test_behind_a_proxy_that_ends_tls(host: str, origin: str, expected: tuple[str, int]) -> None:
    for given in ("https://play.example", "https://PLAY.example:443/"):
        assert through_proxy("/health", given, host=host, origin=origin) == expected
    plain = through_proxy("/health", "play.example", host="play.example", origin="https://play.example")
    assert plain == ("", 403), "a name alone says nothing of a scheme"


@pytest.mark.parametrize(
    "name",
    ["ftp://a.example", "https://", "https://a.example/path", "a.example/", "*.example", "*", "", "a@b", "a.example:x"],
)
def test_what_is_no_origin_and_no_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="--allow-host"):
        Door(Response(), SECRET, (name,))


@pytest.mark.parametrize(("name", "host"), [("::1", "[::1]:8000"), ("A.example:8443", "a.example"), ("[::2]", "[::2]")])
def test_names_are_taken_as_they_may_be_written(name: str, host: str) -> None:
    assert through_proxy("/health", name, host=host) == ("http", 200)


def test_behind_a_proxy_the_log_names_the_route(caplog: pytest.LogCaptureFixture) -> None:
    """And not the path, in which an account stands."""
    caplog.set_level(logging.INFO, REQUEST_LOG)
    app = Starlette(routes=[Route("/{account}/run/{model}", Response("answer"))])
    transport = httpx.ASGITransport(Journalled(Door(app, SECRET, ("https://play.example",)), Journal()))

    async def ask() -> httpx.Response:
        headers = {"authorization": f"Bearer {SECRET}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://play.example", headers=headers) as client:
            return await client.get("/mine/run/small")

    assert asyncio.run(ask()).status_code == 200
    line = json.loads(caplog.records[-1].message)
    assert (line["route"], line["model"]) == ("/{account}/run/{model}", "small")


def test_a_body_with_two_ends_is_refused(engine: EngineUnderTest) -> None:
    """And what may be another request after it is not read (RFC 9112, 6.1)."""
    second = f"GET /health HTTP/1.1\r\nHost: {engine.record.host}\r\n\r\n".encode()
    for path in ("/health", "/engine/tokenize"):
        head = f"POST {path} HTTP/1.1\nContent-Length: 5\nTransfer-Encoding: chunked"
        with engine.raw(head, b"0\r\n\r\n" + second) as connection, connection.makefile("rb") as answer:
            told = answer.read()
        assert told.startswith(b"HTTP/1.1 400 ")
        assert b"connection: close" in told.lower()
        assert told.count(b"HTTP/1.1 ") == 1


def test_no_other_site_may_read_anything(engine: EngineUnderTest) -> None:
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    answers = [
        engine.client.options(run_path(), headers={"origin": "http://evil.example", **ask}),
        engine.client.options(run_path(), headers=ask),
        engine.post(SHORT),
        stranger(engine, "/"),
    ]
    assert [answer.status_code for answer in answers] == [403, 405, 200, 200]
    assert not [name for answer in answers for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/engine/health", "/v1/models", run_path(), "/nothing", "//health", "/health/"])
def test_all_else_needs_the_token(engine: EngineUnderTest, path: str) -> None:
    assert stranger(engine, path).status_code == 401
    assert stranger(engine, path, authorization="Bearer wrong").status_code == 401
    assert stranger(engine, "/health", authorization="Bearer wrong").status_code == 401
    assert stranger(engine, "/health", authorization="Basic x").status_code == 400


def test_health_tells_strangers_one_word(engine: EngineUnderTest) -> None:
    assert stranger(engine, "/health").json() == {"status": "ready"}
    assert lines(engine, engine.post(SHORT).headers["x-request-id"]), "counted, and so is what came before"
    before = engine.client.get("/health").json()
    answer = engine.post(SHORT).json()["result"]
    refused = engine.post({**SHORT, "temperature": 9})
    assert lines(engine, refused.headers["x-request-id"])
    after = engine.client.get("/health").json()
    assert after["requests"] - before["requests"] == 2
    assert after["refused"] - before["refused"] == 1
    assert after["tokens_in"] - before["tokens_in"] == answer["usage"]["prompt_tokens"]
    assert after["tokens_out"] - before["tokens_out"] == answer["usage"]["completion_tokens"] == 6
    assert (after["status"], after["active"], after["waiting"]) == ("ready", 0, 0)
    assert after["uptime_s"] > before["uptime_s"]


@pytest.mark.parametrize("given", ["my-request.1:a_b", "x" * 128])
def test_a_request_keeps_its_id(engine: EngineUnderTest, given: str) -> None:
    answer = engine.post(SHORT, headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == answer.headers["cf-ai-req-id"] == given
    assert lines(engine, given)


@pytest.mark.parametrize("given", ["", "x" * 129, 'a"b', "a b", "naïve".encode().decode("latin-1")])
def test_a_request_without_a_sane_id_gets_one(engine: EngineUnderTest, given: str) -> None:
    answer = engine.client.get("/nothing", headers={b"x-request-id": given.encode("latin-1")})
    assert uuid.UUID(answer.headers["x-request-id"])
    assert stranger(engine, "/nothing").headers["cf-ai-req-id"] != answer.headers["cf-ai-req-id"]


def test_the_log_has_one_line_of_json_for_each_request(engine: EngineUnderTest) -> None:
    """Without prompts, answers and tokens, a prompt in an address included."""
    prompt, text = "Say planted-prompt back.", ""
    for body in ({**SHORT, "prompt": prompt}, {**SHORT, "prompt": prompt, "stream": True}):
        answer = engine.post(body, model=STAND_IN)
        text = text or answer.json()["result"]["response"]
        (line,) = lines(engine, answer.headers["x-request-id"])
        assert line.pop("request_id")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
        assert 0 < line.pop("first_token_ms") < line.pop("ms") < DEADLINE * 1e3
        assert line.pop("tokens_in") > 10
        assert line == {
            "method": "POST",
            "route": "/client/v4/accounts/{account}/ai/run/{model:path}",
            "status": 200,
            "model": STAND_IN,
            "tokens_out": 6,
            "tokens_reused": 0,
            "end": "length",
        }
    refused = engine.client.get("/nothing?prompt=planted-prompt")
    (line,) = lines(engine, refused.headers["x-request-id"])
    assert (line["route"], line["status"], line["end"]) == ("/nothing", 404, "refused")
    assert "planted-prompt" not in engine.log()
    assert text not in engine.log()
    assert engine.record.token not in engine.log()


def test_health_is_not_in_the_log(engine: EngineUnderTest) -> None:
    answers = [engine.client.get("/health"), engine.client.get("/engine/health"), stranger(engine, "/engine/health")]
    (line,) = lines(engine, answers[2].headers["x-request-id"])
    assert line["status"] == 401
    assert not any(answer.headers["x-request-id"] in engine.log() for answer in answers[:2])


# Listening where others can reach it


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate for localhost, its key, and the key with a pass phrase."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    make = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,DNS:model.example"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem")]
    lock = ["ec", "-in", str(folder / "key.pem"), "-out", str(folder / "locked.pem"), "-aes256", "-passout", "pass:a"]
    for arguments in ([*make, *names, *files], lock):
        subprocess.run([openssl, *arguments], check=True, capture_output=True)
    return folder


@pytest.fixture
def public(engines: Engines, pem: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[EngineUnderTest, int]:
    """An engine in the foreground that others reach, and its port."""
    return start_public(engines, pem, monkeypatch)


def start_public(engines: Engines, pem: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[EngineUnderTest, int]:
    port = free_port()
    monkeypatch.setenv("MISTRAL_NB_SERVER_TOKEN", SECRET)
    tls = ["--certificate", str(pem / "certificate.pem"), "--key", str(pem / "key.pem")]
    return engines.start("--host", "0.0.0.0", "--port", str(port), *tls, "--allow-host", "model.example"), port


def test_with_tls_and_a_token_others_reach_it(public: tuple[EngineUnderTest, int], pem: Path) -> None:
    """And this machine reaches it as ever. The token is nowhere but in the record."""
    engine, port = public
    engine.ready()
    trusted = ssl.create_default_context(cafile=str(pem / "certificate.pem"))
    bearer = {"authorization": f"Bearer {SECRET}"}
    address = f"https://localhost:{port}"
    with httpx.Client(verify=trusted, base_url=address, timeout=DEADLINE, trust_env=False) as client:
        assert client.post(run_path(), json=SHORT, headers=bearer).json()["success"]
        assert client.get("/health", headers={"host": "model.example"}).json() == {"status": "ready"}
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 421
        assert client.get("/health", headers={"origin": f"https://localhost:{port}"}).status_code == 200
        assert client.get("/health", headers={"origin": f"http://localhost:{port}"}).status_code == 403
        own = {"sec-fetch-site": "same-origin"}
        cookie = client.post("/playground/login", data={"token": SECRET}, headers=own).headers["set-cookie"]
        assert "; Secure" in cookie
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://localhost:{port}/health", trust_env=False)
    record: EngineRecord = engine.record
    assert (record.host, record.token) == ("127.0.0.1", SECRET)
    assert record.port != port
    assert engine.post(SHORT).json()["success"]
    eventually(lambda: any("Others reach it" in line for line in engine.printed), "it says where")
    assert any(f"https://THIS-MACHINE:{port}" in line for line in engine.printed)
    shown = "".join(engine.printed) + engine.log() + Path(f"/proc/{record.pid}/cmdline").read_text()
    assert SECRET not in shown
    engine.process.terminate()
    assert engine.process.wait(DEADLINE) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other figures")
def test_silent_connections_keep_no_one_out(engines: Engines, pem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there are more of them than the process may have files, and none gets as far as a TLS handshake."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        engine, port = start_public(engines, pem, monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    engine.ready()
    with contextlib.ExitStack() as silent:
        for _ in range(300):
            silent.enter_context(socket.create_connection(("127.0.0.1", port), timeout=DEADLINE))
        with pytest.raises(subprocess.TimeoutExpired):
            engine.process.wait(4)
        address = engine.record.base_url + run_path()
        answer = httpx.post(address, headers=engine.client.headers, json=SHORT, timeout=DEADLINE, trust_env=False)
        assert answer.json()["success"]
        assert engine.log().count("connections are closed as they come: 120 connections are open") == 1
    assert "Traceback" not in engine.log()


def test_a_tls_handshake_that_does_not_come_is_not_waited_for(pem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedHttp, "head_patience", 0.3)

    async def connect() -> None:
        server = lifecycle._Server(lifecycle._config(Response(), Tls(pem / "certificate.pem", pem / "key.pem")))
        with socket.create_server(("127.0.0.1", 0)) as listening:
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            async with asyncio.timeout(DEADLINE):
                assert await reader.read() == b""
            writer.close()
            server.should_exit = True
            await serving

    asyncio.run(connect())


@pytest.mark.parametrize(
    ("arguments", "token", "expected"),
    [
        (["--host", "0.0.0.0"], SECRET, "ssh -L"),
        (["--host", "::"], SECRET, "on loopback only"),
        (["--host", "0.0.0.0", "{tls}"], "", "MISTRAL_NB_SERVER_TOKEN"),
        (["--host", "0.0.0.0", "{tls}"], "short", "at least 16 characters"),
        (["--certificate", "{pem}/certificate.pem"], SECRET, "give --key FILE too"),
        (["--key", "{pem}/key.pem"], SECRET, "give --certificate FILE too"),
        (["--certificate", "{pem}/none.pem", "--key", "{pem}/key.pem"], SECRET, "none.pem cannot be read"),
        (["--certificate", "{pem}/key.pem", "--key", "{pem}/key.pem"], SECRET, "do not make a TLS server"),
        (["--certificate", "{pem}/certificate.pem", "--key", "{pem}/locked.pem"], SECRET, "has no pass phrase"),
    ],
)
def test_what_others_could_misuse_is_refused(
    engines: Engines, pem: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], token: str, expected: str
) -> None:
    monkeypatch.setenv("MISTRAL_NB_SERVER_TOKEN", token)
    tls = ["--certificate", "{pem}/certificate.pem", "--key", "{pem}/key.pem"]
    filled = [part for argument in arguments for part in (tls if argument == "{tls}" else [argument])]
    process = engines.spawn("--model", MODEL, *(argument.format(pem=pem) for argument in filled))
    _, error = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert expected in error
    assert error.count("\n") == 1
    assert SECRET not in error


def test_a_log_does_not_grow_without_end(tmp_path: Path) -> None:
    """It stays the same file for whoever writes to it by its number."""
    file = tmp_path / "engine.log"
    log = LogFile(file, limit=1000)
    other = os.dup(log.descriptor)
    for n in range(100):
        log.emit(logging.makeLogRecord({"msg": f"line {n} {'x' * 80}", "name": REQUEST_LOG}))
    os.write(other, b"a crash\n")
    os.close(other)
    log.close()
    assert file.stat().st_size < 1200
    assert file.read_text().endswith("x\na crash\n")
    kept = (file.with_suffix(".log.old").read_text() + file.read_text()).split("line ")[1:]
    numbers = [int(line.split()[0]) for line in kept]
    assert numbers == list(range(numbers[0], 100))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_log_on_a_full_disk_stops_nobody(tmp_path: Path) -> None:
    file = tmp_path / "engine.log"
    file.with_suffix(".log.old").symlink_to("/dev/full")
    log = LogFile(file, limit=1000)
    for n in range(20):
        log.emit(logging.makeLogRecord({"msg": f"line {n} {'x' * 80}", "name": REQUEST_LOG}))
    log.close()
    assert file.stat().st_size < 1200
    assert "line 19 " in file.read_text()
