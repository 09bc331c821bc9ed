"""A `mistral-nb serve` reached by its address: a real one, over HTTP and TLS, and peers that are none."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mistral_nb import ask, runtime
from mistral_nb.answer import Answer
from mistral_nb.backends import Backend, Local, resolve
from mistral_nb.config import load_settings
from mistral_nb.errors import (
    AuthenticationError,
    BackendError,
    ConnectionFailed,
    InvalidRequest,
    MistralError,
    UnknownModel,
)
from mistral_nb.models import EMBEDDED
from mistral_nb.report import status_report
from mistral_nb.runtime import EngineRecord
from mistral_nb.types import GenerationRequest
from tests.backends.scripted import PATIENCE, TOKEN, Peer, body, eventually, frame, head
from tests.server.engines import STAND_IN, Engines, free_port

HELLO = GenerationRequest(prompt="What is the capital of France? Answer in one sentence.", temperature=0)


@pytest.fixture
def record(engine: Local) -> EngineRecord:
    """The shared engine: a `mistral-nb serve` like any other."""
    found = runtime.read_record(EMBEDDED)
    assert found
    return found


def reach(address: str, token: str = TOKEN, model: str | None = None, **settings: Any) -> Backend:
    return resolve(load_settings({"server_token": token, **settings}), backend=address, model=model).backend


def test_it_answers_with_the_model_that_it_holds(record: EngineRecord) -> None:
    answer = Answer(reach(record.base_url, record.token), HELLO.with_(stop=(".",), seed=1))
    list(answer)
    assert answer.text.endswith("Paris")
    host = f"{record.host}:{record.port}"
    assert answer.result.footer.startswith(
        f"SmolLM2 135M Instruct (stand-in for Mistral-7B-Instruct) · remote on {host}, CPU, "
    )
    assert answer.result.finish_reason == "stop"
    assert answer.result.usage


def test_the_environment_is_all_that_it_needs(record: EngineRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_NB_BACKEND", record.base_url)
    monkeypatch.setenv("MISTRAL_NB_SERVER_TOKEN", record.token)
    result = ask("What is the capital of France?", temperature=0, max_tokens=8, model="embedded")
    assert (result.backend, result.model) == ("remote", "SmolLM2 135M Instruct")
    report = status_report(load_settings())
    assert f"the model that it holds, through the backend remote on {record.host}:{record.port}" in report
    assert record.token not in report


def test_what_it_refuses_is_told_in_its_own_words(record: EngineRecord) -> None:
    with pytest.raises(AuthenticationError, match=f"mistral-nb at {record.host}:{record.port}: .*token") as caught:
        list(reach(record.base_url, "wr0ng").stream(HELLO))
    assert "wr0ng" not in repr(caught.value)
    with pytest.raises(UnknownModel, match="--serve-as"):
        list(reach(record.base_url, record.token, "@hf/other/model").stream(HELLO))


def test_a_folder_is_not_told_to_it(record: EngineRecord) -> None:
    """Even where its address is this machine's, which a tunnel's is too."""
    with pytest.raises(InvalidRequest, match="only an engine here takes; `mistral-nb lora add FOLDER --name NAME`"):
        reach(record.base_url, record.token).stream(HELLO.with_(lora="/home/me/tone"))


CERTIFICATE = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"


@pytest.fixture
def engines(embedded: Path, tmp_path: Path) -> Iterator[Engines]:
    engines = Engines(tmp_path)
    yield engines
    engines.end()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl on the PATH to make a certificate with")
def test_it_answers_over_tls_whose_certificate_is_trusted(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", *CERTIFICATE.split(), *names], check=True, capture_output=True)
    port = free_port()
    monkeypatch.setenv("MISTRAL_NB_SERVER_TOKEN", TOKEN)
    tls = ("--certificate", str(certificate), "--key", str(key), "--port", str(port))
    engines.start(*tls, "--serve-as", STAND_IN)
    address = f"https://localhost:{port}"
    with pytest.raises(ConnectionFailed, match="certificate, set SSL_CERT_FILE"):
        list(reach(address, retry_deadline=0).stream(HELLO))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    answer = Answer(reach(address, model=STAND_IN), HELLO)
    list(answer)
    assert "Paris" in answer.text
    assert answer.result.model == "SmolLM2 135M Instruct"
    assert answer.result.served_by.stand_in_for
    assert answer.result.device == f"localhost:{port}"


@pytest.mark.parametrize(
    ("script", "kind", "told"),
    [
        (body({"detail": "Not Found"}, "404 Not Found"), BackendError, "Not Found"),
        ([head("404 Not Found", "text/html") + b"<html>"], BackendError, r"does not answer as `mistral-nb serve` does"),
        (body(["x"]), BackendError, r"does not answer as `mistral-nb serve` does \(HTTP 200\). Check its address"),
        ([head("302 Found", "text/html", "Location: https://evil.example.com/")], BackendError, "evil.example.com"),
        ([head() + b"[" * 100_000], BackendError, r"does not answer as `mistral-nb serve` does"),
        (body({"errors": [{"message": "no", "code": 10000}]}, "401 No"), AuthenticationError, "^mistral-nb at .*: no"),
    ],
)
def test_a_peer_that_is_no_such_server_is_told_as_such(
    peer: Peer, script: Any, kind: type[MistralError], told: str
) -> None:
    peer.scripts = [script]
    with pytest.raises(kind, match=told) as caught:
        list(reach(f"http://127.0.0.1:{peer.port}", retry_deadline=0).stream(HELLO))
    assert f"127.0.0.1:{peer.port}" in str(caught.value)
    assert TOKEN not in repr(caught.value)
    assert [seen.line for seen in peer.seen] == ["GET /engine/health HTTP/1.1"]


def test_a_server_that_starts_again_is_waited_for(peer: Peer) -> None:
    busy = body({"errors": [{"message": "Starting", "code": 3043}]}, "503 Busy")
    held = body({"model": "my-model", "device": "", "precision": ""})
    peer.scripts = [busy, held, busy, [head(), frame({"response": "Hi"}), frame("[DONE]")]]
    chunks = list(reach(f"http://127.0.0.1:{peer.port}", retry_deadline=20).stream(HELLO))
    assert "".join(chunk.text for chunk in chunks) == "Hi"
    assert len([chunk for chunk in chunks if "trying again" in chunk.status]) == 2
    assert [seen.line.split()[1] for seen in peer.seen][2:] == ["/client/v4/accounts/local/ai/run/my-model"] * 2


def test_a_server_that_asks_for_a_longer_wait_than_there_is_is_not_asked_again(peer: Peer) -> None:
    peer.scripts = [body({"errors": [{"message": "Starting", "code": 3043}]}, "503 Busy", "Retry-After: 3600")]
    with pytest.raises(BackendError, match="asks for a wait of 3600 s, and retry_deadline is 5 s"):
        list(reach(f"http://127.0.0.1:{peer.port}", retry_deadline=5).stream(HELLO))
    assert len(peer.seen) == 1


@pytest.mark.parametrize("scripts", [[["hold"]], [body({"errors": [{"message": "Busy", "code": 3040}]}, "429 Busy")]])
def test_closing_ends_the_search_for_its_model(peer: Peer, scripts: Any) -> None:
    peer.scripts = scripts
    stream = reach(f"http://127.0.0.1:{peer.port}", retry_deadline=600).stream(HELLO)
    assert peer.asked.wait(PATIENCE)
    stream.close()
    assert [chunk.finish_reason for chunk in stream if not chunk.status] == ["cancelled"]
    assert eventually(peer.gone.is_set)
    assert eventually(lambda: "mistral-nb" not in {thread.name for thread in threading.enumerate()})
