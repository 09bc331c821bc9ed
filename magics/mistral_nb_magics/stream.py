"""Following what comes bit by bit: a thread reads it, the main thread shows it and takes the interrupt."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from types import FrameType, TracebackType
from typing import Any, Protocol, TypeVar

from mistral_nb.backends.pump import POLL

__all__ = ["Interrupts", "Source", "Surface", "follow"]

GRACE = 0.5
"""Seconds."""

_END = object()
_INTERRUPT = object()
_CLOSING_LIMIT = 2.0


T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)
T = TypeVar("T")


class Source(Protocol[T_co]):
    """What is followed: an `Answer` or another stream of chunks, or the events of a benchmark."""

    def __iter__(self) -> Iterator[T_co]: ...

    def close(self) -> None: ...


class Surface(Protocol[T_contra]):
    """Where what is followed is shown while it comes. Used by one thread."""

    def add(self, chunk: T_contra, /) -> None:
        """Take a chunk; show it now or at the next flush."""

    def due(self) -> float | None:
        """Seconds until `flush` should be called; None when nothing waits to be shown."""

    def flush(self) -> None:
        """Show what was added."""


class Interrupts:
    """While it is entered, an interrupt is an event in `events`, so that nothing is lost halfway.

    The third one raises `KeyboardInterrupt` at once. One that comes within `GRACE` of the end of an interrupted answer,
    such as the second of a double click, is ignored: a kernel that is about to send its reply would lose it. Outside
    the main thread, where no interrupt arrives, this only holds the events.
    """

    def __init__(self) -> None:
        self.events: SimpleQueue[Any] = SimpleQueue()
        self._count = 0
        self._former: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._former is not None:
            signal.signal(signal.SIGINT, _Late(self._former) if self._count else self._former)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self.events.put(_INTERRUPT)
        if self._count > 2:
            raise KeyboardInterrupt


class _Late:
    """A handler that lets `GRACE` pass, and then hands each interrupt to the former handler."""

    def __init__(self, former: Any) -> None:
        self._former: Any = former._former if isinstance(former, _Late) else former
        self._until = time.monotonic() + GRACE

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() > self._until and callable(self._former):
            self._former(number, frame)


def follow(
    source: Source[T], surface: Surface[T], interrupts: Interrupts, closing: float = _CLOSING_LIMIT
) -> BaseException | None:
    """Show `source` on `surface` until it ends: None, or what ended it.

    What ended it is the error that reading raised, or `KeyboardInterrupt` after an interrupt, which closes `source`.
    What it still has to say then is shown too, if it comes within `closing` seconds.
    """
    events = interrupts.events
    threading.Thread(target=_read, args=(source, events), name="mistral-nb cell", daemon=True).start()
    while True:
        due = surface.due()
        if due is not None and due <= 0:
            surface.flush()
            continue
        try:
            event = events.get(timeout=POLL if due is None else due)
        except Empty:
            continue
        if event is _INTERRUPT:
            source.close()
            _drain(events, surface, closing)
            return KeyboardInterrupt("stopped")
        if event is _END:
            return None
        if isinstance(event, BaseException):
            return event
        surface.add(event)


def _read(source: Source[T], events: SimpleQueue[Any]) -> None:
    try:
        for chunk in source:
            events.put(chunk)
    except BaseException as error:  # raised again by the main thread
        events.put(error)
    else:
        events.put(_END)


def _drain(events: SimpleQueue[Any], surface: Surface[T], seconds: float) -> None:
    """Take what was read before the source was closed, and what it says while it closes."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            event = events.get(timeout=left)
        except Empty:
            return
        if event is _END or isinstance(event, BaseException):
            return
        if event is not _INTERRUPT:
            surface.add(event)
