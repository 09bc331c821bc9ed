"""The load generator's client against a peer that plays a script: moments, loads, and each kind of failure."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_nb import bench_client
from mistral_nb.bench_client import Run, Target, measure
from mistral_nb.bench_latency import most_at_once
from mistral_nb.bench_workload import Ask, Load
from mistral_nb.errors import BackendError, ConnectionFailed, InvalidRequest
from mistral_nb.runtime import PROOF_HEADER
from mistral_nb.secret import Secret
from mistral_nb.types import Usage
from tests.backends.scripted import PATIENCE, TOKEN, Peer, Step, body, frame, head

END = frame({"response": "", "usage": {"prompt_tokens": 9, "completion_tokens": 3}, "finish_reason": "length"})
ANSWER: Sequence[Step] = [head(), frame({"response": "One"}), frame({"response": " two"}), END, frame("[DONE]")]


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


def asks(count: int, rate: float | None = None) -> list[Ask]:
    """Evenly spaced at a rate; those of odd numbers with an adapter."""
    return [
        Ask(number, number / rate if rate else 0.0, 16, 3, "tone" if number % 2 else None, str(number))
        for number in range(count)
    ]


def ask(peer: Peer, load: Load, wanted: Sequence[Ask], seconds: float | None = None, timeout: float = 60.0) -> Run:
    target = Target(f"http://127.0.0.1:{peer.port}", Secret(TOKEN), timeout)
    return measure(target, "some/model", load, iter(wanted), lambda one: f"prompt {one.words}", seconds)


def test_a_request_says_what_was_drawn(peer: Peer) -> None:
    peer.scripts = [ANSWER]
    found = ask(peer, Load(concurrency=1), asks(2))
    first, second = peer.seen
    assert first.path == "/client/v4/accounts/local/ai/run/some/model"
    assert first.headers["authorization"] == f"Bearer {TOKEN}"
    assert {name: first.json[name] for name in ("prompt", "raw", "stream", "max_tokens", "seed")} == {
        "prompt": "prompt 0",
        "raw": True,
        "stream": True,
        "max_tokens": 3,
        "seed": 1,
    }
    assert "lora" not in first.json
    assert second.json["lora"] == "tone"
    assert [one.error for one in found.outcomes] == ["", ""]
    assert found.outcomes[0].usage == Usage(9, 3)
    assert found.outcomes[0].reused is None


def test_reused_tokens_are_what_the_usage_says_and_not_what_a_text_says(peer: Peer) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5}}
    text = frame({"response": '"cached_tokens": 7'})
    end = frame({"response": "", "usage": usage, "finish_reason": "length"})
    peer.scripts = [[head(), end, text, frame("[DONE]")], [head(), text, end, frame("[DONE]")]]
    assert [one.reused for one in ask(peer, Load(concurrency=1), asks(2)).outcomes] == [5, 5]


class Clock:
    """One that the peer's script sets, once the client has read it so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._now = 0.0
        self._read = threading.Semaphore(0)
        monkeypatch.setattr(bench_client, "time", self)

    def perf_counter(self) -> float:
        self._read.release()
        return self._now

    process_time = staticmethod(time.process_time)

    def later(self, reads: int = 0) -> None:
        for _ in range(reads):
            assert self._read.acquire(timeout=PATIENCE)
        self._now += 1


def test_moments_are_those_of_the_texts(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client reads the clock as a load begins, for when a request is due and sent, at each text and at the end."""
    clock = Clock(monkeypatch)
    texts = [frame({"response": "a"}), lambda: clock.later(1), frame({"response": ""}), frame({"response": "b"})]
    peer.scripts = [[head(), lambda: clock.later(3), *texts, lambda: clock.later(1), END, frame("[DONE]")]]
    [one] = ask(peer, Load(concurrency=1), asks(1)).outcomes
    assert (one.due, one.sent, one.texts, one.ended) == (0, 0, [1, 2], 3)
    assert (one.first, one.gaps, one.per_token, one.whole) == (1, [1], 0.5, 3)


def test_at_a_rate_nobody_waits_for_another(peer: Peer) -> None:
    """The peer answers nobody until all have asked."""
    everybody = threading.Barrier(8)
    peer.scripts = [[lambda: everybody.wait(60) and None, *ANSWER]]
    found = ask(peer, Load(rate=100), asks(8, rate=100))
    assert [one.error for one in found.outcomes] == [""] * 8
    assert most_at_once(found.outcomes) == 8
    assert all(one.sent >= one.due == one.ask.at for one in found.outcomes)


def test_a_client_that_is_late_counts_from_the_moment(peer: Peer) -> None:
    peer.scripts = [ANSWER]
    late = [replace(each, at=-5.0) for each in asks(1)]
    [one] = ask(peer, Load(rate=1), late).outcomes
    assert one.first is not None
    assert one.first > 5
    assert one.whole > 5


def test_so_many_at_once_and_no_more(peer: Peer) -> None:
    """The first three are held together; each other one begins as soon as one is over."""
    together = threading.Barrier(3)
    peer.scripts = [[lambda: together.wait(60) and None, *ANSWER]]
    found = ask(peer, Load(concurrency=3), asks(9))
    assert len(found.outcomes) == 9
    assert not {one.error for one in found.outcomes} - {""}
    assert most_at_once(found.outcomes) == 3
    assert {one.ask.number for one in found.outcomes} == set(range(9))


def test_none_begins_after_its_seconds(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    peer.scripts = [[clock.later, *ANSWER]]
    endless = (replace(asks(1)[0], number=number) for number in itertools.count())
    target = Target(f"http://127.0.0.1:{peer.port}", Secret(TOKEN))
    found = measure(target, "m", Load(concurrency=1), endless, lambda one: "p", seconds=2.5)
    assert [(one.sent, one.ended, one.error) for one in found.outcomes] == [(0, 1, ""), (1, 2, ""), (2, 3, "")]
    assert found.seconds == 3


@pytest.mark.parametrize(
    ("script", "kind", "words", "texts"),
    [
        (body({"errors": [{"message": "busy", "code": 3040}]}, "429 Too Many"), "HTTP 429, code 3040", "busy", 0),
        ([head("502 Bad Gateway", "text/html"), b"<p>sorry"], "HTTP 502", "", 0),
        ([head(), frame({"response": "a"}), frame({"errors": [{"message": "broke", "code": 3043}]})],
         "in the stream, code 3043", "broke", 1),
        ([head(), frame({"response": "a"})], "cut short", "without its mark", 1),
        ([head("200 OK", "text/event-stream", "Content-Length: 999"), frame({"response": "a"})], "cut short", "", 1),
        ([], "cut short", "", 0),
    ],
)  # fmt: skip
def test_failures_have_a_kind_and_stop_nobody_else(
    peer: Peer, script: Sequence[Step], kind: str, words: str, texts: int
) -> None:
    peer.scripts = [script, ANSWER]
    failed, other = ask(peer, Load(concurrency=1), asks(2)).outcomes
    assert failed.error == kind
    assert words in failed.message
    assert len(failed.texts) == texts
    assert failed.ended > 0
    assert other.error == ""


@pytest.mark.parametrize("texts", [1, 2])
def test_an_answer_that_takes_too_long_is_given_up_and_stops_nobody_else(peer: Peer, texts: int) -> None:
    def given_up(limit: float) -> bool:
        slow: Sequence[Step] = [lambda: time.sleep(0.75 * limit), frame({"response": "b"}), lambda: time.sleep(limit)]
        script: Sequence[Step] = [head(), frame({"response": "a"}), *(["hold"] if texts == 1 else slow)]
        peer.scripts = [[]] * peer.connections + [script, ANSWER]
        failed, other = ask(peer, Load(concurrency=1), asks(2), timeout=limit).outcomes
        assert failed.error == f"over {limit:g} s"
        return len(failed.texts) == texts and failed.ended > 0 and other.error == ""

    assert any(given_up(limit) for limit in (0.4, 2, 8)), "not even where this machine did not stand still"


def test_where_nobody_listens_every_request_fails(peer: Peer) -> None:
    peer.close()
    found = ask(peer, Load(rate=1000), asks(3, rate=1000))
    assert [one.error for one in found.outcomes] == ["no connection"] * 3


def test_a_prompt_that_no_request_can_hold_is_an_error(peer: Peer) -> None:
    target = Target(f"http://127.0.0.1:{peer.port}", Secret(TOKEN))
    with pytest.raises(InvalidRequest, match="131072"):
        measure(target, "m", Load(concurrency=1), iter(asks(1)), lambda one: "p" * 131_073)


def test_an_adapters_folder_is_sent_whole_to_an_engine_of_this_user_only(peer: Peer) -> None:
    peer.scripts = [ANSWER]
    folder = replace(asks(1)[0], adapter="./some/adapter")
    known = Target(f"http://127.0.0.1:{peer.port}", Secret(TOKEN), proof=Secret("of its record"))
    measure(known, "m", Load(concurrency=1), iter([folder]), lambda one: "p")
    assert peer.seen[0].json["lora"] == str(Path("some/adapter").absolute())
    assert peer.seen[0].headers[PROOF_HEADER] == "of its record"
    with pytest.raises(InvalidRequest, match="only an engine here takes"):
        ask(peer, Load(concurrency=1), [folder])


def test_what_an_address_answers_is_told(peer: Peer) -> None:
    peer.scripts = [body({"model": "m"}), body({"count": 7}), body({"detail": "no such path"}, "404 Not Found")]
    target = Target(f"http://127.0.0.1:{peer.port}", Secret(TOKEN))
    assert target.health() == {"model": "m"}
    assert target.count("some text") == 7
    assert peer.seen[1].json["prompt"] == "some text"
    with pytest.raises(BackendError, match="no such path"):
        target.health()
    peer.close()
    with pytest.raises(ConnectionFailed, match="nobody answers at"):
        target.health()
