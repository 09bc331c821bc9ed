"""Stop texts, found wherever the pieces are cut, and readers that the engine does not wait for."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path

import pytest

from mistral_nb.engine import Engine
from mistral_nb.engine.tokenizer import load_tokenizer
from mistral_nb.server.generation import Answer, Model, Piece, StopScanner
from mistral_nb.server.schemas import WireError
from mistral_nb.types import GenerationRequest
from tests.server.engines import eventually

TEXT = "abcabcabd<END>tail"


def scan(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    scanner = StopScanner(stops)
    text = ""
    for piece in pieces:
        text += scanner.push(piece)
        if scanner.hit:
            return text, True
    return text + scanner.flush(), False


def cuts(text: str, places: tuple[int, ...]) -> list[str]:
    return [text[start:end] for start, end in itertools.pairwise((0, *places, len(text)))]


@pytest.mark.parametrize("stops", [["abd"], ["<END>"], ["d<", "<END>"], ["never"], ["abcabd"], []])
def test_however_the_text_is_cut(stops: list[str]) -> None:
    at = min((TEXT.index(stop) for stop in stops if stop in TEXT), default=None)
    for places in itertools.chain(itertools.combinations(range(1, len(TEXT)), 2), [tuple(range(1, len(TEXT)))]):
        assert scan(cuts(TEXT, places), stops) == (TEXT[:at], at is not None)


def test_only_the_possible_start_of_a_stop_text_is_held_back() -> None:
    scanner = StopScanner(["<END>", "\n\n"])
    assert scanner.push("Hello") == "Hello"
    assert scanner.push(" <E") == " "
    assert scanner.push("F") == "<EF"
    assert scanner.push("\n") == ""
    assert scanner.push("x") == "\nx"
    assert scanner.push("<") == ""
    assert scanner.flush() == "<"
    assert not scanner.hit


def test_the_stop_text_that_begins_first_wins() -> None:
    assert scan(["one two three"], ["three", "two"]) == ("one ", True)


def test_random_texts_and_cuts() -> None:
    """Against finding the stop texts in the whole; one letter at a time, the first that is complete ends the text."""
    draw = random.Random(7)
    for _ in range(2000):
        text = "".join(draw.choices("ab\n", k=draw.randint(0, 12)))
        stops = ["".join(draw.choices("ab\n", k=draw.randint(1, 3))) for _ in range(draw.randint(1, 3))]
        expected = (text, False)
        for end in range(1, len(text) + 1):
            if found := [text[:end].index(stop) for stop in stops if stop in text[:end]]:
                expected = (text[: min(found)], True)
                break
        assert scan(list(text), stops) == expected


async def read(answer: Answer) -> list[Piece]:
    return [piece async for piece in answer.pieces()]


async def unread_then_read(model: Model, request: GenerationRequest) -> tuple[list[Piece], list[Piece]]:
    """The pieces of an answer that nobody reads until it is complete, and those of one that is read at once."""
    slow, fast = await model.start(request), await model.start(request)
    pieces = await read(fast)
    await asyncio.to_thread(eventually, lambda: model.engine.active == 0, "the engine wrote both to their ends")
    return await read(slow), pieces


async def aborted(model: Model, request: GenerationRequest) -> None:
    answer = await model.start(request)
    answer.abort("no more")
    try:
        await read(answer)
    finally:
        await asyncio.to_thread(eventually, lambda: model.engine.active == 0, "the engine let it go")


def test_the_engine_waits_for_no_reader(embedded: Path) -> None:
    """Nor does a reader have to catch up token by token. An aborted answer says why."""
    model = Model(Engine.load(embedded), load_tokenizer(embedded))
    request = GenerationRequest(prompt="Name three colours.", temperature=0, max_tokens=20)
    try:
        together = [asyncio.run(unread_then_read(model, request)) for _ in range(3)]
        for late, early in together:
            assert len(late) == 1
            assert late[0].text == "".join(piece.text for piece in early)
            assert late[0].usage == early[-1].usage
        assert max(len(early) for _, early in together) > 1, "one that stands still has one piece too"
        with pytest.raises(WireError, match="no more"):
            asyncio.run(aborted(model, request))
    finally:
        model.engine.close()
