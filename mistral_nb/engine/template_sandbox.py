"""Jinja for chat templates, which come with a checkpoint and are not trusted.

Jinja's immutable sandbox keeps a template away from Python's internals. What it lacks is a bound, so here one rendering
makes at most `MAX_STEPS` loop turns and calls, builds no text or list longer than `MAX_SIZE`, and passes no number
above `MAX_NUMBER` (a width, a count) to a call or filter. A template that wants more, or that does something
forbidden, ends in jinja2's `SecurityError`.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

__all__ = ["ChatSandbox", "Refused"]

MAX_STEPS = 200_000
MAX_SIZE = 16_000_000
MAX_NUMBER = 100_000

# No template can spell this name, so none can replace the counter.
_STEPS = "steps taken"
# These pad or format by a number that stands inside a text, or make things that no prompt needs.
_LEFT_OUT = ("batch", "center", "format", "indent", "random", "slice", "urlize", "wordwrap", "xmlattr")


class Refused(TemplateError):
    """The template called `raise_exception`: it does not take this conversation."""


class ChatSandbox(ImmutableSandboxedEnvironment):
    """An environment with what chat templates expect: trimmed blocks, `break` and `continue`, `raise_exception`,
    `strftime_now`, a `tojson` that does not escape HTML, and `{% generation %}` blocks.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        self.filters = {name: _bounded(call) for name, call in self.filters.items() if name not in _LEFT_OUT}
        self.filters["tojson"] = _to_json
        self.globals = {
            "range": self.globals["range"],
            "dict": _new_dict,
            "namespace": _new_namespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }

    def render(self, template: Template, values: dict[str, Any]) -> str:
        """Render a template of this environment (`from_string`) within the bounds."""
        return template.render({**values, _STEPS: itertools.count(1)})

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is not None:
            raise SecurityError("a template may not call str.format")
        return None

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        bounded: nodes.Template = _Bounds().visit(tree)
        return bounded

    @staticmethod
    @pass_context
    def counted(context: Context, values: Iterable[Any]) -> Iterator[Any]:
        """`values`, each of them a step."""
        for value in values:
            _step(context)
            yield value

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join pieces of output; the root, macros and `{% set %}` blocks all come through here."""
        kept = []
        size = 0
        for part in parts:
            size += len(part)
            _check_size(size)
            kept.append(part)
        return "".join(kept)

    def joined(self, *parts: Any) -> str:
        """The `~` operator."""
        return self.concat(str(part) for part in parts)

    def call(self, context: Context, callee: Any, /, *args: Any, **kwargs: Any) -> Any:
        _step(context)
        _check_numbers((*args, *kwargs.values()))
        return super().call(context, callee, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            _check_size(len(left) + len(right))
        elif operator == "*" and (isinstance(left, Sized) or isinstance(right, Sized)):
            series, times = (left, right) if isinstance(left, Sized) else (right, left)
            _check_size(len(series) * times)
        elif operator == "**":
            _check_numbers((left, right))
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("a template may not format text with %")
        return super().call_binop(context, operator, left, right)


class _Bounds(NodeTransformer):
    """Counts the turns of every loop, and sends `~` through `joined`."""

    def visit_For(self, node: nodes.For, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        node.iter = _environment_call("counted", [node.iter])
        return node

    def visit_Concat(self, node: nodes.Concat, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        return _environment_call("joined", node.nodes)


def _environment_call(name: str, args: list[Any]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's part for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """jinja2's, without underscored names."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a template may not store {name!r}")
        super().__setitem__(name, value)


def _new_namespace(*args: Any, **kwargs: Any) -> _Namespace:
    space = _Namespace()
    for name, value in dict(*args, **kwargs).items():
        space[name] = value
    return space


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> NoReturn:
    raise Refused(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    _check_numbers((indent,))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _bounded(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_numbers((*args[1:], *kwargs.values()))
        return call(*args, **kwargs)

    return checked


def _step(context: Context) -> None:
    if next(context.parent[_STEPS]) > MAX_STEPS:
        raise SecurityError(f"the template takes more than {MAX_STEPS} steps")


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"the template builds a text or list longer than {MAX_SIZE}")


def _check_numbers(values: Iterable[Any]) -> None:
    if any(isinstance(value, int | float) and abs(value) > MAX_NUMBER for value in values):
        raise SecurityError(f"the template uses a number above {MAX_NUMBER}")
