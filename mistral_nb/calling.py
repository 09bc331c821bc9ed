"""Running the calls that a model asks for, on the user's own Python functions.

Nothing is ever run by name or from text: a call reaches one of the very objects that the user handed over, with
arguments that were checked against its signature and its simple annotations. What goes wrong becomes the call's result,
which the model reads and may answer to.
"""

from __future__ import annotations

import inspect
import json
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mistral_nb.annotations import fitted
from mistral_nb.errors import InvalidRequest
from mistral_nb.types import Function, GenerationRequest, Message

__all__ = ["MAX_ROUNDS", "CallRecord", "Rounds", "Toolbox", "offered"]

MAX_ROUNDS = 4
MAX_RESULT = 16_000
"""Characters of a result that the model is given."""


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call that was run. `result` is what the function returned; `error` says what went wrong, else it is empty.

    `seconds` is the time that it took.
    """

    name: str
    arguments: Mapping[str, Any]
    result: Any = None
    error: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        """The call and its outcome in one line."""
        given = ", ".join(f"{name}={_shortened(repr(value))}" for name, value in self.arguments.items())
        outcome = f"failed: {self.error}" if self.error else _shortened(repr(self.result), 200)
        return " ".join(f"{self.name}({given}) → {outcome}".split())

    @property
    def told(self) -> str:
        """What the model is given: texts as they are, all else as JSON, of at most `MAX_RESULT` characters."""
        if self.error:
            return json.dumps({"error": self.error}, ensure_ascii=False)
        text = self.result if isinstance(self.result, str) else json.dumps(_plain(self.result), ensure_ascii=False)
        text = text.encode("utf-8", "replace").decode()
        return text if len(text) <= MAX_RESULT else f"{text[:MAX_RESULT]} … (cut; {len(text)} characters in all)"


class Toolbox:
    """The user's functions, by name. `InvalidRequest` for what cannot be offered to a model."""

    def __init__(self, functions: Sequence[Callable[..., Any]]) -> None:
        self._functions: dict[str, Callable[..., Any]] = {}
        for function in functions:
            name = _name(function)
            if name in self._functions:
                raise InvalidRequest("functions", name, "two functions have this name; give one of them another")
            self._functions[name] = function
        self.offered = tuple(Function(name, _source(name, function)) for name, function in self._functions.items())

    def run(self, call: Mapping[str, Any]) -> CallRecord:
        """Run one call, {name, arguments}. Whatever an `Exception` says is in the record; an interrupt goes through."""
        name, arguments, problem = _read(call)
        function = self._functions.get(name)
        if function is None:
            problem = f"there is no function {name!r}; there are {', '.join(self._functions)}"
        if problem or function is None:
            return CallRecord(name, arguments, error=problem)
        began = time.perf_counter()
        try:
            positional, named = _bound(function, arguments)
        except TypeError as error:
            return CallRecord(name, arguments, error=str(error))
        try:
            result = function(*positional, **named)
            if inspect.isawaitable(result):
                result = _awaited(result)
        except Exception as error:  # the user's own code: any failure of it is told to the model
            problem = f"{type(error).__name__}: {error}".removesuffix(": ")
            return CallRecord(name, arguments, error=problem, seconds=time.perf_counter() - began)
        return CallRecord(name, arguments, result, seconds=time.perf_counter() - began)


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
        self._left = limit

    def take(self, calls: Sequence[Mapping[str, Any]], show: Callable[[CallRecord], None] = lambda call: None) -> bool:
        """Run the calls of an answer, `show` each, and make the next request. False when there were none to run."""
        if not calls or self.request.functions is None:
            return False
        asked = [_read(call)[:2] for call in calls]
        said = json.dumps([{"name": name, "arguments": arguments} for name, arguments in asked], ensure_ascii=False)
        turns = [*(self.request.messages or (Message("user", self.request.prompt or ""),)), Message("assistant", said)]
        for call in calls:
            record = self._toolbox.run(call)
            self.records.append(record)
            show(record)
            turns.append(Message("tool", record.told, name=record.name))
        self._left -= 1
        functions = self._toolbox.offered if self._left > 0 else None
        self.request = self.request.with_(prompt=None, messages=tuple(turns), functions=functions)
        return True


def offered(functions: Any) -> Any:
    """Functions of a request, with Python functions among them as what is sent of those."""
    if isinstance(functions, str) or not isinstance(functions, Sequence):
        return functions
    return [Toolbox([each]).offered[0] if callable(each) else each for each in functions]


def _name(function: Any) -> str:
    if not callable(function):
        raise InvalidRequest("functions", function, "is no function; define one with def")
    name = getattr(function, "__name__", None) or type(function).__name__
    if not str(name).isidentifier():
        raise InvalidRequest("functions", name, "has no name of its own; define it with def")
    return str(name)


def _source(name: str, function: Callable[..., Any]) -> str:
    """The function's source; where there is none, or it is a method, its signature and docstring as a `def`."""
    if inspect.isfunction(function) and not isinstance(inspect.unwrap(function), type):
        try:
            source = textwrap.dedent(inspect.getsource(function))
        except (OSError, TypeError):
            source = ""
        if source.lstrip().startswith(("def ", "async def ", "@")):
            return source
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(
            "functions", name, "does not tell its parameters; wrap it into a def of your own"
        ) from error
    told = inspect.getdoc(function) or ""
    return f"def {name}{signature}:\n    {told[:2000]!r}\n"


def _read(call: Mapping[str, Any]) -> tuple[str, dict[str, Any], str]:
    """Name and arguments of a call in Workers AI's or OpenAI's form, and what is wrong with it, if anything."""
    inner = call.get("function")
    inner = inner if isinstance(inner, Mapping) else call
    name, arguments = inner.get("name"), inner.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            return str(name), {}, f"the arguments are not JSON: {_shortened(str(arguments))}"
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        return str(name), {}, f"the arguments must be a JSON object, not {_shortened(json.dumps(arguments))}"
    return str(name), dict(arguments), ""


def _bound(function: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments as the function takes them. `TypeError` says which one is missing, unknown, or of another type."""
    parameters = inspect.signature(function).parameters.values()
    hints = _hints(function)
    anything = any(each.kind is each.VAR_KEYWORD for each in parameters)
    named = [each for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    unknown = [name for name in arguments if not anything and all(name != each.name for each in named)]
    missing = [each.name for each in named if each.default is each.empty and each.name not in arguments]
    if missing or unknown:
        problems = [f"missing: {', '.join(missing)}"] if missing else []
        problems += [f"unknown: {', '.join(unknown)}"] if unknown else []
        raise TypeError(f"arguments {'; '.join(problems)}; it takes {', '.join(each.name for each in named) or 'none'}")
    checked = {name: fitted(value, hints.get(name, Any), name) for name, value in arguments.items()}
    before: list[Any] = []
    for each in named:
        if each.kind is each.POSITIONAL_ONLY:
            before.append(checked.pop(each.name, each.default))
    return before, checked


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations as types; none where they cannot be resolved."""
    target = function if inspect.isroutine(function) else type(function).__call__
    try:
        return inspect.get_annotations(inspect.unwrap(target), eval_str=True)
    except Exception:  # an annotation is the user's expression and may fail in any way; then nothing is checked
        return {}


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
            outcome.extend((False, error))
        finally:
            loop.close()

    thread = threading.Thread(target=run, name="mistral-nb call", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
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
