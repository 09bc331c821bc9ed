"""Variables, cells and the last error, put into a question by name."""

from __future__ import annotations

import inspect
import io
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

from IPython.core.error import UsageError
from IPython.lib.pretty import RepresentationPrinter

from mistral_nb.chat import Attachment
from mistral_nb.safe_markdown import plain_text
from mistral_nb_magics.interpolate import lookup

__all__ = ["MAX_ATTACHMENT", "MAX_ROWS", "Candidate", "attach", "candidates"]

MAX_ATTACHMENT = 16_000
"""Characters of one attachment; what is longer is cut, and says so."""

MAX_ROWS = 40
"""Rows of a table."""

MAX_COLUMNS = 100
"""Columns of a table."""

MAX_CANDIDATES = 50

LAST_ERROR = "last error"
_CELL = re.compile(r"(?:In)?\s*\[?(\d{1,9})\]?")


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something that can be attached: `kind` is variable, cell or error; `detail` says what it is, in few words."""

    kind: str
    name: str
    detail: str


def candidates(prefix: str, namespace: Mapping[str, Any], kinds: Sequence[str] = ()) -> list[Candidate]:
    """What a name that begins with `prefix` can mean, of the given kinds (all of them where none is given)."""
    start = prefix.strip().lower()
    found: list[Candidate] = []
    for each in _known(namespace):
        if (not kinds or each.kind in kinds) and each.name.lower().startswith(start):
            found.append(each)
            if len(found) == MAX_CANDIDATES:
                break
    return found


def attach(kind: str, name: str, namespace: Mapping[str, Any]) -> Attachment:
    """The text of a variable, of a cell's source, or of the last error. `UsageError` names what is not there."""
    match kind:
        case "variable":
            return Attachment("variable", name, _cut(_as_text(name, lookup(name, namespace))))
        case "cell":
            number, source = _cell(name, namespace)
            return Attachment("cell", f"In[{number}]", _cut(source))
        case "error":
            return Attachment("error", LAST_ERROR, _cut(_last_error(), keep_end=True))
    raise UsageError(f"cannot attach a {kind!r}: it must be a variable, a cell or the last error")


def _known(namespace: Mapping[str, Any]) -> Iterator[Candidate]:
    if getattr(sys, "last_value", None) is not None:
        yield Candidate("error", LAST_ERROR, type(sys.last_value).__name__)
    hidden = {"In", "Out", "exit", "quit", "get_ipython", "open"}
    for name, value in sorted(dict(namespace).items()):
        if not name.startswith("_") and name not in hidden and not isinstance(value, ModuleType):
            yield Candidate("variable", name, _detail(value))
    for number, source in reversed(list(enumerate(_sources(namespace)))):
        if source.strip():
            yield Candidate("cell", f"In[{number}]", source.strip().splitlines()[0][:60])


def _detail(value: Any) -> str:
    """The type, and the shape or the length where it has one that is plain to read."""
    kind = type(value).__name__
    shape = inspect.getattr_static(value, "shape", None)
    if shape is not None and _is_table(value):
        return f"{kind} {' x '.join(map(str, value.shape))}"
    return f"{kind} of {len(value)}" if isinstance(value, str | bytes | list | tuple | dict | set) else kind


def _sources(namespace: Mapping[str, Any]) -> Sequence[str]:
    sources = namespace.get("_ih") or namespace.get("In")
    return [each for each in sources if isinstance(each, str)] if isinstance(sources, list) else []


def _cell(name: str, namespace: Mapping[str, Any]) -> tuple[int, str]:
    sources = _sources(namespace)
    match = _CELL.fullmatch(name.strip())
    if not match:
        raise UsageError(f"{name!r} is no cell: name it by its number, such as In[3]")
    number = int(match[1])
    if not 0 < number < len(sources) or not sources[number].strip():
        raise UsageError(f"there is no cell In[{number}] that has run in this session; run it first")
    return number, sources[number]


def _last_error() -> str:
    error = getattr(sys, "last_value", None)
    if error is None:
        raise UsageError("no cell of this session has failed: there is no error to attach")
    return plain_text("".join(traceback.format_exception(error)))


def _is_table(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in ("pandas", "polars", "numpy", "torch")


def _as_text(name: str, value: Any) -> str:
    """A value as a model reads it best: text as it is, code as its source, a table as CSV, anything else printed."""
    try:
        if isinstance(value, str):
            return str(value)
        if isinstance(value, FunctionType | MethodType | type):
            return _source(value)
        return _table(value) or _printed(value)
    except Exception as error:  # the value's own code
        raise UsageError(f"{name}: reading it raised {type(error).__name__}: {str(error)[:300]}") from error


def _source(value: Any) -> str:
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return repr(value)


def _table(value: Any) -> str:
    """The first rows of a data frame as CSV, with how many there are; empty for anything else."""
    root = type(value).__module__.partition(".")[0]
    name = type(value).__name__
    if root not in ("pandas", "polars") or name not in ("DataFrame", "Series"):
        return ""
    head = value.head(MAX_ROWS)
    if name == "Series":
        head = head.to_frame()
    columns = len(head.columns)
    text = head.iloc[:, :MAX_COLUMNS].to_csv() if root == "pandas" else head[:, :MAX_COLUMNS].write_csv()
    more = [f"{len(value)} rows"] if len(value) > MAX_ROWS else []
    more += [f"{columns} columns"] if columns > MAX_COLUMNS else []
    return f"{text}({' and '.join(more)} in all)" if more else str(text)


class _Enough(Exception):
    """As much was printed as is taken."""


class _Paper(io.StringIO):
    def write(self, text: str) -> int:
        if self.tell() > MAX_ATTACHMENT:
            raise _Enough
        return super().write(text)


def _printed(value: Any) -> str:
    """As IPython prints it, but no more of a long value than is taken."""
    if isinstance(value, bytes | bytearray):
        value = value[:MAX_ATTACHMENT]
    paper = _Paper()
    printer: Any = RepresentationPrinter(paper, max_width=100)  # type: ignore[no-untyped-call]
    with suppress(_Enough):
        printer.pretty(value)
        printer.flush()
    return paper.getvalue()


def _cut(text: str, keep_end: bool = False) -> str:
    """At most `MAX_ATTACHMENT` characters; of an error the end is kept, which says what went wrong."""
    if len(text) <= MAX_ATTACHMENT:
        return text
    if keep_end:
        return f"(cut: the last {MAX_ATTACHMENT} characters)\n{text[-MAX_ATTACHMENT:]}"
    return f"{text[:MAX_ATTACHMENT]}\n(cut: the first {MAX_ATTACHMENT} characters)"
