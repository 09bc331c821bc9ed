"""Many clients at once: fast ones, slow ones, and ones that go away."""

from __future__ import annotations

import json
import mmap
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.server.engines import EngineUnderTest, eventually, run_path, text_of

LONG = {"prompt": "Write a very long story about a lighthouse.", "temperature": 0, "max_tokens": 4000, "stream": True}
SHORT = {"prompt": "Name three colours.", "temperature": 0, "max_tokens": 6}
CLIENTS = 100


def ask_by_hand(engine: EngineUnderTest, body: dict[str, Any]) -> socket.socket:
    """Send a request and read nothing."""
    data = json.dumps(body).encode()
    return engine.raw(f"POST {run_path()} HTTP/1.1\nContent-Length: {len(data)}", data)


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    data = b""
    while mark not in data:
        part = connection.recv(65_536)
        assert part, data
        data += part
    return data


def test_texts_do_not_depend_on_what_runs_beside_them(engine: EngineUnderTest) -> None:
    """More requests than the engine's batch holds, streamed and plain, each as if it were alone."""
    bodies = [
        {**SHORT, "prompt": f"Tell me about the number {n}.", "seed": n, "temperature": 0.8} for n in range(1, 11)
    ]
    alone = [engine.post(body).json()["result"]["response"] for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: text_of(engine.post({**body, "stream": True})), bodies))
    assert together == alone
    assert len(set(alone)) > 1


def test_pieces_come_while_the_answer_is_being_written(engine: EngineUnderTest) -> None:
    engine.idle()
    with engine.client.stream("POST", run_path(), json=LONG) as response:
        lines = (line for line in response.iter_lines() if line)
        assert all(next(lines).startswith("data: {") for _ in range(3))
        assert engine.health()["active"] == 1, "thousands of tokens are still to come"
    engine.idle()


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_ends_its_generation(engine: EngineUnderTest, streamed: bool) -> None:
    engine.idle()
    body = json.dumps({**LONG, "stream": streamed}).encode()
    name = "leaves-a-stream" if streamed else "leaves-an-answer"
    connection = engine.raw(f"POST {run_path()} HTTP/1.1\nContent-Length: {len(body)}\nX-Request-Id: {name}", body)
    if streamed:
        read_until(connection, b"data: ")
    else:
        eventually(lambda: engine.health()["active"] == 1, "the request has arrived")
    connection.close()
    assert last_cancelled(engine, name)["tokens_generated"] < LONG["max_tokens"]
    engine.idle()
    assert engine.post(SHORT).status_code == 200


def test_clients_that_go_away_each_end_their_generation_within_a_token(engine: EngineUnderTest) -> None:
    """Counted in the server: what had been generated when it saw the client leave, and what was in the end.

    Now and then its thread is held up between the two, while the engine's goes on.
    """
    engine.post(SHORT)  # what was cancelled before is over by its end
    before = engine.client.get("/health").json()["cancelled"]
    body = json.dumps(LONG).encode()
    head = f"POST {run_path()} HTTP/1.1\nContent-Length: {len(body)}"
    ends = []
    for n in range(CLIENTS):
        connection = engine.raw(f"{head}\nX-Request-Id: leaves-{n}", body)
        read_until(connection, b"data: ")
        connection.close()
        ends.append(last_cancelled(engine, f"leaves-{n}"))
    late = [end for end in ends if end["tokens_generated"] - end["tokens_when_seen"] > 1]
    assert len(late) <= CLIENTS / 20, late
    assert all(1 <= end["tokens_sent"] <= end["tokens_generated"] < LONG["max_tokens"] for end in ends), ends
    health = engine.client.get("/health").json()
    assert (health["active"], health["cancelled"] - before) == (0, CLIENTS)


def last_cancelled(engine: EngineUnderTest, request_id: str) -> dict[str, Any]:
    """What the server says of a request whose client has left, once the engine is done with it."""
    found: list[dict[str, Any]] = []

    def known() -> bool:
        last = engine.client.get("/health").json()["last_cancelled"]
        found[:] = [last] if last and last["request_id"] == request_id else []
        return bool(found)

    eventually(known, f"{request_id} is over")
    return found[0]


def test_thirty_two_clients_at_once_for_a_while(engine: EngineUnderTest) -> None:
    """Every answer is whole, no place stays taken, and the process does not grow: `make soak` looks longer."""
    engine.idle()
    statm = Path(f"/proc/{engine.record.pid}/statm")
    if not statm.exists():
        pytest.skip("reads the memory in use from /proc")
    used: list[int] = []

    def ask_on(n: int) -> list[str]:
        ends = []
        for _ in range(3):
            ends.append(engine.post({**SHORT, "seed": n + 1, "stream": True}).text[-14:])
            used.append(int(statm.read_text().split()[1]) * mmap.PAGESIZE)
        return ends

    with ThreadPoolExecutor(32) as pool:
        ends = [end for ends in pool.map(ask_on, range(32)) for end in ends]
    assert set(ends) == {"data: [DONE]\n\n"}
    early, late = max(used[: len(used) // 2]), max(used[len(used) // 2 :])
    assert late - early < 64_000_000, f"it grew from {early / 1e6:.0f} to {late / 1e6:.0f} MB"
    engine.idle()
    assert engine.client.get("/health").json()["waiting"] == 0


def test_a_stream_closed_by_httpx_ends_too(engine: EngineUnderTest) -> None:
    with engine.client.stream("POST", run_path(), json=LONG) as response:
        next(response.iter_lines())
    engine.idle()


def test_a_client_that_waits_in_the_queue_may_go_away(engine: EngineUnderTest) -> None:
    """The cache has room for two whole contexts: the third of these waits."""
    engine.idle()
    body = {**LONG, "max_tokens": 8000}
    running = [ask_by_hand(engine, body) for _ in range(2)]
    for connection in running:
        read_until(connection, b"data: ")
    waiting = ask_by_hand(engine, {**body, "prompt": "I wait."})
    eventually(lambda: engine.health()["active"] == 3, "the third request has arrived")
    waiting.close()
    eventually(lambda: engine.health()["active"] == 2, "the third request is gone")
    for connection in running:
        assert connection.recv(65_536)
        connection.close()
    engine.idle()


def test_a_refused_request_frees_its_place(engine: EngineUnderTest) -> None:
    for body in ({**SHORT, "temperature": 9}, {**SHORT, "prompt": "word " * 9000}):
        assert engine.post(body).is_client_error
        engine.idle()


def test_stop_leaves_others_their_answers(engine: EngineUnderTest) -> None:
    """Without force; the engine goes on for them and for everybody."""
    engine.idle()
    with engine.client.stream("POST", run_path(), json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        answer = engine.client.post("/engine/stop", json={"force": False})
        assert (answer.status_code, answer.json()) == (409, {"stopping": False, "active": 1})
        assert engine.client.post("/engine/stop").status_code == 409
        assert next(line for line in lines if line).startswith("data: ")
    engine.idle()


@pytest.mark.parametrize("body", [b"{", b"[" * 100_000, b'{"force": "yes"}', b'{"now": true}', b"[]"])
def test_stop_refuses_what_it_does_not_understand(engine: EngineUnderTest, body: bytes) -> None:
    assert engine.client.post("/engine/stop", content=body).json()["errors"][0]["code"] == 5006
    assert engine.health()["state"] == "ready"


@pytest.mark.parametrize("path", [run_path(), "/engine/tokenize", "/engine/stop"])
def test_a_client_that_goes_away_before_its_request_is_complete(engine: EngineUnderTest, path: str) -> None:
    """Such connections, held open, are no harm to others; and no failure of the engine."""
    silent = [engine.raw(f"POST {path} HTTP/1.1\nContent-Length: 100", b"{") for _ in range(20)]
    assert engine.post(SHORT).status_code == 200
    for connection in silent:
        connection.close()
    engine.idle()
    assert "Traceback" not in engine.log()
