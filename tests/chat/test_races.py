"""A chat that several threads use at once, in any order."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from mistral_nb.chat import (
    ChatBusy,
    ChatError,
    ChatSession,
    Conversation,
    StatusSaid,
    TextAdded,
    TurnEnded,
    TurnStarted,
)
from tests.backends.scripted import PATIENCE, Peer, frame, head
from tests.chat.conftest import CLOUD, Heard, fails, says

STEPS = 60
THREADS = 4


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def step(session: ChatSession, chance: random.Random) -> Callable[[], object]:
    """Something that a user, or code, may do."""
    conversation = session.conversation
    turn = chance.choice([each.id for each in conversation.turns] or ["none"])
    steps: list[tuple[int, Callable[[], object]]] = [
        (8, partial(session.send, "Q")),
        (3, partial(session.regenerate, turn)),
        (3, partial(session.edit, turn, "R")),
        (3, partial(session.retry, turn)),
        (5, session.stop),
        (3, partial(session.stop, turn)),
        (4, partial(conversation.delete, turn)),
        (3, partial(conversation.select, turn)),
        (4, conversation.undo),
        (1, conversation.clear),
        (1, lambda: conversation.replace_with(Conversation.from_json(conversation.to_json()))),
        (2, conversation.to_markdown),
        (4, partial(session.wait, 0.02)),
    ]
    return chance.choices([each for _, each in steps], [weight for weight, _ in steps])[0]


def use(session: ChatSession, seed: int, failures: list[BaseException]) -> None:
    chance = random.Random(seed)
    for _ in range(STEPS):
        try:
            step(session, chance)()
        except (ChatBusy, ChatError):
            continue
        except BaseException as error:
            failures.append(error)
            raise


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_is_lost_or_left_running(seed: int, session: ChatSession, heard: Heard, peer: Peer) -> None:
    scripts = [says("a", "b", "c"), [head(), "drip"], fails(10000, "no", "401 No"), [head(), frame({"response": "x"})]]
    chance = random.Random(seed)
    peer.scripts = [chance.choice(scripts) for _ in range(STEPS * THREADS)] + [says("end")]
    session.compare = CLOUD
    failures: list[BaseException] = []
    threads = [threading.Thread(target=use, args=(session, seed * 10 + n, failures)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(6 * PATIENCE)
        assert not thread.is_alive()
    session.stop()
    assert session.wait(PATIENCE)
    assert failures == []
    assert not session.busy
    conversation = session.conversation
    assert [turn for turn in conversation.turns if turn.running] == []
    while conversation.undo():
        assert Conversation.from_json(conversation.to_json()).turns == conversation.turns
    check(heard)
    peer.scripts = [says("end")]
    session.compare = None
    assert session.ask("Still there?").text == "end"


def check(heard: Heard) -> None:
    """Each turn that started has ended, once, and its text came in order between the two."""
    open_turns: dict[str, str] = {}
    ended = 0
    for event in heard.events:
        if isinstance(event, TurnStarted):
            assert event.turn.id not in open_turns
            open_turns[event.turn.id] = ""
        elif isinstance(event, TextAdded):
            assert event.start == len(open_turns[event.turn_id])
            open_turns[event.turn_id] += event.text
        elif isinstance(event, StatusSaid):
            assert event.turn_id in open_turns
        elif isinstance(event, TurnEnded):
            text = open_turns.pop(event.turn.id)
            ended += 1
            if event.result is not None:
                assert event.result.text == text
    assert open_turns == {}
    assert ended > 10
