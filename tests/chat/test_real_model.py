"""A chat with the embedded model: it remembers, compares, and leaves out what does not fit."""

from __future__ import annotations

from mistral_nb.chat import ChatSession, Choice, TextAdded, Turn
from tests.chat.conftest import Heard

LIMIT = 180.0


def test_it_answers_with_what_was_said_before(real: ChatSession) -> None:
    real.choice = Choice("local", system="Answer in one word.", fields={"temperature": 0, "max_tokens": 8, "seed": 1})
    first = real.ask("What is the capital of France?")
    assert "Paris" in first.text
    second = real.ask("And of Italy?")
    assert "Rome" in second.text
    turn = real.conversation.path[-1]
    assert (turn.footer, turn.finish_reason) == (second.footer, second.finish_reason)
    assert second.usage
    assert first.usage
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + 8
    assert [each.content for each in second.request.messages or ()][1:4] == [
        *("What is the capital of France?", first.text, "And of Italy?"),
    ]


def test_two_at_once_with_one_seed_say_the_same(real: ChatSession) -> None:
    real.choice = Choice("local", fields={"max_tokens": 16, "temperature": 1.5, "seed": 11})
    real.compare = Choice("local", fields={"max_tokens": 16, "temperature": 1.5})
    heard = Heard()
    real.listen(heard)
    turns = real.send("Name an animal.")
    assert real.wait(LIMIT)
    first, second = (real.conversation.turn(turn.id) for turn in turns)
    assert first.answer == second.answer == heard.text(first.id) == heard.text(second.id) != ""


def test_stop_and_the_next_question(real: ChatSession) -> None:
    real.choice = real.choice.with_fields(max_tokens=400)
    heard = Heard()
    real.listen(heard)
    (turn,) = real.send("Write a long story about a fox.")
    heard.until(TextAdded, 2)
    real.stop()
    assert real.conversation.turn(turn.id).finish_reason == "cancelled"
    assert real.conversation.turn(turn.id).answer
    real.choice = real.choice.with_fields(max_tokens=4)
    assert real.ask("Thank you.").finish_reason in ("length", "stop")


def test_a_chat_that_is_too_long_goes_on(real: ChatSession) -> None:
    """The model's context is 8,192 tokens; the older turn has more."""
    for name, answer in (("long", "The fox ran over the hill. " * 1500), ("short", "It has four legs.")):
        real.conversation.add(Turn(name, real.conversation.head, "Go on.", answer=answer, finish_reason="stop"))
    result = real.ask("How many legs has it?")
    turn = real.conversation.path[-1]
    assert (turn.error, turn.left_out) == (None, 1)
    assert [each.content for each in result.request.messages or ()] == ["Go on.", "It has four legs.", turn.prompt]
