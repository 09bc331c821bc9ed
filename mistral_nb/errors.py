"""Every error that mistral-nb raises on purpose, under one root.

    MistralError
    ├── InvalidRequest            a field is wrong: names field, value and what is allowed
    │   └── ContextOverflow       the prompt does not fit the model's context
    ├── ConfigurationError        a setting is wrong, or what it asks for is not set up
    │   └── MissingDependency     a package is not installed: names the command that installs it
    ├── ModelError                a model is unknown, not there, or its files are wrong
    │   ├── UnknownModel
    │   ├── PullError             fetching a model failed
    │   └── AdapterError          a LoRA adapter is unknown, or its files are wrong
    └── BackendError              the peer did not answer as it should: carries code and HTTP status
        ├── AuthenticationError
        ├── RateLimited
        ├── ConnectionFailed      nobody there, or the connection broke before the first text
        ├── RequestTimeout
        ├── StreamTruncated       the peer closed the stream before its end
        └── EngineError           the local engine process
            ├── EngineStartError  did not start: names its log
            ├── EngineCrashed     ended while it was answering: carries the log's tail
            └── EngineBusy        others are using it

Each message ends with what to do next. `result`, where set, is what was answered before the error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mistral_nb.answer import Result

__all__ = [
    "AdapterError",
    "AuthenticationError",
    "BackendError",
    "ConfigurationError",
    "ConnectionFailed",
    "ContextOverflow",
    "EngineBusy",
    "EngineCrashed",
    "EngineError",
    "EngineStartError",
    "InvalidRequest",
    "MissingDependency",
    "MistralError",
    "ModelError",
    "PullError",
    "RateLimited",
    "RequestTimeout",
    "StreamTruncated",
    "UnknownModel",
]


class MistralError(Exception):
    """Root of the tree. `result` holds the partial answer, where there is one."""

    result: Result | None = None


class InvalidRequest(MistralError):
    """`field` has a `value` that is not allowed; `problem` says what is."""

    def __init__(self, field: str, value: Any, problem: str) -> None:
        self.field = field
        self.value = value
        self.problem = problem
        super().__init__(f"{_cut(field)} = {_shown(value)}: {problem}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.problem), self._state()

    def _state(self) -> dict[str, Any]:
        return {**self.__dict__, "args": self.args}


def _shown(value: Any) -> str:
    """A value that is nested too deeply, and a number with too many digits, cannot be written out."""
    try:
        return _cut(repr(value))
    except (RecursionError, ValueError):
        return f"a value of type {type(value).__name__}"


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


class ContextOverflow(InvalidRequest):
    """The prompt has `prompt_tokens`; the model's context holds `limit` tokens. `field` is what it was sent in."""

    def __init__(self, prompt_tokens: int, limit: int, field: str = "prompt") -> None:
        self.prompt_tokens = prompt_tokens
        self.limit = limit
        super().__init__(
            field,
            f"{prompt_tokens} tokens",
            f"does not fit the context of {limit} tokens; shorten it or choose a model with a longer context",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.prompt_tokens, self.limit, self.field), self._state()


class ConfigurationError(MistralError):
    """A setting is wrong, or what was asked for by name is not set up."""


class MissingDependency(ConfigurationError):
    """An optional package is needed: the message holds the command."""


class ModelError(MistralError):
    """A model cannot be used."""


class UnknownModel(ModelError):
    """Nobody here holds a model of that name."""


class PullError(ModelError):
    """Fetching a model failed; nothing half-done is to be found, and the next pull goes on with what was fetched."""


class AdapterError(ModelError):
    """A LoRA adapter cannot be used. `problems` holds each one, where several were found."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class BackendError(MistralError):
    """The peer answered with an error. `code` is the wire's own, `status` the HTTP one, `retry_after` the seconds that
    it asks to wait; each may be None.
    """

    def __init__(
        self, message: str, *, code: int | None = None, status: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.retry_after = retry_after


class AuthenticationError(BackendError):
    """The token is missing, wrong, or lacks the permission."""


class RateLimited(BackendError):
    """Too many requests, no capacity, or the allowance is spent."""


class ConnectionFailed(BackendError):
    """The peer could not be reached."""


class RequestTimeout(BackendError):
    """The peer took longer than the limit that the message names."""


class StreamTruncated(BackendError):
    """The stream ended without its end mark; the partial text is kept in `result`."""


class EngineError(BackendError):
    """The local engine process failed."""


class EngineStartError(EngineError):
    """The engine process did not come up; the message names its log."""


class EngineCrashed(EngineError):
    """The engine process ended in the middle of an answer; the next cell starts it again."""


class EngineBusy(EngineError):
    """The engine is answering others; `--force` overrides."""
