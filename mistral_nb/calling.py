"""Running a call that a model asks for, on the user's own Python functions.

Nothing is ever run by name or from text: a call reaches one of the very objects that the user handed over, with
arguments that were checked against its signature and its simple annotations. What goes wrong becomes the call's result,
which the model reads and may answer to.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import enum
import inspect
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from mistral_nb.annotations import said
from mistral_nb.callables import bound, code_of, name_of
from mistral_nb.errors import InvalidRequest
from mistral_nb.functions import parse_calls
from mistral_nb.types import MAX_NAME, Function

__all__ = ["CallRecord", "Toolbox", "offered", "refused", "sendable"]

MAX_RESULT = 16_000
"""Characters of a result that the model is given."""
MAX_ARGUMENTS = 60_000
"""Characters of a call's arguments as JSON; more would not fit the turn that tells of the calls."""
MAX_DEPTH = 64
"""Lists and objects within each other in a call's arguments."""
MAX_ERROR = 2_000
MAX_SHOWN = 2_000
"""Characters of an argument that are shown before the call is run: its end matters as much as its start."""
UNFINISHED = "stopped before it ended"


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call that was run. `result` is what the function returned; `error` says what went wrong, else it is empty.

    `seconds` is the time that it took. `told` is what the model is given, and `shown` the result's repr, shortened.
    """

    name: str
    arguments: Mapping[str, Any]
    result: Any = None
    error: str = ""
    seconds: float = 0.0
    told: str = field(default="", repr=False)
    shown: str = field(default="", repr=False)

    @property
    def asked(self) -> str:
        """The call in one line."""
        given = ", ".join(f"{name}={_shortened(repr(value), MAX_SHOWN)}" for name, value in self.arguments.items())
        return " ".join(f"{self.name}({given})".split())

    @property
    def outcome(self) -> str:
        """What came of it, in one line."""
        return " ".join(f"→ {f'failed: {self.error}' if self.error else self.shown}".split())

    def __str__(self) -> str:
        return f"{self.asked} {self.outcome}"


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

    def run(self, call: Mapping[str, Any], begin: Callable[[CallRecord], None] = lambda call: None) -> CallRecord:
        """Run one call, {name, arguments}. Whatever an `Exception` says is in the record; an interrupt goes through.

        `begin` is given the record of the call as it stands until that has ended.
        """
        name, arguments, problem = _read(call)
        record = CallRecord(name, arguments, error=UNFINISHED)
        begin(record)
        function = self._functions.get(name)
        if function is None:
            problem = f"there is no function {name!r}; there are {', '.join(self._functions)}"
        if problem or function is None:
            return _failed(record, problem)
        began = time.perf_counter()
        checked, result = None, None
        try:
            checked = bound(function, copy.deepcopy(arguments))
            value = function(*checked[0], **checked[1])
            result = _awaited(value) if inspect.isawaitable(value) else value
            told, shown = _told(result), _shortened(sendable(repr(result)), 200)
        except Exception as error:  # the user's own code, or that of its result: any failure is told to the model
            record = replace(record, result=result, seconds=time.perf_counter() - began)
            return _failed(record, str(error) if checked is None and isinstance(error, TypeError) else _problem(error))
        return CallRecord(name, arguments, result, "", time.perf_counter() - began, told, shown)


def offered(functions: Any) -> Any:
    """Functions of a request, with Python functions among them as what is sent of those."""
    if isinstance(functions, str) or not isinstance(functions, Sequence):
        return functions
    return [Toolbox([each]).offered[0] if callable(each) else each for each in functions]


def refused(call: Mapping[str, Any], problem: str) -> CallRecord:
    """The record of a call that is not run."""
    name, arguments, _ = _read(call)
    return _failed(CallRecord(name, arguments), problem)


def _read(call: Mapping[str, Any]) -> tuple[str, dict[str, Any], str]:
    """Name and arguments of a call in Workers AI's or OpenAI's form, and what is wrong with it, if anything.

    They are what `parse_calls` takes, so that every wire can tell of the call again.
    """
    inner = call.get("function")
    inner = inner if isinstance(inner, Mapping) else call
    name, arguments = inner.get("name"), inner.get("arguments")
    name = sendable(name)[:MAX_NAME] if isinstance(name, str) and name else "unknown"
    written = (arguments or "{}") if isinstance(arguments, str) else None
    if written is not None:
        try:
            arguments = json.loads(written)
        except RecursionError:
            return name, {}, "the arguments are nested too deeply; simplify them"
        except ValueError:
            return name, {}, f"the arguments are not JSON: {_shortened(sendable(written))}"
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


def _deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects stand within each other more than `depth` times."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (depth == 0 or any(_deeper(each, depth - 1) for each in inner))


def _failed(record: CallRecord, problem: str) -> CallRecord:
    """The record with what went wrong, for its reader and for the model."""
    error = _shortened(sendable(problem), MAX_ERROR)
    return replace(record, error=error, told=json.dumps({"error": error}, ensure_ascii=False))


def _problem(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}".removesuffix(": ")
    except Exception:  # the text of the user's own error may fail as well
        return type(error).__name__


def _told(result: Any) -> str:
    """A result for the model: a text as it is, all else as JSON, of at most `MAX_RESULT` characters."""
    text = sendable(result if isinstance(result, str) else json.dumps(_plain(result), ensure_ascii=False))
    return text if len(text) <= MAX_RESULT else f"{text[:MAX_RESULT]} … (cut; {len(text)} characters in all)"


def _awaited(awaitable: Any) -> Any:
    """The result of an awaitable, on an event loop of its own: a notebook's own loop is running already.

    An interrupt of the caller cancels it. Tasks that it leaves behind are cancelled.
    """
    import asyncio

    outcome: Future[Any] = Future()
    tasks: list[asyncio.Task[Any]] = []
    begun = threading.Event()

    async def wait() -> Any:
        tasks.extend(filter(None, [asyncio.current_task()]))
        begun.set()
        return await awaitable

    def run() -> None:
        try:
            with asyncio.Runner() as runner:
                result = runner.run(wait())
        except asyncio.CancelledError:
            outcome.set_exception(RuntimeError("what it awaits was cancelled"))
        except BaseException as error:  # raised again in the caller's thread
            for task in tasks:
                if task.done() and not task.cancelled():
                    task.exception()  # the loop passes an interrupt on; the task's own copy would be complained of
            outcome.set_exception(error)
        else:
            outcome.set_result(result)
        begun.set()

    try:
        inherited = contextvars.copy_context()
        threading.Thread(target=inherited.run, args=(run,), name="mistral-nb call", daemon=True).start()
        return outcome.result()
    except BaseException:
        begun.wait(1)
        for task in tasks:
            with contextlib.suppress(RuntimeError):  # the loop has ended just now
                task.get_loop().call_soon_threadsafe(task.cancel)
        raise


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it, and as arguments say it; anything else as its text."""
    if isinstance(value, enum.Enum):
        return _plain(said(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _shortened(text: str, longest: int = 60) -> str:
    """`text`, without its middle where it has more than `longest` characters."""
    half = longest // 2 - 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


def sendable(text: str) -> str:
    """Without halves of surrogate pairs, which no wire can send."""
    return text.encode("utf-8", "replace").decode()
