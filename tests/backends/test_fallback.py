"""A model that Cloudflare has withdrawn: the same weights by their other id answer, once, and the answer says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mistral_nb.answer import Answer
from mistral_nb.backends import workers_ai
from mistral_nb.backends.failures import Withdrawn
from mistral_nb.backends.workers_ai import DEFAULT_MODEL, WorkersAI, cloudflare
from mistral_nb.config import FALLBACK_MODEL, load_settings
from mistral_nb.errors import ConfigurationError, RateLimited
from mistral_nb.types import GenerationRequest
from tests.backends.scripted import Peer, Step, body, frame, head

Make = Callable[..., WorkersAI]
HELLO = GenerationRequest(prompt="Hello")
ANSWER: list[Step] = [head(), frame({"response": "Hi"}), frame("[DONE]")]
GONE = body({"errors": [{"message": "AiError: deprecated on 2026-05-30", "code": 5028}], "success": False}, "410 Gone")
BARE = [head("410 Gone", "text/html") + b"<html>gone</html>"]
LLAMA = "@cf/meta/llama-3-8b-instruct"


@pytest.fixture(autouse=True)
def nothing_withdrawn() -> None:
    """A port of an earlier test may come again."""
    workers_ai._WITHDRAWN.clear()


def asked(peer: Peer) -> list[str]:
    """The models that were asked, by the request lines."""
    return [seen.line.split(" ")[1].partition("/ai/run/")[2] for seen in peer.seen]


@pytest.mark.parametrize("gone", [GONE, BARE], ids=["code", "status"])
def test_the_same_weights_answer_and_the_footer_says_so(peer: Peer, client: Make, gone: list[Step]) -> None:
    peer.scripts = [gone, ANSWER]
    answer = Answer(client(model=DEFAULT_MODEL, fallback_model=FALLBACK_MODEL), HELLO)
    statuses = [chunk.status for chunk in answer if chunk.status]
    assert statuses == [f"Cloudflare has withdrawn {DEFAULT_MODEL}; asking {FALLBACK_MODEL}"]
    assert asked(peer) == [DEFAULT_MODEL, FALLBACK_MODEL]
    assert peer.seen[0].body == peer.seen[1].body
    result = answer.result
    assert (result.text, result.finish_reason, result.model) == ("Hi", "stop", FALLBACK_MODEL)
    assert result.served_by.instead_of == DEFAULT_MODEL
    assert result.served_by.stand_in_for == ""
    assert result.footer.startswith(
        f"{FALLBACK_MODEL} (in place of {DEFAULT_MODEL}, which Cloudflare has withdrawn: the same weights) · "
    )
    assert result.metadata()["instead_of"] == DEFAULT_MODEL


def test_other_weights_are_not_called_the_same(peer: Peer, client: Make) -> None:
    peer.scripts = [GONE, ANSWER]
    answer = Answer(client(model=DEFAULT_MODEL, fallback_model=LLAMA), HELLO)
    list(answer)
    assert f"{LLAMA} (in place of {DEFAULT_MODEL}, which Cloudflare has withdrawn) · " in answer.result.footer


@pytest.mark.parametrize("fallback", ["", DEFAULT_MODEL])
def test_without_another_model_it_is_an_error(peer: Peer, client: Make, fallback: str) -> None:
    peer.scripts = [GONE, ANSWER]
    with pytest.raises(Withdrawn, match="deprecated"):
        list(client(model=DEFAULT_MODEL, fallback_model=fallback).stream(HELLO))
    assert len(peer.seen) == 1


def test_a_model_that_is_gone_is_asked_for_once_in_a_process(peer: Peer, client: Make) -> None:
    peer.scripts = [GONE, ANSWER]
    for _ in range(3):
        answer = Answer(client(model=DEFAULT_MODEL, fallback_model=FALLBACK_MODEL), HELLO)
        list(answer)
        assert answer.result.metadata()["instead_of"] == DEFAULT_MODEL
        assert f"in place of {DEFAULT_MODEL}" in answer.result.footer
    assert asked(peer) == [DEFAULT_MODEL, *[FALLBACK_MODEL] * 3]
    list(client(model=FALLBACK_MODEL, fallback_model=LLAMA).stream(HELLO))
    assert asked(peer)[4:] == [FALLBACK_MODEL]
    list(client(model=DEFAULT_MODEL).stream(HELLO))
    assert asked(peer)[5:] == [DEFAULT_MODEL], "nobody else is to be asked, so it is asked itself"


def test_a_model_that_one_peer_has_withdrawn_is_asked_for_elsewhere(peer: Peer, client: Make) -> None:
    peer.scripts = [GONE, ANSWER]
    list(client(model=DEFAULT_MODEL, fallback_model=FALLBACK_MODEL).stream(HELLO))
    other = Peer(scripts=[ANSWER])
    list(client(base_url=other.url, model=DEFAULT_MODEL, fallback_model=FALLBACK_MODEL).stream(HELLO))
    assert asked(other) == [DEFAULT_MODEL]
    other.close()


def test_it_is_tried_once(peer: Peer, client: Make) -> None:
    peer.scripts = [GONE]
    with pytest.raises(Withdrawn, match="too: name another model"):
        list(client(model=DEFAULT_MODEL, fallback_model=FALLBACK_MODEL).stream(HELLO))
    assert asked(peer) == [DEFAULT_MODEL, FALLBACK_MODEL]


def test_after_text_no_other_model_goes_on(peer: Peer, client: Make) -> None:
    peer.scripts = [
        [head(), frame({"response": "Hel"}), frame({"errors": [{"message": "gone", "code": 5028}]})],
        ANSWER,
    ]
    answer = Answer(client(model=DEFAULT_MODEL, fallback_model=FALLBACK_MODEL), HELLO)
    with pytest.raises(Withdrawn, match="gone"):
        list(answer)
    assert (answer.text, answer.result.finish_reason, asked(peer)) == ("Hel", "error", [DEFAULT_MODEL])


def test_another_failure_of_the_second_model_is_its_own(peer: Peer, client: Make) -> None:
    peer.scripts = [GONE, body({"errors": [{"message": "none left", "code": 4006}]}, "429 Too Many")]
    with pytest.raises(RateLimited, match="none left"):
        list(client(model=DEFAULT_MODEL, fallback_model=FALLBACK_MODEL, retry_deadline=30).stream(HELLO))
    assert len(peer.seen) == 2


def settings(**more: object) -> dict[str, object]:
    return {"cloudflare_account_id": "0" * 32, "cloudflare_api_token": "none", **more}


def test_the_settings_reach_the_client() -> None:
    backend = cloudflare(load_settings(settings(retry_deadline=7)))
    assert (backend.model, backend.fallback_model, backend.retry_deadline) == (DEFAULT_MODEL, FALLBACK_MODEL, 7)
    assert cloudflare(load_settings(settings(cloudflare_fallback_model=""))).fallback_model == ""
    with pytest.raises(ConfigurationError, match="cloudflare_fallback_model"):
        cloudflare(load_settings(settings(cloudflare_fallback_model="mistral")))
