"""Running the calls that a model asks for, on the user's own Python functions.

Nothing is ever run by name or from text: a call reaches one of the very objects that the user handed over, with
arguments that were checked against its signature and its simple annotations. What goes wrong becomes the call's result,
which the model reads and may answer to.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mistral_nb.answer import Result
from mistral_nb.callables import bound, code_of, name_of
from mistral_nb.errors import InvalidRequest
from mistral_nb.functions import parse_calls
from mistral_nb.types import MAX_NAME, MAX_TEXT, Function, GenerationRequest, Message

__all__ = ["MAX_ROUNDS", "CallRecord", "Rounds", "Toolbox", "check_rounds", "offered"]

MAX_ROUNDS = 4
MOST_ROUNDS = 999
MAX_RESULT = 16_000
"""Characters of a result that the model is given."""
MAX_ARGUMENTS = 60_000
"""Characters of a call's arguments as JSON; more would not fit the turn that tells of the calls."""
MAX_DEPTH = 64
"""Lists and objects within each other in a call's arguments."""
MAX_ERROR = 2_000


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call that was run. `result` is what the function returned; `error` says what went wrong, else it is empty.

    `seconds` is the time that it took. `told` is what the model is given, and `shown` the start of the result's repr.
    """

    name: str
    arguments: Mapping[str, Any]
    result: Any = None
    error: str = ""
    seconds: float = 0.0
    told: str = field(default="", repr=False)
    shown: str = field(default="", repr=False)

    def __str__(self) -> str:
        """The call and its outcome in one line."""
        given = ", ".join(f"{name}={_shortened(repr(value))}" for name, value in self.arguments.items())
        outcome = f"failed: {self.error}" if self.error else self.shown
        return " ".join(f"{self.name}({given}) → {outcome}".split())


class Toolbox:
    """The user's functions, by name. `InvalidRequest` for what cannot be offered to a model."""

    def __init__(self, functions: Sequence[Callable[..., Any]]) -> None:
        self._functions: dict[str, Callable[..., Any]] = {}
        for function in functions:
            name = name_of(function)
            if name in self._functions:
                raise InvalidRequest("functions", name, "two functions have this name; give one of them another")
            self._functions[name] = function
        self.offered = tuple(Function(name, code_of(name, function)) for name, function in self._functions.items())

    def run(self, call: Mapping[str, Any]) -> CallRecord:
        """Run one call, {name, arguments}. Whatever an `Exception` says is in the record; an interrupt goes through."""
        name, arguments, problem = _read(call)
        function = self._functions.get(name)
        if function is None:
            problem = f"there is no function {name!r}; there are {', '.join(self._functions)}"
        if problem or function is None:
            return _failed(CallRecord(name, arguments), problem)
        began = time.perf_counter()
        checked, result = None, None
        try:
            checked = bound(function, copy.deepcopy(arguments))
            value = function(*checked[0], **checked[1])
            result = _awaited(value) if inspect.isawaitable(value) else value
            told, shown = _told(result), _shortened(_clean(repr(result)), 200)
        except Exception as error:  # the user's own code, or that of its result: any failure is told to the model
            record = CallRecord(name, arguments, result, seconds=time.perf_counter() - began)
            return _failed(record, str(error) if checked is None and isinstance(error, TypeError) else _problem(error))
        return CallRecord(name, arguments, result, "", time.perf_counter() - began, told, shown)


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
        show: Callable[[CallRecord], None] = lambda call: None,
        keep: Callable[[Result], object] = lambda result: None,
    ) -> Result:
        """`ask`, run the calls and `show` each, until an answer asks for none: that one, with all calls in `calls`.

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
        show: Callable[[CallRecord], None] = lambda call: None,
    ) -> bool:
        """Run the calls of an answer, `show` each, and make the next request. False when there were none to run.

        `text` is what the answer says beside its calls: an assistant's turn before the turn of the calls, which leaves
        the arguments out where they do not fit a turn.
        """
        if not calls or self.request.functions is None:
            return False
        records: list[CallRecord] = []
        for call in calls:
            records.append(self._toolbox.run(call))
            self.records.append(records[-1])
            show(records[-1])
        said = _as_calls([(each.name, each.arguments) for each in records])
        if len(said) > MAX_TEXT:
            said = _as_calls([(each.name, {}) for each in records])
        turns = [*(self.request.messages or (Message("user", self.request.prompt or ""),))]
        if text.strip():
            turns.append(Message("assistant", _clean(text)[:MAX_TEXT]))
        turns += [Message("assistant", said), *(Message("tool", each.told, name=each.name) for each in records)]
        self._left -= 1
        functions = self._toolbox.offered if self._left > 0 else None
        self.request = self.request.with_(prompt=None, messages=tuple(turns), functions=functions)
        return True


def check_rounds(limit: Any) -> int:
    """A limit of rounds as it is. Raises `InvalidRequest`."""
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MOST_ROUNDS:
        raise InvalidRequest("max_rounds", limit, f"must be a whole number from 1 to {MOST_ROUNDS}")
    return limit


def offered(functions: Any) -> Any:
    """Functions of a request, with Python functions among them as what is sent of those."""
    if isinstance(functions, str) or not isinstance(functions, Sequence):
        return functions
    return [Toolbox([each]).offered[0] if callable(each) else each for each in functions]


def _read(call: Mapping[str, Any]) -> tuple[str, dict[str, Any], str]:
    """Name and arguments of a call in Workers AI's or OpenAI's form, and what is wrong with it, if anything.

    They are what `parse_calls` takes, so that every wire can tell of the call again.
    """
    inner = call.get("function")
    inner = inner if isinstance(inner, Mapping) else call
    name, arguments = inner.get("name"), inner.get("arguments")
    name = _clean(name)[:MAX_NAME] if isinstance(name, str) and name else "unknown"
    written = (arguments or "{}") if isinstance(arguments, str) else None
    if written is not None:
        try:
            arguments = json.loads(written)
        except RecursionError:
            return name, {}, "the arguments are nested too deeply; simplify them"
        except ValueError:
            return name, {}, f"the arguments are not JSON: {_shortened(_clean(written))}"
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return name, {}, f"the arguments must be a JSON object, not of type {type(arguments).__name__}"
    if _deeper(arguments, MAX_DEPTH):
        return name, {}, "the arguments are nested too deeply; simplify them"
    try:
        written = json.dumps(arguments, ensure_ascii=False) if written is None else written
    except (ValueError, TypeError):
        written = ""
    if len(written) > MAX_ARGUMENTS:
        return name, {}, f"the arguments have {len(written)} characters; at most {MAX_ARGUMENTS} can be taken"
    calls = parse_calls(f'[{{"name": {json.dumps(name)}, "arguments": {written}}}]')
    if not calls:
        return name, {}, "the arguments hold a number that JSON cannot say, or one key twice; correct them"
    return name, calls[0]["arguments"], ""


def _as_calls(calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    return json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls], ensure_ascii=False)


def _deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects stand within each other more than `depth` times."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (depth == 0 or any(_deeper(each, depth - 1) for each in inner))


def _failed(record: CallRecord, problem: str) -> CallRecord:
    """The record with what went wrong, for its reader and for the model."""
    error = _shortened(_clean(problem), MAX_ERROR)
    return replace(record, error=error, told=json.dumps({"error": error}, ensure_ascii=False))


def _problem(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}".removesuffix(": ")
    except Exception:  # the text of the user's own error may fail as well
        return type(error).__name__


def _told(result: Any) -> str:
    """A result for the model: a text as it is, all else as JSON, of at most `MAX_RESULT` characters."""
    text = _clean(result if isinstance(result, str) else json.dumps(_plain(result), ensure_ascii=False))
    return text if len(text) <= MAX_RESULT else f"{text[:MAX_RESULT]} … (cut; {len(text)} characters in all)"


def _awaited(awaitable: Any) -> Any:
    """The result of an awaitable, on an event loop of its own: a notebook's own loop is running already.

    An interrupt of the caller cancels it.
    """
    import asyncio

    outcome: list[Any] = []
    loop = asyncio.new_event_loop()

    async def wait() -> Any:
        return await awaitable

    task = loop.create_task(wait())

    def run() -> None:
        try:
            outcome.extend((True, loop.run_until_complete(task)))
        except BaseException as error:  # raised again in the caller's thread
            if task.done() and not task.cancelled():
                task.exception()  # the loop passes an interrupt on and leaves the task's own copy to be complained of
            outcome.extend((False, error))
        finally:
            loop.close()

    thread = threading.Thread(target=run, name="mistral-nb call", daemon=True)
    try:
        thread.start()
        thread.join()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the loop has ended just now
            loop.call_soon_threadsafe(task.cancel)
        raise
    if not outcome[0]:
        raise outcome[1]
    return outcome[1]


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it; anything else as its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _shortened(text: str, longest: int = 60) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _clean(text: str) -> str:
    """Without halves of surrogate pairs, which no wire can send."""
    return text.encode("utf-8", "replace").decode()
