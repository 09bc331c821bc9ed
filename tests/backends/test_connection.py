"""Connections that are kept: used again, cut when their answer is cancelled, replaced when they are dead."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mistral_nb.backends.connection import close_all, send
from mistral_nb.backends.pump import Line
from mistral_nb.backends.workers_ai import WorkersAI
from mistral_nb.errors import ConfigurationError, ConnectionFailed
from mistral_nb.secret import Secret
from mistral_nb.types import Chunk, GenerationRequest
from tests.backends.keeping import Keeper, Visit
from tests.backends.scripted import PATIENCE, frame

Make = Callable[..., WorkersAI]
HELLO = GenerationRequest(prompt="Hello")


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    keeper = Keeper()
    yield keeper
    keeper.close()


def text(backend: WorkersAI) -> str:
    return "".join(chunk.text for chunk in backend.stream(HELLO))


def test_answers_share_a_connection(keeper: Keeper, client: Make) -> None:
    backend = client(base_url=keeper.url)
    assert [text(backend) for _ in range(3)] == ["Hello"] * 3
    assert text(client(base_url=keeper.url)) == "Hello", "another backend of the same address"
    assert (keeper.connections, len(keeper.visits)) == (1, 4)


def test_what_a_peer_remembers_of_one_asker_is_not_told_of_another(keeper: Keeper, client: Make) -> None:
    """A cookie that came with one token would go out with the next one, over the connection that they share."""
    parts = [frame({"response": "Hello"}), frame("[DONE]")]
    answer = b"HTTP/1.1 200 OK\r\nSet-Cookie: who=first; Path=/\r\nContent-Type: text/event-stream\r\n"
    answer += b"Content-Length: %d\r\n\r\n%b" % (sum(map(len, parts)), b"".join(parts))
    keeper.answer = lambda visit: visit.socket.sendall(answer)
    assert [text(client(base_url=keeper.url, token=Secret(token))) for token in ("first", "second")] == ["Hello"] * 2
    assert [visit.headers["authorization"] for visit in keeper.visits] == ["Bearer first", "Bearer second"]
    assert (keeper.connections, [visit.headers.get("cookie") for visit in keeper.visits]) == (1, [None, None])


def test_answers_at_once_have_a_connection_each_and_both_are_kept(keeper: Keeper, client: Make) -> None:
    both = threading.Barrier(2)

    def answer(visit: Visit) -> None:
        if visit.number < 2:
            both.wait(PATIENCE)
        visit.send("Hello")

    keeper.answer = answer
    backend = client(base_url=keeper.url)
    for _ in range(2):
        streams = [backend.stream(HELLO) for _ in range(2)]
        assert ["".join(chunk.text for chunk in stream) for stream in streams] == ["Hello"] * 2
    assert keeper.connections == 2


@pytest.mark.parametrize("at", ["before the first byte", "between two texts"])
def test_cancelling_on_a_connection_that_was_used_before_cuts_it(keeper: Keeper, client: Make, at: str) -> None:
    """Nothing else would: the peer is silent, and the client's limits are longer than the test waits."""
    backend, asked, cut = client(base_url=keeper.url), threading.Event(), threading.Event()

    def answer(visit: Visit) -> None:
        if visit.number != 1:
            return visit.send("Hello")
        if at == "between two texts":
            visit.send("Hel", whole=False)
        asked.set()
        visit.wait_for_the_end()
        cut.set()
        raise OSError

    keeper.answer = answer
    assert text(backend) == "Hello"
    stream = backend.stream(HELLO)
    if at == "between two texts":
        assert next(stream).text == "Hel"
    assert asked.wait(PATIENCE)
    stream.close()
    assert cut.wait(PATIENCE)
    assert list(stream)[-1] == Chunk(finish_reason="cancelled")
    assert [text(backend) for _ in range(2)] == ["Hello"] * 2
    assert [visit.connection for visit in keeper.visits] == [0, 0, 1, 1]


def test_a_connection_that_the_peer_has_closed_meanwhile_is_replaced(keeper: Keeper, client: Make) -> None:
    backend = client(base_url=keeper.url)
    assert text(backend) == "Hello"
    keeper.hang_up()
    assert text(backend) == "Hello"
    assert keeper.connections == 2


def test_a_kept_connection_that_dies_under_the_request_is_no_failure(keeper: Keeper, client: Make) -> None:
    """As when the peer's limit for idle connections and the next request meet."""

    def answer(visit: Visit) -> None:
        if visit.number == 1:
            raise OSError
        visit.send("Hello")

    keeper.answer = answer
    backend = client(base_url=keeper.url)
    assert [text(backend) for _ in range(2)] == ["Hello"] * 2
    assert [visit.connection for visit in keeper.visits] == [0, 0, 1]


def test_a_new_connection_that_dies_under_the_request_is_one(keeper: Keeper, client: Make) -> None:
    def answer(visit: Visit) -> None:
        raise OSError

    keeper.answer = answer
    with pytest.raises(ConnectionFailed):
        text(client(base_url=keeper.url))
    assert len(keeper.visits) == 1


def test_a_connection_that_is_not_made_is_not_tried_twice(client: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[Any] = []
    connect = socket.create_connection

    def counted(address: Any, *rest: Any, **options: Any) -> socket.socket:
        tries.append(address)
        return connect(address, *rest, **options)

    monkeypatch.setattr(socket, "create_connection", counted)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        port = taken.getsockname()[1]
        with pytest.raises(ConnectionFailed, match="cannot be reached"):
            text(client(base_url=f"http://127.0.0.1:{port}"))
    assert tries == [("127.0.0.1", port)]


def test_a_line_that_hangs_up_after_its_answer_leaves_the_connection_alone(keeper: Keeper) -> None:
    def ask(line: Line) -> bytes:
        with send("POST", keeper.url, line=line, direct=True, content=b"{}") as response:
            return b"".join(response.iter_raw())

    first, second = Line(), Line()
    assert b"Hello" in ask(first)
    first.hang_up()
    assert b"Hello" in ask(second)
    assert [visit.connection for visit in keeper.visits] == [0, 0]
    second.release()


def test_a_connection_whose_line_hung_up_meanwhile_is_not_kept(keeper: Keeper) -> None:
    for _ in range(2):
        line = Line()
        with send("POST", keeper.url, line=line, direct=True, content=b"{}") as response:
            assert b"".join(response.iter_raw())
            line.hang_up()
    assert [visit.connection for visit in keeper.visits] == [0, 1]


def test_a_peer_that_does_not_end_after_its_end_mark_holds_nobody(keeper: Keeper, client: Make) -> None:
    end = threading.Event()

    def answer(visit: Visit) -> None:
        visit.socket.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: [DONE]\n\n")
        visit.wait_for_the_end()
        end.set()
        raise OSError

    keeper.answer = answer
    assert text(client(base_url=keeper.url)) == ""
    assert end.wait(PATIENCE), "the client ends the connection, not the peer"


def test_idle_connections_are_closed_when_asked(keeper: Keeper, client: Make) -> None:
    end = threading.Event()

    def answer(visit: Visit) -> None:
        visit.send("Hello")
        visit.wait_for_the_end()
        end.set()
        raise OSError

    keeper.answer = answer
    assert text(client(base_url=keeper.url)) == "Hello"
    close_all()
    assert end.wait(PATIENCE)


def surroundings() -> dict[str, str]:
    """The environment of a process that finds our packages."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


FORK = """
import os, sys
from mistral_nb.backends.pump import Line
from mistral_nb.backends.workers_ai import WorkersAI
from mistral_nb.secret import Secret
from mistral_nb.types import GenerationRequest
backend = WorkersAI(base_url=sys.argv[1], account="0" * 32, token=Secret("none"), model="@cf/a/b")
def ask():
    return "".join(chunk.text for chunk in backend.stream(GenerationRequest(prompt="Hello")))
assert ask() == "Hello"
child = os.fork()
if not child:
    os._exit(0 if ask() == ask() == "Hello" else 1)
assert os.waitpid(child, 0)[1] == 0
assert ask() == "Hello"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_uses_connections_of_its_own(keeper: Keeper) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, keeper.url]
    done = subprocess.run(command, env=surroundings(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [visit.connection for visit in keeper.visits] == [0, 1, 1, 0]


ENDING = """
stream = backend.stream(GenerationRequest(prompt="Hello"))
assert next(stream).text == "Hel"
"""


@pytest.mark.parametrize("rest", ["", "list(stream)"], ids=["unfinished", "broken"])
def test_the_interpreter_ends_though_somebody_holds_an_answer(keeper: Keeper, rest: str) -> None:
    def answer(visit: Visit) -> None:
        visit.send("Hel", whole=False)
        if rest:
            raise OSError
        visit.wait_for_the_end()

    keeper.answer = answer
    script = FORK.partition("def ask")[0] + ENDING + rest
    done = subprocess.run(
        [sys.executable, "-c", script, keeper.url], env=surroundings(), capture_output=True, timeout=300
    )
    assert done.returncode == (1 if rest else 0), done.stderr


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("HTTPS_PROXY", "gopher://127.0.0.1", "Correct HTTPS_PROXY"),
        ("SSL_CERT_FILE", "/nowhere.pem", "Correct SSL_CERT_FILE"),
    ],
)
def test_an_environment_that_cannot_be_used_is_named(
    client: Make, monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=told):
        text(client(base_url="https://127.0.0.1:9/client/v4"))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file with a certificate for this machine and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    pem = tmp_path_factory.mktemp("tls") / "both.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    subprocess.run(
        [*command, "-days", "2", *names, "-keyout", str(pem), "-out", str(pem) + ".crt"],
        check=True,
        capture_output=True,
    )
    pem.write_text(pem.read_text() + Path(f"{pem}.crt").read_text())
    return pem


def test_over_tls_a_kept_connection_is_cut_too(
    certificate: Path, client: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with closing(Keeper(tls=tls)) as keeper, pytest.raises(ConnectionFailed, match="certificate"):
        text(client(base_url=keeper.url))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with closing(Keeper(tls=tls)) as keeper:
        cut_over_tls(keeper, client(base_url=keeper.url))


def cut_over_tls(keeper: Keeper, backend: WorkersAI) -> None:
    assert [text(backend) for _ in range(2)] == ["Hello"] * 2
    asked, cut = threading.Event(), threading.Event()

    def answer(visit: Visit) -> None:
        asked.set()
        visit.socket.settimeout(PATIENCE)
        with contextlib.suppress(ssl.SSLError, ConnectionResetError):
            visit.socket.recv(1)
        cut.set()

    keeper.answer = answer
    stream = backend.stream(HELLO)
    assert asked.wait(PATIENCE)
    stream.close()
    assert cut.wait(PATIENCE)
    assert {visit.connection for visit in keeper.visits} == {keeper.visits[0].connection}
