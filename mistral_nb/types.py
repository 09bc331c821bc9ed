"""What is asked for and what comes back: the nouns that every other part shares.

`FIELDS` is the one table of request fields with their bounds and help texts. The magic's options, the
server's schema and the widget's sliders are all made from it. Source of names and bounds: the published
Workers AI schema of `@hf/mistral/mistral-7b-instruct-v0.2`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from mistral_nb.errors import InvalidRequest

__all__ = [
    "FIELDS",
    "Chunk",
    "Description",
    "Field",
    "FinishReason",
    "Function",
    "GenerationRequest",
    "Message",
    "Usage",
]

MAX_TEXT = 131_072
MAX_NAME = 1024
MAX_STOP = 4
MOST_RANK = 256
"""Of a LoRA adapter in the local engine."""
ROLES = ("system", "user", "assistant", "tool")

Kind = Literal["text", "bool", "int", "float", "texts", "messages", "functions"]
FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "truncated", "error"]


@dataclass(frozen=True, slots=True)
class Field:
    """One request field. `minimum` and `maximum` bound numbers inclusively, and the length of text in characters."""

    name: str
    kind: Kind
    help: str
    default: Any = None
    minimum: float | None = None
    maximum: float | None = None
    local_only: bool = False

    @property
    def bounds(self) -> str:
        """The allowed range in words, such as `0 to 5`; empty where there is none."""
        if self.minimum is None or self.maximum is None:
            return ""
        unit = " characters" if self.kind == "text" else ""
        return f"{self.minimum:g} to {int(self.maximum) if self.kind != 'float' else self.maximum}{unit}"


FIELDS: tuple[Field, ...] = (
    Field("prompt", "text", "The prompt. Give either this or messages.", None, 1, MAX_TEXT),
    Field("messages", "messages", "The conversation as [{role, content}]. Give either this or prompt."),
    Field("raw", "bool", "Send the prompt as it is, without a chat template.", False),
    Field("stream", "bool", "Send the answer piece by piece.", True),
    Field("max_tokens", "int", "Stop after this many tokens.", 256, 1, MAX_TEXT),
    Field("temperature", "float", "Randomness; 0 is greedy.", 0.6, 0, 5),
    Field("top_p", "float", "Keep the likeliest tokens up to this share; 0 keeps one, above 1 is 1.", None, 0, 2),
    Field("top_k", "int", "Keep this many of the likeliest tokens.", None, 1, 50),
    Field("seed", "int", "The same seed gives the same text on one device, in one precision.", None, 1, 9_999_999_999),
    Field("repetition_penalty", "float", "Divide the score of tokens already seen; 0 and 1 are off.", None, 0, 2),
    Field("frequency_penalty", "float", "Lower a token's score by this for each time it was written.", None, 0, 2),
    Field("presence_penalty", "float", "Lower a token's score by this once it was written.", None, 0, 2),
    Field("lora", "text", "Name or id of a LoRA adapter; locally also its folder's path.", None, 1, MAX_NAME),
    Field("functions", "functions", "Functions as [{name, code}], passed on and never run."),
    Field("stop", "texts", f"Stop before any of these texts (at most {MAX_STOP}).", None, local_only=True),
    Field("lora_scale", "float", "Weight of the LoRA adapter.", None, 0, 10, local_only=True),
)
_BY_NAME = {field.name: field for field in FIELDS}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user, assistant or tool; `content` holds at most 131072 characters, `name` 1024."""

    role: str
    content: str
    name: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InvalidRequest("role", self.role, f"must be one of {', '.join(ROLES)}")
        _check_text("content", self.content, MAX_TEXT)
        if self.name is not None:
            _check_text("name", self.name, MAX_NAME)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Message:
        """From one entry of a request's `messages`; an unknown or missing key is `InvalidRequest`."""
        if not isinstance(data, Mapping):
            raise InvalidRequest("messages", data, "each entry must be an object with role and content")
        for key in ("role", "content"):
            if key not in data:
                raise InvalidRequest("messages", dict(data), f"an entry lacks {key!r}")
        unknown = set(data) - {"role", "content", "name"}
        if unknown:
            raise InvalidRequest("messages", sorted(map(str, unknown)), "an entry holds only role, content and name")
        return cls(**data)

    def to_dict(self) -> dict[str, str]:
        data = {"role": self.role, "content": self.content}
        return data if self.name is None else {**data, "name": self.name}


@dataclass(frozen=True, slots=True)
class Function:
    """A function offered to the model: its name, at most 1024 characters, and its source, at most 131072.

    The source is never executed.
    """

    name: str
    code: str

    def __post_init__(self) -> None:
        _check_text("functions", self.name, MAX_NAME, part="the name")
        _check_text("functions", self.code, MAX_TEXT, part="the code")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Function:
        if not isinstance(data, Mapping) or set(data) != {"name", "code"}:
            raise InvalidRequest("functions", data, "each entry must be an object with name and code")
        return cls(**data)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """The Workers AI input: exactly one of `prompt` and `messages`, and how to sample.

    Validated when made; raises `InvalidRequest` naming the field, the value and the allowed range. `None` means unset
    and is left out of the body. Edge values: temperature 0 is greedy; top_p 0 keeps the single likeliest token and
    values above 1 count as 1; repetition_penalty 0 is off (as is 1). `stop` and `lora_scale` are extensions of the
    local engine.
    """

    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    raw: bool = False
    stream: bool = True
    max_tokens: int = 256
    temperature: float = 0.6
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    lora: str | None = None
    functions: tuple[Function, ...] | None = None
    stop: tuple[str, ...] | None = None
    lora_scale: float | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            given = "both" if self.prompt is not None else "neither"
            raise InvalidRequest("prompt", given, "give exactly one of prompt and messages")
        for field in FIELDS:
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            object.__setattr__(self, field.name, _checked(field, value))
        if self.prompt is not None and not self.prompt.strip():
            raise InvalidRequest("prompt", self.prompt, "must not be empty")
        if self.messages and self.messages[-1].role == "user" and not self.messages[-1].content.strip():
            raise InvalidRequest("content", self.messages[-1].content, "must not be empty")

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> GenerationRequest:
        """From a request body (JSON). An unknown key, a null and a bad value are `InvalidRequest`.

        Booleans may be the texts "true" and "false", as on Cloudflare's model page.
        """
        if not isinstance(body, Mapping):
            raise InvalidRequest("body", type(body).__name__, "must be a JSON object")
        for key in body:
            if key not in _BY_NAME:
                near = difflib.get_close_matches(str(key)[:MAX_NAME], _BY_NAME, n=1)
                wanted = f"did you mean {near[0]!r}?" if near else f"known fields are {', '.join(_BY_NAME)}"
                raise InvalidRequest(str(key), body[key], f"is not a field; {wanted}")
            if body[key] is None:
                raise InvalidRequest(str(key), None, "must not be null; leave it out instead")
        values = dict(body)
        for key, value in values.items():
            if _BY_NAME[key].kind == "bool" and value in ("true", "false"):
                values[key] = value == "true"
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON body: set fields only, never a null."""
        body: dict[str, Any] = {}
        for field in FIELDS:
            value = getattr(self, field.name)
            if value is None or (field.name == "raw" and not value):
                continue
            if field.kind == "messages":
                value = [message.to_dict() for message in value]
            elif field.kind == "functions":
                value = [{"name": function.name, "code": function.code} for function in value]
            elif field.kind == "texts":
                value = list(value)
            body[field.name] = value
        return body

    def with_(self, **changes: Any) -> GenerationRequest:
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)


def _checked(field: Field, value: Any) -> Any:
    """`value` in the field's own type, or `InvalidRequest`."""
    match field.kind:
        case "bool":
            if not isinstance(value, bool):
                raise InvalidRequest(field.name, value, "must be true or false")
        case "int" | "float":
            return _number(field, value)
        case "text":
            assert field.maximum is not None
            _check_text(field.name, value, int(field.maximum))
            if not value:
                raise InvalidRequest(field.name, value, "must not be empty")
        case "texts":
            return _stops(field, value)
        case "messages":
            return _objects(field, value, Message)
        case "functions":
            return _objects(field, value, Function)
    return value


def _check_text(field: str, value: Any, longest: int, part: str = "") -> None:
    """`InvalidRequest` unless `value` is a text of at most `longest` characters that can be encoded.

    Half of a surrogate pair cannot. `part` names what of the field is meant, where it holds several texts.
    """
    prefix = f"{part} " if part else ""
    if not isinstance(value, str):
        raise InvalidRequest(field, value, f"{prefix}must be a text")
    if len(value) > longest:
        raise InvalidRequest(field, f"{len(value)} characters", f"{prefix}must hold at most {longest} characters")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problem = f"{prefix}holds a lone surrogate at character {error.start}; remove it"
        raise InvalidRequest(field, value[error.start], problem) from error


def _number(field: Field, value: Any) -> int | float:
    whole = field.kind == "int"
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(field.name, value, f"must be {kind} from {field.bounds}")
    if isinstance(value, float) and not (math.isfinite(value) and (value.is_integer() or not whole)):
        raise InvalidRequest(field.name, value, f"must be {kind} from {field.bounds}")
    assert field.minimum is not None
    assert field.maximum is not None
    if not field.minimum <= value <= field.maximum:
        raise InvalidRequest(field.name, value, f"must be {kind} from {field.bounds}")
    return int(value) if whole else float(value)


def _stops(field: Field, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) and text for text in texts):
        raise InvalidRequest(field.name, value, "must be a list of texts, none of them empty")
    if not 1 <= len(texts) <= MAX_STOP:
        raise InvalidRequest(field.name, value, f"must hold 1 to {MAX_STOP} texts")
    for text in texts:
        _check_text(field.name, text, MAX_TEXT)
    return tuple(texts)


def _objects(field: Field, value: Any, cls: type[Message] | type[Function]) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise InvalidRequest(field.name, value, "must be a list with at least one entry")
    return tuple(item if isinstance(item, cls) else cls.from_dict(item) for item in value)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def to_dict(self) -> dict[str, int]:
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "total_tokens": self.total_tokens}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer.

    `status` is a transient line such as "Loading the model" before the first text. The last chunk carries
    `finish_reason`, `usage` where the peer told it, and `tool_calls` where the reason is `tool_calls`. `model` is set
    once the peer has said which model answers. `neurons` (Cloudflare's unit of cost) comes on the last chunk and
    `request_id` on that and the first text, where the peer told them. `instead_of` is the model that was asked for,
    where its peer has withdrawn it and `model` answers in its place.
    """

    text: str = ""
    status: str = ""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    model: str | None = None
    neurons: float | None = None
    request_id: str | None = None
    instead_of: str | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Description:
    """Who answers: backend name, model, device in words, and what the model stands in for (empty if for nothing).

    `instead_of` is the model that was asked for and that its peer has withdrawn.
    """

    backend: str
    model: str
    device: str = ""
    stand_in_for: str = ""
    adapter: str | None = None
    instead_of: str = ""
