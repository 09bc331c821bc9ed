"""How many of the oldest turns to leave out of a request that did not fit in the model's context."""

from __future__ import annotations

from mistral_nb.errors import ContextOverflow
from mistral_nb.types import GenerationRequest

__all__ = ["more_left_out"]


def more_left_out(error: ContextOverflow, request: GenerationRequest, left_out: int) -> int | None:
    """How many turns to leave out after `request`, which left out `left_out`, was refused. None: nothing is left to.

    As many as the error's numbers say by the characters of each turn, so that the answer has room too: `max_tokens`,
    but a quarter of the context at most. At least one more, and half as many again, so that a peer whose numbers are
    wrong is not asked once for each turn.
    """
    messages = request.messages or ()
    first = 1 if messages and messages[0].role == "system" else 0
    questions, answers = messages[first:-1:2], messages[first + 1 : -1 : 2]
    exchanges = [len(q.content) + len(a.content) for q, a in zip(questions, answers, strict=True)]
    if not exchanges:
        return None
    characters = sum(len(message.content) for message in messages)
    room = min(request.max_tokens, error.limit // 4)
    excess = (error.prompt_tokens - error.limit + room) * characters / max(1, error.prompt_tokens)
    count = 0
    while count < len(exchanges) and excess > 0:
        excess -= exchanges[count]
        count += 1
    return left_out + min(len(exchanges), max(count, 1, left_out // 2))
