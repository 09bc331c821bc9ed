"""How a magic ends: errors in one line, and a value that was shown while it came is not shown again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from IPython.core.displayhook import CapturingDisplayHook, DisplayHook

from mistral_nb.errors import MistralError
from mistral_nb_magics.display import is_notebook

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__all__ = ["short_errors", "shown_once"]

T = TypeVar("T")


@contextmanager
def short_errors() -> Iterator[None]:
    """Errors that the user can do something about fail the cell with their message alone, without a traceback."""
    try:
        yield
    except (MistralError, KeyboardInterrupt) as error:
        lines = [f"{type(error).__name__}: {error}".removesuffix(": ")]
        vars(error)["_render_traceback_"] = lambda: lines
        raise


def shown_once(shell: InteractiveShell, value: T, name: str, again: Callable[[T], None] | None = None) -> T:
    """`value`, which the display hook leaves out until this cell has ended; in a terminal it shows `name` instead.

    `again` shows a value of the type where the user asks for one in this cell; without it, IPython does as ever.
    """
    formatter: Any = shell.display_formatter
    kind, notebook = type(value), is_notebook(shell)
    printers = formatter.ipython_display_formatter if notebook else formatter.mimebundle_formatter
    printer: _Notebook[T] | _Terminal[T] = _Notebook(value, again) if notebook else _Terminal(value, name)
    former = printers.for_type(kind, printer)
    while isinstance(former, _Notebook | _Terminal):
        former = former.former
    printer.former = former

    def forget(*_: Any) -> None:
        printers.pop(kind, None)
        if former is not None:
            printers.for_type(kind, former)
        shell.events.unregister("post_run_cell", forget)

    shell.events.register("post_run_cell", forget)
    return value


class _Notebook(Generic[T]):
    """Displays nothing for `value` in the display hook."""

    def __init__(self, value: T, again: Callable[[T], None] | None) -> None:
        self._value = value
        self._again = again
        self.former: Callable[[T], None] | None = None

    def __call__(self, value: T) -> None:
        if value is self._value and _in_display_hook():
            return
        show = self._again or self.former
        if show is None:
            raise NotImplementedError  # so IPython takes its other formats
        show(value)


class _Terminal(Generic[T]):
    """Gives a name for `value` in the display hook."""

    def __init__(self, value: T, name: str) -> None:
        self._value = value
        self._name = name
        self.former: Callable[[T], Any] | None = None

    def __call__(self, value: T) -> Any:
        if value is self._value and _in_display_hook():
            return {"text/plain": self._name}, {}
        bundle = self.former or getattr(type(value), "_repr_mimebundle_", None)
        if bundle is None:
            raise NotImplementedError  # so IPython takes its other formats
        return bundle(value)


def _in_display_hook() -> bool:
    hooks = (DisplayHook.__call__.__code__, CapturingDisplayHook.__call__.__code__)
    frame: FrameType | None = sys._getframe(1)
    while frame and frame.f_code not in hooks:
        frame = frame.f_back
    return frame is not None
