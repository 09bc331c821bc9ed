"""Rounds of calls: the model asks for calls, they are run, and it is asked again with their results."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mistral_nb.answer import Result
from mistral_nb.calling import CallRecord, Toolbox, refused, sendable
from mistral_nb.errors import InvalidRequest
from mistral_nb.types import MAX_TEXT, GenerationRequest, Message

__all__ = ["MAX_ROUNDS", "Rounds", "check_rounds"]

MAX_ROUNDS = 4
MOST_ROUNDS = 999
MAX_CALLS = 16
"""Calls of one answer that are run."""


class Rounds:
    """A conversation in which the model calls functions: `request` is what to ask next.

    After `limit` rounds of calls the model is asked without functions, so that it has to answer in words.
    """

    def __init__(self, request: GenerationRequest, toolbox: Toolbox, limit: int = MAX_ROUNDS) -> None:
        if request.raw:
            raise InvalidRequest("raw", True, "functions need the chat template; leave raw out")
        self.request = request.with_(functions=toolbox.offered)
        self.records: list[CallRecord] = []
        self._toolbox = toolbox
        self._left = check_rounds(limit)

    def converse(
        self,
        ask: Callable[[GenerationRequest], Result],
        show: Callable[[str], None] = lambda line: None,
        keep: Callable[[Result], object] = lambda result: None,
    ) -> Result:
        """`ask`, run the calls and `show` each, until an answer asks for none: that one, with all calls in `calls`.

        A call is shown before it is run, in one line, and what came of it after, in another.

        Calls beyond the limit stay in its `tool_calls`. Whatever ends this early has in its `result`, which `keep` is
        given too, the answer so far with the calls that have run.
        """
        answer: Result | None = None
        asking = True
        try:
            while True:
                asking = True
                answer = ask(self.request)
                asking = False
                if not self.take(answer.tool_calls, answer.text, show):
                    return replace(answer, calls=tuple(self.records))
        except BaseException as error:
            # an error of a function that asks a model by itself has another answer in its result
            partial = (getattr(error, "result", None) if asking else None) or answer
            if partial is not None:
                partial = replace(partial, calls=tuple(self.records))
                keep(partial)
                with contextlib.suppress(AttributeError):
                    error.result = partial  # type: ignore[attr-defined]
            raise

    def take(
        self,
        calls: Sequence[Mapping[str, Any]],
        text: str = "",
        show: Callable[[str], None] = lambda line: None,
    ) -> bool:
        """Run the calls of an answer, `show` each, and make the next request. False when there were none to run.

        `text` is what the answer says beside its calls: an assistant's turn before the turn of the calls, which leaves
        the arguments out where they do not fit a turn. Of more than `MAX_CALLS` calls the first are run, and one record
        has the error for all others.
        """
        if not calls or self.request.functions is None:
            return False
        records = [self._run(call, show) for call in calls[:MAX_CALLS]]
        if len(calls) > MAX_CALLS:
            problem = f"too many calls in one answer: {MAX_CALLS} of {len(calls)} were run; ask for fewer"
            records.append(refused(calls[MAX_CALLS], problem))
            self.records.append(records[-1])
            show(str(records[-1]))
        said = _as_calls([(each.name, each.arguments) for each in records])
        if len(said) > MAX_TEXT:
            said = _as_calls([(each.name, {}) for each in records])
        turns = [*(self.request.messages or (Message("user", self.request.prompt or ""),))]
        if text.strip():
            turns.append(Message("assistant", sendable(text)[:MAX_TEXT]))
        turns += [Message("assistant", said), *(Message("tool", each.told, name=each.name) for each in records)]
        self._left -= 1
        functions = self._toolbox.offered if self._left > 0 else None
        self.request = self.request.with_(prompt=None, messages=tuple(turns), functions=functions)
        return True

    def _run(self, call: Mapping[str, Any], show: Callable[[str], None]) -> CallRecord:
        """Run one call. It is in `records` from its beginning, so that one that is interrupted is there too."""

        def begin(record: CallRecord) -> None:
            self.records.append(record)
            show(record.asked)

        record = self._toolbox.run(call, begin)
        self.records[-1] = record
        show(record.outcome)
        return record


def check_rounds(limit: Any) -> int:
    """A limit of rounds as it is. Raises `InvalidRequest`."""
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MOST_ROUNDS:
        raise InvalidRequest("max_rounds", limit, f"must be a whole number from 1 to {MOST_ROUNDS}")
    return limit


def _as_calls(calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    return json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls], ensure_ascii=False)
